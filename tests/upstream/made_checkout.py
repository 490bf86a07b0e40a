"""A small made checkout of DomainBed."""

from __future__ import annotations

# Hparams of ours that DomainBed's own loaders and loop decide or lack.
NOT_DOMAINBEDS = ("image_size", "degrade", "degraded_evaluation")
