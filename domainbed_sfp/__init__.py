"""Pruning and quantization for domain generalization, on DomainBed's protocol."""

__version__ = "0.1.0"
