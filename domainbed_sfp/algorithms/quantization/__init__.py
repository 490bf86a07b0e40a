"""The quantizing methods, one file each; their bases are in `base`."""
