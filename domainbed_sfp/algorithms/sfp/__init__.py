"""SFP, spurious feature-targeted pruning (Wang, PolyU thesis 2024, ch. 4; arXiv 2212.09458, 2305.11615; ACM MM 2024,
doi 10.1145/3664647.3680969). This project's reconstruction: the papers' method section does not determine it.

What the papers state: in-domain samples that carry spurious features have a lower empirical risk; flag the samples
whose loss lies under a threshold, and weaken the projection of the flagged samples' features into model space, so that
the branches that fit spurious features become sparse; directions are analysed through an SVD; there is no global
sparsity penalty.

| module | what it holds |
|---|---|
| `hparams` | what can be set, and what is decided where it is left open |
| `flags` | which samples seem to rest on a spurious attribute |
| `statistics` | what the layers read, and how flagged and unflagged samples differ in it: the channels' scores |
| `removal` | spurious directions of layers' inputs, taken out of their weights |
| `algorithm` | SFP and SFPWeighted: one step of training, from flags to weights |
| `aligned` | SFPAligned: SFP whose network follows the frozen reference |
"""
