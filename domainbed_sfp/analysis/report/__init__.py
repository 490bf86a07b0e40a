"""A sweep as one self-contained page: tables, figures, comparisons, chosen hparams, failures, protocol."""
