"""Quantization: step sizes that are learned, bit-widths that a policy chooses, and what they cost.

The `algorithms` put these parts together; `export` writes what they trained, for deployment.
"""
