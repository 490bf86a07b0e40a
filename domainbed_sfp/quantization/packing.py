"""Integers of few bits without gaps between them: four of 2 bits to a byte, two of 4, eight of 3 bits to three
bytes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pack(integers: Tensor, bits: int) -> Tensor:
    """Signed integers of `bits` bits, any shape, as uint8 [ceil(numel * bits / 8)].

    An integer v is written as v + 2^(bits-1), lowest bit first, one after the other in C order; the last byte is filled
    with zeros. Raises ValueError for integers that do not fit.
    """
    offset = 2 ** (bits - 1)
    values = integers.reshape(-1).cpu().numpy().astype(np.int64) + offset
    if values.size and not (values.min() >= 0 and values.max() < 2 * offset):
        found = f"{values.min() - offset} to {values.max() - offset}"
        raise ValueError(f"integers from {found} do not fit into {bits} bits")
    single = (values[:, None] >> np.arange(bits)) & 1
    return torch.from_numpy(np.packbits(single.astype(np.uint8).reshape(-1), bitorder="little"))


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` integers of `bits` bits take."""
    return -(-count * bits // 8)


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The int8 integers that `pack` was given. Raises ValueError where `packed` has another length."""
    count = int(np.prod(shape))
    if packed.dtype != torch.uint8 or packed.shape != (packed_bytes(count, bits),):
        raise ValueError(f"{count} integers of {bits} bits do not come from {packed.dtype} {tuple(packed.shape)}")
    single = np.unpackbits(packed.cpu().numpy(), count=count * bits, bitorder="little").reshape(count, bits)
    values = (single.astype(np.int64) << np.arange(bits)).sum(1) - 2 ** (bits - 1)
    return torch.from_numpy(values.astype(np.int8)).view(shape)
