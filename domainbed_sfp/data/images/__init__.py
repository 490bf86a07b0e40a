"""Images in files: what a folder of them holds, and how they are decoded."""
