"""Pruned networks as they are deployed: plain modules, dead channels gone, in one file that says how to rebuild them.

The file is safetensors: the tensors, and a JSON description in the header under `domainbed_sfp_export` (see
`Description`). Nothing of training is imported to load one, and nothing in the file is executed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from domainbed_sfp import networks
from domainbed_sfp.core import strict_json
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.networks.channel_gates import put_gate

HEADER = "domainbed_sfp_export"
FORMAT = 1

# Buffers of an input scaling, which no state dict holds because in training they follow from the hparams.
SCALING = ("featurizer.input_scale", "featurizer.input_shift")


class GroupNormOfSurvivors(nn.Module):
    """GroupNorm over channels of which some are gone, with the statistics that counted the gone ones as zeros.

    A channel that is zero still counts in the mean and variance of its group, so that a plain GroupNorm over the
    others would give other numbers. Groups may have kept unequal numbers of channels.

    Args:
        channels_per_group: how many channels each group had before.
        survivors: how many are left in each group, group by group; the channels of x come in this order.
        eps: added to the variance.
    """

    membership: Tensor
    absent: Tensor

    def __init__(self, channels_per_group: int, survivors: Sequence[int], eps: float) -> None:
        super().__init__()
        self.channels_per_group = channels_per_group
        self.survivors = tuple(survivors)
        self.eps = eps
        self.num_channels = sum(survivors)
        counts = torch.tensor(self.survivors)
        group_of = torch.repeat_interleave(torch.arange(len(counts)), counts)
        # [groups, channels]: 1 where a channel is of a group. Both follow from the arguments.
        membership = (group_of == torch.arange(len(counts)).unsqueeze(1)).float()
        self.register_buffer("membership", membership, persistent=False)
        self.register_buffer("absent", (channels_per_group - counts).float(), persistent=False)
        self.weight = nn.Parameter(torch.ones(self.num_channels))
        self.bias = nn.Parameter(torch.zeros(self.num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised x, of shape [N, channels, ...]."""
        positions = tuple(range(2, x.dim()))
        spread = (..., *[None] * len(positions))
        group_mean = x.mean(positions) @ self.membership.T / self.channels_per_group
        centred = x - (group_mean @ self.membership)[spread]
        # The gone channels, all zero, lie as far from the mean as the mean from zero.
        squares = centred.square().mean(positions) @ self.membership.T + self.absent * group_mean.square()
        scale = torch.rsqrt(squares / self.channels_per_group + self.eps) @ self.membership
        return centred * (scale * self.weight)[spread] + self.bias[spread]

    def extra_repr(self) -> str:
        return f"{self.channels_per_group} a group, left {list(self.survivors)}, eps={self.eps}"


class ExportedNetwork(nn.Module):
    """A featurizer and a classifier, and nothing else: normalised images [N, C, H, W] to logits [N, classes]."""

    def __init__(self, featurizer: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.featurizer = featurizer
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.featurizer(images))


@dataclass(frozen=True)
class Description:
    """What, with the tensors, rebuilds a network.

    backbone: its name, as in hparam `backbone`, never "auto". The widths of its layers are those of the tensors.
    input_shape: (channels, height, width).
    normalization: mean and std, per channel, with which pixels in [0, 1] are to be normalised; None where they enter
        as they are (the MNIST-like sets).
    group_norms: by name of a GroupNorm that lost channels, how many are left in each of its groups.
    gates: by name of a layer with a gate behind it, the gate's hidden width (see `channel_gates.put_gate`).
    origin: where the network comes from: algorithm, data set, versions, costs. Not needed to rebuild it.
    """

    backbone: str
    input_shape: tuple[int, ...]
    num_classes: int
    nonlinear_classifier: bool = False
    normalization: Mapping[str, Sequence[float]] | None = None
    group_norms: Mapping[str, Sequence[int]] = field(default_factory=dict)
    gates: Mapping[str, int] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Description:
        """Raises ValueError, KeyError or TypeError where the text is no description of this format."""
        values = strict_json.parse(text)
        if values.pop("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT}")
        known = {entry.name for entry in fields(cls)}
        found = cls(**{name: value for name, value in values.items() if name in known})
        sizes = [*found.input_shape, found.num_classes]
        hidden = list(found.gates.values())
        left = [count for counts in found.group_norms.values() for count in counts]
        if not isinstance(found.backbone, str) or len(sizes) != 4:
            raise ValueError("expected the name of a backbone, and an input shape of three numbers")
        if not all(type(size) is int and size >= 0 for size in (*sizes, *hidden, *left)) or 0 in (*sizes, *hidden):
            raise ValueError("expected whole numbers of channels, pixels and classes")
        return cls(**{**vars(found), "input_shape": tuple(found.input_shape)})


def to_bytes(network: ExportedNetwork, description: Description) -> bytes:
    """The contents of a file that `load` reads."""
    # Copies: safetensors refuses tensors that share memory.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in stored_tensors(network).items()}
    return save(tensors, metadata={HEADER: description.to_json()})


def stored_tensors(network: ExportedNetwork) -> dict[str, Tensor]:
    """The tensors of a network's file: its state dict, and the scaling of its inputs where it has one."""
    tensors = dict(network.state_dict())
    buffers = dict(network.named_buffers())
    return {**tensors, **{name: buffers[name] for name in SCALING if name in buffers}}


def load(path: str | os.PathLike[str]) -> nn.Module:
    """The network of a pruned network's file. Raises UserError as `files.load` does."""
    description, tensors = _read(path)
    try:
        return rebuild(description, tensors)
    except UserError as error:
        raise UserError(f"{str(path)!r}: {error}") from error


def read_description(path: str | os.PathLike[str]) -> Description:
    """What the file of a pruned network says about it. Raises UserError where it is no such file."""
    return _read(path)[0]


def rebuild(description: Description, tensors: Mapping[str, Tensor]) -> ExportedNetwork:
    """The network that a description and tensors make, in evaluation mode.

    Raises UserError where the tensors are not those of the backbone with some channels left out.
    """
    hparams = {"backbone": description.backbone, "weights": "none", "freeze_bn": False, "resnet_dropout": 0.0}
    with torch.random.fork_rng(devices=[]):  # initial weights are replaced: drawing them must not move a caller's seed
        featurizer = networks.make_featurizer(description.input_shape, hparams)
        classifier = networks.make_classifier(
            featurizer.n_outputs, description.num_classes, description.nonlinear_classifier
        )
        network = ExportedNetwork(featurizer, classifier)
        for name, width in description.gates.items():
            put_gate(network, name, width)
    for name, survivors in description.group_norms.items():
        replace_group_norm(network, name, survivors)
    tensors = dict(tensors)
    _set_scaling(network, [tensors.pop(name, None) for name in SCALING])
    for name, module in network.named_modules():
        _resize(module, {part: tensors.get(f"{name}.{part}") for part, _ in module.named_parameters(recurse=False)})
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"the tensors do not fit backbone {description.backbone!r}: {reason}") from error
    return network.eval().requires_grad_(False)


def replace_group_norm(network: nn.Module, name: str, survivors: Sequence[int]) -> None:
    """Puts a GroupNormOfSurvivors in the place of the GroupNorm `name`, with the same weight and bias where they are
    already as many as survivors. Raises UserError where there is no GroupNorm of that many groups."""
    try:
        old = network.get_submodule(name)
    except AttributeError:
        old = None
    if type(old) is not nn.GroupNorm or old.num_groups != len(survivors) or not old.affine:
        kind = "nothing of that name" if old is None else type(old).__name__
        raise UserError(f"channels can be left out of a GroupNorm of {len(survivors)} groups, {name!r} is {kind}")
    size = old.num_channels // old.num_groups
    if sum(survivors) == 0 or max(survivors) > size:
        raise UserError(f"GroupNorm {name!r} has {size} channels a group; {list(survivors)} cannot be left of them")
    # A GroupNorm keeps the number of channels it was made for where only its weights have been cut.
    new = GroupNormOfSurvivors(size, survivors, old.eps)
    for part in ("weight", "bias"):
        value = getattr(old, part)
        if value.shape == getattr(new, part).shape:
            setattr(new, part, nn.Parameter(value.detach().clone()))
    parent, _, own_name = name.rpartition(".")
    setattr(network.get_submodule(parent), own_name, new.train(old.training).to(old.weight.device))


def _set_scaling(network: ExportedNetwork, values: Sequence[Tensor | None]) -> None:
    """Gives the featurizer the scaling of the file: which one a backbone has depends on where its weights are from."""
    featurizer: Any = network.featurizer
    scale, shift = values
    if isinstance(featurizer, networks.ImageFeaturizer):
        featurizer.rescale = scale is not None and shift is not None
        featurizer.register_buffer("input_scale", scale, persistent=False)
        featurizer.register_buffer("input_shift", shift, persistent=False)


def _resize(module: nn.Module, tensors: Mapping[str, Tensor | None]) -> None:
    """Makes room in a layer for tensors of fewer channels. What it does not know stays, and will not fit."""
    weight, own = tensors.get("weight"), dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None or own is None or weight.shape == own.shape or weight.dim() != own.dim():
        return
    if any(size > most for size, most in zip(weight.shape, own.shape)):
        return
    if isinstance(module, nn.Conv2d):
        outputs, inputs = weight.shape[:2]
        if 1 < module.groups == module.in_channels == module.out_channels:
            module.groups = module.in_channels = outputs
        else:
            module.in_channels = inputs * module.groups
        module.out_channels = outputs
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.num_features = len(weight)
        for name in ("running_mean", "running_var"):
            if getattr(module, name) is not None:
                setattr(module, name, torch.empty(weight.shape))
    else:
        return
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(module, name, nn.Parameter(torch.empty_like(tensor)))


def _read(path: str | os.PathLike[str]) -> tuple[Description, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            description = Description.from_json(file.metadata()[HEADER])
            return description, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror or error}") from error
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{str(path)!r} is not a network exported by this package ({error})") from error
