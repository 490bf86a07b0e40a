"""Layers that quantize their weights and their input, each sample with a bit-width of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.networks.introspection import uses_weight_as_is
from domainbed_sfp.quantization.policy import WIDTHS, Choice, Policy
from domainbed_sfp.quantization.quantizers import WIDEST, StepSizes

# What a policy-driven layer does with its policy.
WIDEST_ONLY, SAMPLED, SETTLED, MOST_PROBABLE = "widest only", "sampled", "settled", "most probable"

Trace = dict[str, list[Choice]]


@dataclass
class Control:
    """What the quantized layers of one network have in common.

    mode: one of the four above. trace: the choices made, by layer and in order, while somebody listens. independent:
    whether each sample draws for itself (see `policy.common_uniforms`). shifts: what is added to each layer's mu while
    widths are settled, in bits.
    """

    mode: str = MOST_PROBABLE
    independent: bool = False
    trace: Trace | None = field(default=None, repr=False)
    shifts: dict[str, float] = field(default_factory=dict, repr=False)

    @contextmanager
    def traced(self, mode: str | None = None) -> Iterator[Trace]:
        """Collects choices, and sets the mode meanwhile."""
        before = self.mode, self.trace
        self.mode, self.trace = mode or self.mode, {}
        try:
            yield self.trace
        finally:
            self.mode, self.trace = before


class QuantizedLayer(nn.Module):
    """A convolution or linear layer with weights and input quantized at the same width.

    A layer without a policy has one width. With one, the samples of a batch are sorted by their width and each group
    goes through the layer with the weights of its width: as many multiplications as the plain layer has, however many
    widths are in use. On CUDA the sizes of the groups must be known to the host, one wait a layer.

    The gradient of a choice (see `policy.straight_through`) is that of the error of the input, sample by sample, and of
    the error of the weights, of which a backward pass knows the sum over a group: each of its samples gets the mean.
    The product of the two errors is counted twice, as it belongs to the second order.

    Before the first training batch the input's step sizes are not known, and the input passes as it is.

    Args:
        layer: what is quantized, a Conv2d or Linear or a subclass; its parameters stay its own.
        name: under which `control` hears of its choices.
        control: shared by all layers of the network.
        bits: the width, for a layer without policy.
        policy: chooses among WIDTHS.
    """

    def __init__(
        self,
        layer: nn.Conv2d | nn.Linear,
        name: str,
        control: Control,
        bits: int = WIDEST,
        policy: Policy | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.name = name
        self.control = control
        self.widths = (bits,) if policy is None else WIDTHS
        self.weight_steps = StepSizes(self.widths, signed=True)
        self.weight_steps.initialise(layer.weight)
        self.input_steps = StepSizes(self.widths)
        self.policy = policy

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.input_steps.is_ready:
            self.input_steps.initialise(x)
        if self.policy is None or self.control.mode == WIDEST_ONLY:
            return self._run_alike(x, len(self.widths) - 1)
        if self.control.mode == SAMPLED:
            choice = self.policy.sample(x, self.control.independent)
        elif self.control.mode == SETTLED:
            choice = self.policy.settled(x, self.control.shifts[self.name])
        else:
            choice = self.policy.most_probable(x)
        if self.control.trace is not None:
            self.control.trace.setdefault(self.name, []).append(choice)
        inputs = self._quantize_input(x, choice.index, choice.coefficient)
        return run_by_width(choice.index, inputs, len(self.widths), lambda used: self._weights(used, choice), self._run)

    def start_widths(self) -> None:
        """Starts the step sizes of all widths from the weights as they are and from the next input."""
        self.weight_steps.initialise(self.layer.weight)
        self.input_steps.is_ready = False

    def _run_alike(self, x: Tensor, position: int) -> Tensor:
        index = torch.full((len(x),), position, device=x.device)
        weight = self.weight_steps.quantize(self.layer.weight[None], index[:1], self.layer.weight.numel())
        return self._run(self._quantize_input(x, index, None), weight[0])

    def _quantize_input(self, x: Tensor, index: Tensor, coefficient: Tensor | None) -> Tensor:
        if not self.input_steps.is_ready:
            return x
        # In full precision, whatever the network's arithmetic: bf16 has no eight bits to round.
        return self.input_steps.quantize(x.float(), index, x[0].numel(), coefficient)

    def _weights(self, used: Tensor, choice: Choice) -> Tensor:
        """The weights at each of the positions `used` [k]: [k, *weight.shape]."""
        weight = self.layer.weight
        coefficient = None
        if choice.coefficient is not None:
            ones = torch.zeros(len(self.widths), device=weight.device)
            sums = ones.index_add(0, choice.index, choice.coefficient)
            coefficient = sums[used] / torch.bincount(choice.index, minlength=len(self.widths))[used]
        rows = weight.expand(len(used), *weight.shape)
        return self.weight_steps.quantize(rows, used, weight.numel(), coefficient)

    def set_bits(self, bits: int) -> None:
        """Another width, for a layer without policy; its step sizes stay as they are."""
        assert self.policy is None
        self.widths = (bits,)
        for steps in (self.weight_steps, self.input_steps):
            steps.set_widths(self.widths)

    def _run(self, x: Tensor, weight: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            return functional_call(self.layer, {"weight": weight}, (x,))
        # In bf16 neither inputs nor weights would stay on the grid that is deployed.
        with torch.autocast(x.device.type, enabled=False):
            return functional_call(self.layer, {"weight": weight}, (x.float(),))


def run_by_width(
    index: Tensor,
    x: Tensor,
    widths: int,
    weights: Callable[[Tensor], Tensor],
    run: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Runs each sample of `x` [N, ...] with the weights of its position `index` [N], group by group.

    weights: from positions that occur [k] to their weights [k, ...]. run: from (samples, weight) to outputs.
    """
    counts = torch.bincount(index, minlength=widths).tolist()
    used = [position for position, count in enumerate(counts) if count]
    stack = weights(torch.tensor(used, device=index.device))
    if len(used) == 1:
        return run(x, stack[0])
    order = index.argsort(stable=True)
    groups = _Split.apply(x, order, [counts[position] for position in used])
    return _Join.apply(order.argsort(), *(run(group, weight) for group, weight in zip(groups, stack)))


class _Split(torch.autograd.Function):
    """x[order] for a permutation, as groups of the sizes given; each row is copied once, on the way back as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        ctx.save_for_backward(order.argsort())
        return tuple(_take_rows([x], part) for part in order.split(sizes))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return _take_rows(gradients, order), None, None


class _Join(torch.autograd.Function):
    """The rows of all groups, one behind the other, in the order given: the opposite of `_Split`."""

    @staticmethod
    def forward(ctx: Any, order: Tensor, *groups: Tensor) -> Tensor:
        ctx.sizes = [len(group) for group in groups]
        ctx.save_for_backward(order.argsort())
        first = groups[0]
        memory_format = torch.channels_last if _is_channels_last(first) else torch.contiguous_format
        # Not a view, as which autograd would forbid the activation behind to work in place.
        shape = (len(order), *first.shape[1:])
        joined = torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=memory_format)
        _take_rows(groups, order, out=joined)
        return joined

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        return None, *(_take_rows(gradients, part) for part in order.split(ctx.sizes))


def _take_rows(tensors: Sequence[Tensor], order: Tensor, out: Tensor | None = None) -> Tensor:
    """The rows `order` of the tensors laid one behind the other, in the memory format of the first; written to `out`,
    if given, which has that format, too."""
    is_channels_last = _is_channels_last(tensors[0])
    if is_channels_last:
        tensors = [x.permute(0, 2, 3, 1) for x in tensors]
        out = None if out is None else out.permute(0, 2, 3, 1)
    if order.device.type == "cpu":
        # Row by row: index_select takes twice as long for rows as large as feature maps.
        rows = [row for x in tensors for row in x.unbind()]
        taken = torch.stack([rows[i] for i in order.tolist()], out=out)
    else:
        joined = torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]
        taken = torch.index_select(joined, 0, order, out=out)
    return taken.permute(0, 3, 1, 2) if is_channels_last else taken


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def quantize_layers(
    root: nn.Module,
    names: Sequence[str],
    control: Control,
    make_policy: Callable[[nn.Module], Policy] | None,
    bits: int,
) -> dict[str, QuantizedLayer]:
    """Puts a QuantizedLayer in the place of each layer of `root` in `names`, which are in the order of execution.

    The first and the last have 8 bits; the others `bits`, or what the policy of each decides where there is one.
    Returns the new layers by the names of the old. Raises UserError where there is nothing between the first and the
    last.
    """
    if len(names) < 3:
        raise UserError(
            f"this network has nothing to quantize: the first layer and the classifier keep {WIDEST} bits, and between "
            f"them there is no convolution or linear layer (found: {', '.join(names) or 'none'})"
        )
    modules = dict(root.named_modules())
    layers = {}
    for name in names:
        layer = modules[name]
        assert isinstance(layer, (nn.Conv2d, nn.Linear))
        parent, _, attribute = name.rpartition(".")
        if not uses_weight_as_is(layer):
            raise UserError(
                f"layer {name} ({type(layer).__name__}) transforms its weight before it uses it, so that a quantized "
                "one would not stay on its grid; choose another backbone"
            )
        if isinstance(modules[parent], nn.MultiheadAttention):
            raise UserError(f"layer {name} is part of torch's MultiheadAttention, which quantization cannot reach into")
        inner = name not in (names[0], names[-1])
        policy = make_policy(layer) if inner and make_policy else None
        layers[name] = QuantizedLayer(layer, name, control, bits if inner else WIDEST, policy)
        setattr(modules[parent], attribute, layers[name])
    return layers


def input_features(layer: nn.Module) -> int:
    """The number of channels a layer reads."""
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels
    assert isinstance(layer, nn.Linear)
    return layer.in_features


def make_policy(layer: nn.Module, reads_input: bool = True) -> Policy:
    """A policy for what `layer` reads."""
    return Policy(input_features(layer), reads_input, channels_last=isinstance(layer, nn.Linear))


def mean_bits(trace: Mapping[str, Sequence[Choice]], bits: Tensor) -> Tensor:
    """Each sample's mean width over the layers with a policy, each counting alike: [N]."""
    return torch.stack([bits[torch.cat([choice.index for choice in choices])] for choices in trace.values()]).mean(0)
