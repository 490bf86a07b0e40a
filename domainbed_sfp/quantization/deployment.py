"""Networks as they are deployed: integers with their step sizes, no training weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from domainbed_sfp.quantization.layers import WIDEST_ONLY, Control, QuantizedLayer, run_by_width
from domainbed_sfp.quantization.policy import WIDTHS, Policy
from domainbed_sfp.quantization.quantizers import integer_range, to_integers


class DeployedLayer(nn.Module):
    """A layer with integer weights for each width that it uses, which gives the values of QuantizedLayer.

    Args:
        layer: gives the geometry and the bias; its weight is given up.
        widths: the bit-widths in use, ascending.
        integers: int8 [widths, *weight's shape].
        weight_steps: [widths], a weight is integer * step.
        input_steps: [widths], or None for a layer whose input is not quantized.
        signed: whether the input may be negative.
        policy: chooses among `widths`; None where there is one.
    """

    integers: Tensor
    weight_steps: Tensor
    input_steps: Tensor | None
    low: Tensor
    high: Tensor
    position: Tensor

    def __init__(
        self,
        layer: nn.Module,
        widths: Sequence[int],
        integers: Tensor,
        weight_steps: Tensor,
        input_steps: Tensor | None,
        signed: bool,
        policy: Policy | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        # The integers take its place; what is left of it is the name.
        self.layer.weight = nn.Parameter(torch.empty(0, device=integers.device), requires_grad=False)
        self.widths = tuple(widths)
        self.signed = signed
        self.policy = policy
        self.register_buffer("integers", integers)
        self.register_buffer("weight_steps", weight_steps)
        self.register_buffer("input_steps", input_steps)
        ranges = torch.tensor([integer_range(bits, signed) for bits in self.widths], device=integers.device).float()
        self.register_buffer("low", -ranges[:, 0], persistent=False)
        self.register_buffer("high", ranges[:, 1], persistent=False)
        # From a policy's positions in WIDTHS to ours.
        places = [self.widths.index(bits) if bits in self.widths else 0 for bits in WIDTHS]
        self.register_buffer("position", torch.tensor(places, device=integers.device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.policy is None:
            return self._run(self.quantize_input(x, None), self.weight(0))
        index = self.position[self.policy.most_probable(x).index]
        inputs = self.quantize_input(x, index)
        stack = self.integers * self.weight_steps.view(-1, *[1] * (self.integers.dim() - 1))
        return run_by_width(index, inputs, len(self.widths), lambda used: stack[used], self._run)

    def weight(self, position: int) -> Tensor:
        """The weights of one width as floating-point numbers."""
        return self.integers[position] * self.weight_steps[position]

    def quantize_input(self, x: Tensor, index: Tensor | None) -> Tensor:
        """`x` [N, ...] on the grid of the only width, or of the positions `index` [N]."""
        if self.input_steps is None:
            return x
        step, low, high = self.input_steps, self.low, self.high
        if index is not None:
            rows = (-1, *[1] * (x.dim() - 1))
            step, low, high = step[index].view(rows), low[index].view(rows), high[index].view(rows)
        return torch.clamp(x.float() / step, low, high).round() * step

    def _run(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional_call(self.layer, {"weight": weight}, (x,))


@torch.no_grad()
def deploy(network: nn.Module, control: Control) -> nn.Module:
    """A copy of a network of QuantizedLayers, in evaluation mode, that decides as they do in the control's mode.

    A layer whose policy may choose one width only, or does not look at its input, loses it.
    """
    listening, control.trace = control.trace, None
    try:
        deployed = copy.deepcopy(network).eval()
    finally:
        control.trace = listening
    for name, module in list(deployed.named_modules()):
        if isinstance(module, QuantizedLayer):
            replacement = _deployed_layer(module, control.mode)
            parent, _, attribute = name.rpartition(".")
            if name:
                setattr(deployed.get_submodule(parent), attribute, replacement)
            else:
                deployed = replacement
    return deployed


def _deployed_layer(module: QuantizedLayer, mode: str) -> DeployedLayer:
    policy = module.policy
    if policy is None or mode == WIDEST_ONLY:
        used, policy = [len(module.widths) - 1], None
    elif not policy.reads_input:
        anything = torch.zeros(1, policy.features, device=policy.bits.device)
        used, policy = policy.most_probable(anything).index.tolist(), None
    else:
        used = policy.allowed.nonzero().flatten().tolist()
        policy = policy if len(used) > 1 else None
    weight = module.layer.weight
    steps = module.weight_steps.steps()
    integers = torch.stack([to_integers(weight, steps[at], module.widths[at], True).to(torch.int8) for at in used])
    is_ready = module.input_steps.is_ready
    return DeployedLayer(
        module.layer,
        [module.widths[at] for at in used],
        integers,
        steps[used].clone(),
        module.input_steps.steps()[used].clone() if is_ready else None,
        bool(module.input_steps.signed),
        policy,
    )
