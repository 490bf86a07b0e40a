"""Where the tensors of a traced graph keep their channels, and what functions and methods do to that."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

# Element by element, wherever the channels are.
_ELEMENTWISE_FUNCTIONS = {
    F.relu, F.relu6, F.silu, F.gelu, F.hardswish, F.hardsigmoid, F.sigmoid, F.leaky_relu, F.elu, F.dropout, torch.relu,
    torch.sigmoid,
}  # fmt: skip
_ELEMENTWISE_METHODS = {"relu", "relu_", "sigmoid", "contiguous", "float", "to", "clone"}
# Channel by channel on maps [N, C, H, W].
_MAP_FUNCTIONS = {F.adaptive_avg_pool2d, F.avg_pool2d, F.max_pool2d, F.interpolate}
# May move or reduce dimensions: whether the channels stay depends on the arguments.
_RESHAPING_FUNCTIONS = {
    F.pad: "pad", torch.flatten: "flatten", torch.mean: "mean", torch.permute: "permute", torch.reshape: "reshape",
    torch.squeeze: "squeeze",
}  # fmt: skip
_RESHAPING_METHODS = {"flatten", "mean", "permute", "reshape", "squeeze", "view"}


@dataclass(frozen=True)
class Layout:
    """Where a tensor of the graph keeps its channels. Dimension 0 is the batch wherever `axis` is known.

    axis: 1 or, in tensors of more than two dimensions, -1 for the last; None where that is not known.
    rank: number of dimensions; None where that is not known.
    flat: dimension 1 holds several numbers of each channel, channel by channel.
    """

    axis: int | None = None
    rank: int | None = None
    flat: bool = False

    @property
    def is_map(self) -> bool:
        return self.axis == 1 and self.rank == 4

    @property
    def ends_with_channels(self) -> bool:
        return self.axis == -1 or (self.axis == 1 and self.rank == 2)


UNKNOWN = Layout()
MAP = Layout(axis=1, rank=4)


def after_call(node: fx.Node, source: fx.Node, layout: Layout, batch_sizes: set[fx.Node]) -> Layout | None:
    """The layout of what a function or method makes of `source`; None where its channels may not be where they were.
    `batch_sizes` are the nodes that give the number of images."""
    if node.op == "call_function":
        target: Any = node.target
        if target in _ELEMENTWISE_FUNCTIONS:
            return layout
        if target in _MAP_FUNCTIONS:
            return layout if layout.is_map and not node.kwargs.get("return_indices") else None
        name = _RESHAPING_FUNCTIONS.get(target)
    else:
        if node.target in _ELEMENTWISE_METHODS:
            return layout
        name = str(node.target) if node.target in _RESHAPING_METHODS else None
    if name is None or not node.args or node.args[0] is not source:
        return None
    args, options = node.args[1:], dict(node.kwargs)
    options.pop("dtype", None)
    if name in ("reshape", "view"):
        return _viewed(layout, args[0] if len(args) == 1 else args, batch_sizes) if not options else None
    if name == "pad":
        return _padded(layout, args[0] if args else options.get("pad"))
    if name == "flatten":
        start = args[0] if args else options.get("start_dim", 0)
        return flattened(layout, start, args[1] if len(args) > 1 else options.get("end_dim", -1))
    if name == "permute":
        return _permuted(layout, options.get("dims", args[0] if len(args) == 1 else args))
    dims = options.get("dim", args[0] if args else None)
    keeps = name == "mean" and options.get("keepdim", args[1] if len(args) > 1 else False)
    # What is squeezed is taken to be of size 1: otherwise there was nothing to squeeze.
    return _without(layout, dims, keeps) if isinstance(keeps, bool) else None


def _viewed(layout: Layout, shape: Any, batch_sizes: set[fx.Node]) -> Layout | None:
    """`x.view(x.size(0), -1)` flattens; what other shapes do depends on sizes that are not known here."""
    if layout.axis != 1 or not isinstance(shape, (tuple, list)) or len(shape) != 2 or shape[1] != -1:
        return None
    return flattened(layout, 1, -1) if isinstance(shape[0], fx.Node) and shape[0] in batch_sizes else None


def flattened(layout: Layout, start: Any, end: Any) -> Layout | None:
    """The layout once dimensions `start` to `end` are one; None where its channels cannot be told then."""
    if layout.axis != 1 or layout.rank is None or not isinstance(start, int) or not isinstance(end, int):
        return None
    first, last = start % layout.rank, end % layout.rank
    if first < 1 or last < first:
        return None
    return Layout(1, layout.rank - (last - first), layout.flat or (first == 1 and last > 1))


def _padded(layout: Layout, pads: Any) -> Layout | None:
    """Padding counts from the last dimension, two numbers each."""
    if layout.axis != 1 or layout.rank is None or not isinstance(pads, (tuple, list)):
        return None
    return layout if len(pads) <= 2 * (layout.rank - 2) else None


def _permuted(layout: Layout, dims: Any) -> Layout | None:
    if layout.rank is None or not isinstance(dims, (tuple, list)) or not all(isinstance(dim, int) for dim in dims):
        return None
    places = [dim % layout.rank for dim in dims]
    axis = layout.rank - 1 if layout.axis == -1 else layout.axis
    stays = len(places) == layout.rank and axis is not None and places[0] == 0 and places[axis] == axis
    return layout if stays else None


def _without(layout: Layout, dims: Any, keeps: bool) -> Layout | None:
    """After a mean over `dims`, or with them squeezed out."""
    dims = [dims] if isinstance(dims, int) else dims
    if layout.axis != 1 or layout.rank is None or not isinstance(dims, (tuple, list)) or not dims:
        return None  # without dims: over all of them
    if not all(isinstance(dim, int) for dim in dims):
        return None
    places = {dim % layout.rank for dim in dims}
    if places & {0, 1}:
        return None
    return layout if keeps else replace(layout, rank=layout.rank - len(places))
