"""SFP, spurious feature-targeted pruning, in parts.

| module | what it holds |
|---|---|
| `hparams` | what can be set, and what is decided where it is left open |
| `flags` | which samples seem to rest on a spurious attribute |
| `statistics` | what the layers read, and how flagged and unflagged samples differ in it: the channels' scores |
| `removal` | spurious directions of layers' inputs, taken out of their weights |
| `algorithm` | SFP and SFPWeighted: one step of training, from flags to weights |
| `aligned` | SFPAligned: SFP whose network follows the frozen reference |
"""
