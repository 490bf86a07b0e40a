"""The pruning methods, one file each; their bases are `scheduled`, `gated` and `at_initialization`."""
