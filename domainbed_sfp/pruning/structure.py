"""Which channels of a network belong together, found by following them through its traced graph.

Removing a channel of a convolution touches everything that carries it: the normalization behind it, depthwise
convolutions, the layers that read it, and, across an addition, the other branch. Channels joined by an addition
are a residual stream, which stays whole.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import fx, nn

from domainbed_sfp.errors import UserError


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that live and die together.

    filters: weights [channels, ...] of the convolutions that produce or carry them, by parameter name.
    vectors: biases and normalization weights [channels].
    readers: weights [out, channels * k, ...] of the layers that read them.
    """

    name: str
    channels: int
    filters: tuple[str, ...]
    vectors: tuple[str, ...]
    readers: tuple[str, ...]


@dataclass
class _Stream:
    """A set of channels while the graph is being followed."""

    channels: int | None = None
    name: str = ""
    filters: list[str] = field(default_factory=list)
    vectors: list[str] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)
    whole: bool = False  # must not be pruned: network input, residual stream, or something we cannot follow

    def absorb(self, other: _Stream) -> None:
        self.channels = self.channels or other.channels
        self.name = self.name or other.name
        for mine, theirs in (
            (self.filters, other.filters),
            (self.vectors, other.vectors),
            (self.readers, other.readers),
        ):
            mine.extend(theirs)
        self.whole = self.whole or other.whole


class _LayerTracer(fx.Tracer):
    """Traces down to layers that own channels, whatever package defines them."""

    LAYERS = (nn.Conv2d, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)

    def __init__(self, method: str) -> None:
        super().__init__()
        self.traced_func_name = method

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, self.LAYERS) or super().is_leaf_module(module, qualified_name)


# What leaves every channel in its place.
_CHANNELWISE_FUNCTIONS = {
    F.relu, F.relu6, F.silu, F.gelu, F.hardswish, F.hardsigmoid, F.sigmoid, F.leaky_relu, F.elu, F.dropout, F.pad,
    F.adaptive_avg_pool2d, F.avg_pool2d, F.max_pool2d, F.interpolate, torch.relu, torch.sigmoid, torch.flatten,
    torch.mean, getattr,
}  # fmt: skip
_CHANNELWISE_METHODS = {
    "relu", "relu_", "sigmoid", "flatten", "mean", "view", "reshape", "contiguous", "float", "to", "clone", "squeeze",
}  # fmt: skip
_CHANNELWISE_PACKAGES = ("torch.nn.modules.activation", "torch.nn.modules.pooling", "torch.nn.modules.dropout",
                         "torch.nn.modules.linear", "torch.nn.modules.flatten")  # fmt: skip
_JOINS = {operator.add, operator.iadd, torch.add, operator.mul, operator.imul, torch.mul}
_JOIN_METHODS = {"add", "add_", "mul", "mul_"}
_ADDITIONS = {operator.add, operator.iadd, torch.add}


def channel_groups(featurizer: nn.Module, classifier: nn.Module, method: str = "features") -> list[ChannelGroup]:
    """The groups of channels that structured pruning may remove, in the order of the network.

    Args:
        featurizer: the network body; its `method` is traced. Parameter names get the prefix `featurizer.`.
        classifier: reads the features; its first linear layer is the reader of the last channels.

    Raises:
        UserError: if the network cannot be traced, or holds no channel that may be removed.
    """
    try:
        graph = _LayerTracer(method).trace(featurizer)
    except Exception as error:
        raise UserError(
            f"granularity 'channel' needs a network that torch.fx can trace, and {type(featurizer).__name__} is not "
            f"({type(error).__name__}: {error}); choose granularity 'weight' or another backbone"
        ) from error
    follower = _Follower(featurizer)
    for node in graph.nodes:
        follower.visit(node)
    heads = [name for name, layer in classifier.named_modules() if isinstance(layer, nn.Linear)]
    for stream in follower.outputs:
        stream.readers.append(f"classifier.{heads[0]}.weight" if heads[0] else "classifier.weight")
    groups = [
        ChannelGroup(s.name, s.channels or 0, tuple(s.filters), tuple(s.vectors), tuple(s.readers))
        for s in follower.streams()
        if s.filters and not s.whole and s.readers
    ]
    if not groups:
        raise UserError(f"{type(featurizer).__name__} has no channels that pruning could remove")
    return groups


class _Follower:
    """Walks a traced graph and joins the channels that must live and die together."""

    def __init__(self, root: nn.Module) -> None:
        self.modules = dict(root.named_modules())
        self.stream_of: dict[fx.Node, _Stream] = {}
        self.order: list[_Stream] = []
        self.outputs: list[_Stream] = []

    def streams(self) -> list[_Stream]:
        alive = {id(stream) for stream in self.stream_of.values()}
        return [stream for stream in self.order if id(stream) in alive]

    def visit(self, node: fx.Node) -> None:
        inputs = [arg for arg in node.all_input_nodes if arg in self.stream_of]
        if node.op == "placeholder":
            self.stream_of[node] = self._new(whole=True)
        elif node.op == "output":
            self.outputs = [self.stream_of[arg] for arg in inputs]
        elif node.op == "call_module":
            self._visit_module(node, self.modules[str(node.target)], self.stream_of[inputs[0]])
        elif self._is_join(node) and len(inputs) > 1:
            stream = self._join([self.stream_of[arg] for arg in inputs])
            stream.whole = stream.whole or self._is_addition(node)
            self.stream_of[node] = stream
        elif inputs and (self._keeps_channels(node) or (self._is_join(node) and len(inputs) == 1)):
            self.stream_of[node] = self.stream_of[inputs[0]]
        elif inputs:
            self._give_up(node, [self.stream_of[arg] for arg in inputs])

    def _visit_module(self, node: fx.Node, module: nn.Module, source: _Stream) -> None:
        name = f"featurizer.{node.target}"
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            source.readers.append(f"{name}.weight")
            self.stream_of[node] = self._produced(name, module, module.out_channels)
        elif isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels:
            source.filters.append(f"{name}.weight")
            self._add_bias(source, name, module)
            self.stream_of[node] = source
        elif isinstance(module, nn.Conv2d):  # grouped: its groups would have to shrink alike
            source.whole = True
            self.stream_of[node] = self._produced(name, module, module.out_channels)
            self.stream_of[node].whole = True
        elif isinstance(module, nn.Linear):
            source.readers.append(f"{name}.weight")
            self.stream_of[node] = self._produced(name, module, module.out_features)
        elif isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)):
            if module.affine:
                source.vectors += [f"{name}.weight", f"{name}.bias"]
            else:
                source.whole = True  # nothing to silence a dead channel with
            self.stream_of[node] = source
        elif type(module).__module__.startswith(_CHANNELWISE_PACKAGES):
            self.stream_of[node] = source
        else:
            self._give_up(node, [source])

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

    def _join(self, streams: list[_Stream]) -> _Stream:
        first = streams[0]
        for other in streams[1:]:
            if other is not first:
                first.absorb(other)
                for node, stream in self.stream_of.items():
                    if stream is other:
                        self.stream_of[node] = first
        return first

    def _give_up(self, node: fx.Node, sources: list[_Stream]) -> None:
        for stream in sources:
            stream.whole = True
        self.stream_of[node] = self._new(whole=True)

    @staticmethod
    def _is_join(node: fx.Node) -> bool:
        return node.target in _JOINS if node.op == "call_function" else node.target in _JOIN_METHODS

    @staticmethod
    def _is_addition(node: fx.Node) -> bool:
        return node.target in _ADDITIONS or node.target in ("add", "add_")

    @staticmethod
    def _keeps_channels(node: fx.Node) -> bool:
        if node.op == "call_function":
            return node.target in _CHANNELWISE_FUNCTIONS
        return node.op == "call_method" and node.target in _CHANNELWISE_METHODS
