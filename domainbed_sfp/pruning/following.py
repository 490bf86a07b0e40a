"""Channels followed through a network's traced graph: which layers produce, carry and read them."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx, nn

from domainbed_sfp.networks.channel_gates import ChannelGate
from domainbed_sfp.networks.introspection import uses_weight_as_is
from domainbed_sfp.pruning.layouts import MAP, UNKNOWN, Layout, after_call, flattened

# By exact class: the same package holds Softmax, GLU and attention, which mix channels.
_ELEMENTWISE_MODULES = {
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU,
    nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.RReLU, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink,
    nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.AlphaDropout, nn.FeatureAlphaDropout,
}  # fmt: skip
# Channel by channel on maps [N, C, H, W].
_MAP_MODULES = {nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.LPPool2d, nn.MaxPool2d}
# Tell about a tensor without passing its contents on.
_FACTS = {"shape", "ndim", "dtype", "device"}
_FACT_METHODS = {"size", "dim"}
_JOINS = {operator.add, operator.iadd, torch.add, operator.mul, operator.imul, torch.mul}
_JOIN_METHODS = {"add", "add_", "mul", "mul_"}
_ADDITIONS = {operator.add, operator.iadd, torch.add}


@dataclass(eq=False)
class Stream:
    """A set of channels while the graph is being followed."""

    channels: int | None = None
    name: str = ""
    filters: list[str] = field(default_factory=list)
    vectors: list[str] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)
    is_residual: bool = False
    whole: bool = False  # must not be pruned: network input, or something we cannot follow

    def absorb(self, other: Stream) -> None:
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


class Follower:
    """Walks a traced graph and joins the channels that must live and die together.

    What it does not know for certain to leave channels in their place makes them stay whole.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.root = root
        self.modules = dict(root.named_modules())
        self.stream_of: dict[fx.Node, Stream] = {}
        self.layout_of: dict[fx.Node, Layout] = {}
        self.order: list[Stream] = []
        self.output: fx.Node | None = None
        # Numbers of the graph: shapes of tensors whose batch is known to come first, and the sizes of that batch.
        self.shapes: set[fx.Node] = set()
        self.batch_sizes: set[fx.Node] = set()
        self.uses = Counter(id(parameter) for node in graph.nodes for parameter in self._parameters(node))

    def streams(self) -> list[Stream]:
        alive = {id(stream) for stream in self.stream_of.values()}
        return [stream for stream in self.order if id(stream) in alive]

    def visit(self, node: fx.Node) -> None:
        inputs = [arg for arg in node.all_input_nodes if arg in self.stream_of]
        if node.op == "placeholder":
            self._place(node, self._new(whole=True), MAP)
        elif node.op == "output":
            self._visit_output(node, inputs)
        elif self._is_fact(node):
            self._note_fact(node)
        elif node.op == "call_module":
            self._visit_module(node, self.modules[str(node.target)], inputs)
        elif self._is_join(node) and inputs:
            self._visit_join(node, inputs)
        elif inputs:
            layout = (
                after_call(node, inputs[0], self.layout_of[inputs[0]], self.batch_sizes) if len(inputs) == 1 else None
            )
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
            self._place(node, stream, Layout(last, layout.rank))
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
        elif isinstance(module, nn.Flatten) and (flat := flattened(layout, module.start_dim, module.end_dim)):
            self._place(node, source, flat)
        else:
            self._give_up(node, inputs)

    def _visit_convolution(self, node: fx.Node, name: str, module: nn.Conv2d, source: Stream, layout: Layout) -> None:
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
        self._place(node, stream, MAP)

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

    def _spreads(self, value: object, stream: Stream, layout: Layout) -> bool:
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
    def _read(source: Stream, name: str, module: nn.Conv2d | nn.Linear, layout: Layout) -> None:
        """Notes a reader, if what it reads is the stream's channels."""
        if isinstance(module, nn.Conv2d):
            fits = layout.is_map and module.in_channels == source.channels
        elif source.channels and layout.flat:
            fits = layout.ends_with_channels and module.in_features % source.channels == 0
        else:
            fits = layout.ends_with_channels and module.in_features == source.channels
        source.readers.append(name)
        source.whole = source.whole or not fits

    def _produced(self, name: str, module: nn.Conv2d | nn.Linear, channels: int) -> Stream:
        stream = self._new(name=name, channels=channels)
        stream.filters.append(f"{name}.weight")
        self._add_bias(stream, name, module)
        return stream

    @staticmethod
    def _add_bias(stream: Stream, name: str, module: nn.Conv2d | nn.Linear) -> None:
        if module.bias is not None:
            stream.vectors.append(f"{name}.bias")

    def _new(self, **values: object) -> Stream:
        stream = Stream(**values)  # type: ignore[arg-type]
        self.order.append(stream)
        return stream

    def _place(self, node: fx.Node, stream: Stream, layout: Layout) -> None:
        self.stream_of[node] = stream
        self.layout_of[node] = layout

    def _join(self, streams: list[Stream]) -> Stream:
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
        self._place(node, self._new(whole=True), UNKNOWN)

    def _note_fact(self, node: fx.Node) -> None:
        source, *rest = node.args
        if not isinstance(source, fx.Node):
            return
        if source in self.shapes:
            if rest == [0]:
                self.batch_sizes.add(node)
        elif self.layout_of.get(source, UNKNOWN).axis is not None:
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
