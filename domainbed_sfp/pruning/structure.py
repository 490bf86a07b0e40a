"""Which channels of a network belong together, found by following them through its traced graph.

Removing a channel of a convolution touches everything that carries it: the normalization behind it, depthwise
convolutions, the layers that read it, and, across an addition, the other branch. Channels joined by an addition
are a residual stream, which stays whole unless asked.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.networks.channel_gates import ChannelGate
from domainbed_sfp.networks.introspection import LayerTracer, uses_weight_as_is


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that live and die together.

    filters: weights [channels, ...] of the convolutions that produce or carry them, by parameter name, and of gates.
    vectors: biases and normalization weights [channels].
    readers: weights [out, channels * k, ...] of the layers that read them, in the order of the network.
    is_residual: whether additions join several layers that produce them: a residual stream.
    """

    name: str
    channels: int
    filters: tuple[str, ...]
    vectors: tuple[str, ...]
    readers: tuple[str, ...]
    is_residual: bool = False


@dataclass(eq=False)
class _Stream:
    """A set of channels while the graph is being followed."""

    channels: int | None = None
    name: str = ""
    filters: list[str] = field(default_factory=list)
    vectors: list[str] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)
    is_residual: bool = False
    whole: bool = False  # must not be pruned: network input, or something we cannot follow

    def absorb(self, other: _Stream) -> None:
        self.channels = self.channels or other.channels
        self.name = self.name or other.name
        for mine, theirs in (
            (self.filters, other.filters),
            (self.vectors, other.vectors),
            (self.readers, other.readers),
        ):
            mine.extend(theirs)
        self.is_residual = self.is_residual or other.is_residual
        self.whole = self.whole or other.whole


@dataclass(frozen=True)
class _Layout:
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


_UNKNOWN = _Layout()
_MAP = _Layout(axis=1, rank=4)


# Element by element, wherever the channels are.
_ELEMENTWISE_FUNCTIONS = {
    F.relu, F.relu6, F.silu, F.gelu, F.hardswish, F.hardsigmoid, F.sigmoid, F.leaky_relu, F.elu, F.dropout, torch.relu,
    torch.sigmoid,
}  # fmt: skip
_ELEMENTWISE_METHODS = {"relu", "relu_", "sigmoid", "contiguous", "float", "to", "clone"}
# By exact class: the same package holds Softmax, GLU and attention, which mix channels.
_ELEMENTWISE_MODULES = {
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU,
    nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.RReLU, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink,
    nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.AlphaDropout, nn.FeatureAlphaDropout,
}  # fmt: skip
# Channel by channel on maps [N, C, H, W].
_MAP_FUNCTIONS = {F.adaptive_avg_pool2d, F.avg_pool2d, F.max_pool2d, F.interpolate}
_MAP_MODULES = {nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.LPPool2d, nn.MaxPool2d}
# May move or reduce dimensions: whether the channels stay depends on the arguments.
_RESHAPING_FUNCTIONS = {
    F.pad: "pad", torch.flatten: "flatten", torch.mean: "mean", torch.permute: "permute", torch.reshape: "reshape",
    torch.squeeze: "squeeze",
}  # fmt: skip
_RESHAPING_METHODS = {"flatten", "mean", "permute", "reshape", "squeeze", "view"}
# Tell about a tensor without passing its contents on.
_FACTS = {"shape", "ndim", "dtype", "device"}
_FACT_METHODS = {"size", "dim"}
_JOINS = {operator.add, operator.iadd, torch.add, operator.mul, operator.imul, torch.mul}
_JOIN_METHODS = {"add", "add_", "mul", "mul_"}
_ADDITIONS = {operator.add, operator.iadd, torch.add}


def channel_groups(
    featurizer: nn.Module, classifier: nn.Module, method: str = "features", residual_streams: bool = False
) -> list[ChannelGroup]:
    """The groups of channels that structured pruning may remove, in the order of the network.

    Args:
        featurizer: the network body; its `method` is traced. Parameter names get the prefix `featurizer.`.
        classifier: reads the features; its first linear layer is the reader of the last channels.
        residual_streams: whether residual streams are among them.

    Raises:
        UserError: if the network cannot be traced, or holds no channel that may be removed.
    """
    graph = _trace(featurizer, method)
    follower = _Follower(featurizer, graph)
    for node in graph.nodes:
        follower.visit(node)
    follower.read_output(classifier)
    groups = [
        ChannelGroup(s.name, s.channels or 0, tuple(s.filters), tuple(s.vectors), tuple(s.readers), s.is_residual)
        for s in follower.streams()
        if s.filters and not s.whole and s.readers and (residual_streams or not s.is_residual)
    ]
    if not groups:
        raise UserError(f"{type(featurizer).__name__} has no channels that pruning could remove")
    return groups


def layers_in_order(featurizer: nn.Module, method: str = "features") -> list[str]:
    """The names of the layers of `featurizer`, in the order of their calls. UserError if it cannot be traced."""
    return [str(node.target) for node in _trace(featurizer, method).nodes if node.op == "call_module"]


def _trace(featurizer: nn.Module, method: str) -> fx.Graph:
    try:
        return LayerTracer(method).trace(featurizer)
    except Exception as error:
        raise UserError(
            f"granularity 'channel' needs a network that torch.fx can trace, and {type(featurizer).__name__} is not "
            f"({type(error).__name__}: {error}); choose another backbone or, if the method has it, granularity 'weight'"
        ) from error


class _Follower:
    """Walks a traced graph and joins the channels that must live and die together.

    What it does not know for certain to leave channels in their place makes them stay whole.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.root = root
        self.modules = dict(root.named_modules())
        self.stream_of: dict[fx.Node, _Stream] = {}
        self.layout_of: dict[fx.Node, _Layout] = {}
        self.order: list[_Stream] = []
        self.output: fx.Node | None = None
        # Numbers of the graph: shapes of tensors whose batch is known to come first, and the sizes of that batch.
        self.shapes: set[fx.Node] = set()
        self.batch_sizes: set[fx.Node] = set()
        self.uses = Counter(id(parameter) for node in graph.nodes for parameter in self._parameters(node))

    def streams(self) -> list[_Stream]:
        alive = {id(stream) for stream in self.stream_of.values()}
        return [stream for stream in self.order if id(stream) in alive]

    def visit(self, node: fx.Node) -> None:
        inputs = [arg for arg in node.all_input_nodes if arg in self.stream_of]
        if node.op == "placeholder":
            self._place(node, self._new(whole=True), _MAP)
        elif node.op == "output":
            self._visit_output(node, inputs)
        elif self._is_fact(node):
            self._note_fact(node)
        elif node.op == "call_module":
            self._visit_module(node, self.modules[str(node.target)], inputs)
        elif self._is_join(node) and inputs:
            self._visit_join(node, inputs)
        elif inputs:
            layout = self._layout_after(node, inputs[0]) if len(inputs) == 1 else None
            if layout is None:
                self._give_up(node, inputs)
            else:
                self._place(node, self.stream_of[inputs[0]], layout)

    def read_output(self, classifier: nn.Module) -> None:
        """Makes the classifier's first linear layer the reader of the features."""
        if self.output is None:
            return
        stream, layout = self.stream_of[self.output], self.layout_of[self.output]
        head = next(((name, layer) for name, layer in classifier.named_modules() if isinstance(layer, nn.Linear)), None)
        if head is None or not uses_weight_as_is(head[1]):
            stream.whole = True
            return
        name, layer = head
        self._read(stream, f"classifier.{name}.weight" if name else "classifier.weight", layer, layout)

    def _visit_output(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        result = node.args[0]
        if isinstance(result, fx.Node) and result in self.stream_of:
            self.output = result
        else:  # several results: what reads them is not known
            for arg in inputs:
                self.stream_of[arg].whole = True

    def _visit_module(self, node: fx.Node, module: nn.Module, inputs: list[fx.Node]) -> None:
        # A weight used in two places would have to lose the same channels in both.
        if len(inputs) != 1 or any(self.uses[id(parameter)] > 1 for parameter in module.parameters()):
            self._give_up(node, inputs)
            return
        name = f"featurizer.{node.target}"
        source, layout = self.stream_of[inputs[0]], self.layout_of[inputs[0]]
        if isinstance(module, nn.Conv2d):
            self._visit_convolution(node, name, module, source, layout)
        elif isinstance(module, nn.Linear):
            last = 1 if layout.rank == 2 else -1
            stream = self._produced(name, module, module.out_features)
            if uses_weight_as_is(module):
                self._read(source, f"{name}.weight", module, layout)
            else:
                source.whole = stream.whole = True
            self._place(node, stream, _Layout(last, layout.rank))
        elif isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)):
            size = module.num_channels if isinstance(module, nn.GroupNorm) else module.num_features
            if layout.axis != 1 or size != source.channels:
                self._give_up(node, inputs)
                return
            if module.weight is None:
                source.whole = True  # nothing to silence a dead channel with
            else:
                source.vectors += [f"{name}.{part}" for part in ("weight", "bias") if getattr(module, part) is not None]
            self._place(node, source, layout)
        elif isinstance(module, ChannelGate) and layout.is_map and module.expand.out_features == source.channels:
            source.filters.append(f"{name}.expand.weight")
            source.vectors.append(f"{name}.expand.bias")
            source.readers.append(f"{name}.reduce.weight")
            self._place(node, source, layout)
        elif type(module) in _ELEMENTWISE_MODULES or (type(module) in _MAP_MODULES and layout.is_map):
            if getattr(module, "return_indices", False):
                self._give_up(node, inputs)  # two results
            else:
                self._place(node, source, layout)
        elif isinstance(module, nn.Flatten) and (flat := _flattened(layout, module.start_dim, module.end_dim)):
            self._place(node, source, flat)
        else:
            self._give_up(node, inputs)

    def _visit_convolution(self, node: fx.Node, name: str, module: nn.Conv2d, source: _Stream, layout: _Layout) -> None:
        plain = uses_weight_as_is(module)
        fits = layout.is_map and module.in_channels == source.channels
        if plain and fits and 1 < module.groups == module.in_channels == module.out_channels:
            source.filters.append(f"{name}.weight")
            self._add_bias(source, name, module)
            self._place(node, source, layout)
            return
        stream = self._produced(name, module, module.out_channels)
        if plain and module.groups == 1:
            self._read(source, f"{name}.weight", module, layout)
        else:  # a transformed weight, or groups, which would have to shrink alike
            source.whole = stream.whole = True
        self._place(node, stream, _MAP)

    def _visit_join(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        """Sums and products, whose operands may be broadcast."""
        first = inputs[0]
        stream, layout = self.stream_of[first], self.layout_of[first]
        others = [arg for arg in (*node.args, *node.kwargs.values()) if arg not in inputs]
        alike = all(
            self.stream_of[arg].channels == stream.channels
            and self.layout_of[arg].axis == layout.axis
            and self.layout_of[arg].rank == layout.rank
            for arg in inputs
        )
        if layout.axis is None or not alike or not all(self._spreads(other, stream, layout) for other in others):
            self._give_up(node, inputs)
            return
        if len(inputs) > 1:
            stream = self._join([self.stream_of[arg] for arg in inputs])
            stream.is_residual = stream.is_residual or self._is_addition(node)
        self._place(node, stream, replace(layout, flat=any(self.layout_of[arg].flat for arg in inputs)))

    def _spreads(self, value: object, stream: _Stream, layout: _Layout) -> bool:
        """Whether an operand that is no stream leaves a stream's channels as many and where they are."""
        if not isinstance(value, fx.Node):
            return isinstance(value, (int, float))
        tensor = self._attribute(value)
        if not isinstance(tensor, Tensor) or layout.rank is None or tensor.dim() > layout.rank:
            return False
        behind = 1 if layout.axis == -1 else layout.rank - 1  # how far from the end the channels are
        size = tensor.shape[-behind] if tensor.dim() >= behind else 1
        return stream.channels is None or size in (1, stream.channels)

    @staticmethod
    def _read(source: _Stream, name: str, module: nn.Conv2d | nn.Linear, layout: _Layout) -> None:
        """Notes a reader, if what it reads is the stream's channels."""
        if isinstance(module, nn.Conv2d):
            fits = layout.is_map and module.in_channels == source.channels
        elif source.channels and layout.flat:
            fits = layout.ends_with_channels and module.in_features % source.channels == 0
        else:
            fits = layout.ends_with_channels and module.in_features == source.channels
        source.readers.append(name)
        source.whole = source.whole or not fits

    def _produced(self, name: str, module: nn.Conv2d | nn.Linear, channels: int) -> _Stream:
        stream = self._new(name=name, channels=channels)
        stream.filters.append(f"{name}.weight")
        self._add_bias(stream, name, module)
        return stream

    @staticmethod
    def _add_bias(stream: _Stream, name: str, module: nn.Conv2d | nn.Linear) -> None:
        if module.bias is not None:
            stream.vectors.append(f"{name}.bias")

    def _new(self, **values: object) -> _Stream:
        stream = _Stream(**values)  # type: ignore[arg-type]
        self.order.append(stream)
        return stream

    def _place(self, node: fx.Node, stream: _Stream, layout: _Layout) -> None:
        self.stream_of[node] = stream
        self.layout_of[node] = layout

    def _join(self, streams: list[_Stream]) -> _Stream:
        first = min(streams, key=self.order.index)  # a stream stands where its first layer does
        for other in streams:
            if other is not first:
                first.absorb(other)
                for node, stream in self.stream_of.items():
                    if stream is other:
                        self.stream_of[node] = first
        return first

    def _give_up(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        for arg in inputs:
            self.stream_of[arg].whole = True
        self._place(node, self._new(whole=True), _UNKNOWN)

    def _layout_after(self, node: fx.Node, source: fx.Node) -> _Layout | None:
        """The layout of a function's or method's result; None where its channels may not be where they were."""
        layout = self.layout_of[source]
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
            return self._viewed(layout, args[0] if len(args) == 1 else args) if not options else None
        if name == "pad":
            return _padded(layout, args[0] if args else options.get("pad"))
        if name == "flatten":
            start = args[0] if args else options.get("start_dim", 0)
            return _flattened(layout, start, args[1] if len(args) > 1 else options.get("end_dim", -1))
        if name == "permute":
            return _permuted(layout, options.get("dims", args[0] if len(args) == 1 else args))
        dims = options.get("dim", args[0] if args else None)
        keeps = name == "mean" and options.get("keepdim", args[1] if len(args) > 1 else False)
        # What is squeezed is taken to be of size 1: otherwise there was nothing to squeeze.
        return _without(layout, dims, keeps) if isinstance(keeps, bool) else None

    def _viewed(self, layout: _Layout, shape: Any) -> _Layout | None:
        """`x.view(x.size(0), -1)` flattens; what other shapes do depends on sizes that are not known here."""
        if layout.axis != 1 or not isinstance(shape, (tuple, list)) or len(shape) != 2 or shape[1] != -1:
            return None
        return _flattened(layout, 1, -1) if isinstance(shape[0], fx.Node) and shape[0] in self.batch_sizes else None

    def _note_fact(self, node: fx.Node) -> None:
        source, *rest = node.args
        if not isinstance(source, fx.Node):
            return
        if source in self.shapes:
            if rest == [0]:
                self.batch_sizes.add(node)
        elif self.layout_of.get(source, _UNKNOWN).axis is not None:
            if rest == ["shape"] or (node.target == "size" and not rest):
                self.shapes.add(node)
            elif node.target == "size" and rest == [0]:
                self.batch_sizes.add(node)

    def _is_fact(self, node: fx.Node) -> bool:
        if node.op == "call_method":
            return node.target in _FACT_METHODS and bool(node.args)
        if node.op != "call_function":
            return False
        source = node.args[0] if node.args else None
        if node.target is getattr:
            return node.args[1] in _FACTS
        return node.target is operator.getitem and isinstance(source, fx.Node) and source in self.shapes

    def _attribute(self, node: fx.Node) -> object:
        """The attribute of the network that a node reads, None if it reads none."""
        if node.op != "get_attr":
            return None
        owner, _, name = str(node.target).rpartition(".")
        return getattr(self.modules.get(owner), name, None)

    def _parameters(self, node: fx.Node) -> Iterable[nn.Parameter]:
        if node.op == "call_module":
            return self.modules[str(node.target)].parameters()
        value = self._attribute(node)
        return [value] if isinstance(value, nn.Parameter) else []

    @staticmethod
    def _is_join(node: fx.Node) -> bool:
        return node.target in _JOINS if node.op == "call_function" else node.target in _JOIN_METHODS

    @staticmethod
    def _is_addition(node: fx.Node) -> bool:
        return node.target in _ADDITIONS or node.target in ("add", "add_")


def _flattened(layout: _Layout, start: Any, end: Any) -> _Layout | None:
    if layout.axis != 1 or layout.rank is None or not isinstance(start, int) or not isinstance(end, int):
        return None
    first, last = start % layout.rank, end % layout.rank
    if first < 1 or last < first:
        return None
    return _Layout(1, layout.rank - (last - first), layout.flat or (first == 1 and last > 1))


def _padded(layout: _Layout, pads: Any) -> _Layout | None:
    """Padding counts from the last dimension, two numbers each."""
    if layout.axis != 1 or layout.rank is None or not isinstance(pads, (tuple, list)):
        return None
    return layout if len(pads) <= 2 * (layout.rank - 2) else None


def _permuted(layout: _Layout, dims: Any) -> _Layout | None:
    if layout.rank is None or not isinstance(dims, (tuple, list)) or not all(isinstance(dim, int) for dim in dims):
        return None
    places = [dim % layout.rank for dim in dims]
    axis = layout.rank - 1 if layout.axis == -1 else layout.axis
    stays = len(places) == layout.rank and axis is not None and places[0] == 0 and places[axis] == axis
    return layout if stays else None


def _without(layout: _Layout, dims: Any, keeps: bool) -> _Layout | None:
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
