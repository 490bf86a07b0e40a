"""The training objectives, each an algorithm of its own too."""
