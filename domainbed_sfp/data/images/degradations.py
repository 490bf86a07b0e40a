"""Images of poor quality: blur, noise, low contrast, low resolution and JPEG artefacts, in five severities.

Strengths of noise, contrast, JPEG and resizing are ImageNet-C's (Hendrycks and Dietterich, ICLR 2019, arXiv
1903.12261); blur is stated for images of up to 64 px and grows with the side beyond.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed_sfp.core.errors import unknown_name
from domainbed_sfp.data.images.augmentation import IMAGENET_MEAN, IMAGENET_STD

SEVERITIES = (1, 2, 3, 4, 5)

# Standard deviation in pixels of an image of up to BLUR_SIDE pixels.
BLUR = (0.4, 0.6, 0.9, 1.3, 1.8)
BLUR_SIDE = 64
# Standard deviation, of a range of 1.
NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)
# What is left of the difference to the image's mean.
CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)
# Side of the small copy, as a fraction.
RESIZE = (0.6, 0.5, 0.4, 0.3, 0.25)
JPEG_QUALITY = (25, 18, 15, 10, 7)


@dataclass(frozen=True)
class DegradationParameters:
    """The random choices for N samples, on the CPU.

    kind: int64 [N], positions in `KINDS`, or -1 for a sample left as it is. severity: int64 [N], 1 to 5. seed: of the
    noise.
    """

    kind: Tensor
    severity: Tensor
    seed: int


def draw_degradations(n: int, probability: float, seed: int) -> DegradationParameters:
    """Degrades each of `n` samples with `probability`, in a way and a severity drawn evenly; a function of `seed`."""
    generator = torch.Generator().manual_seed(seed)
    is_degraded = torch.rand(n, generator=generator) < probability
    kind = torch.randint(len(KINDS), (n,), generator=generator).masked_fill(~is_degraded, -1)
    severity = torch.randint(1, len(SEVERITIES) + 1, (n,), generator=generator)
    return DegradationParameters(kind, severity, seed)


@torch.no_grad()
def degrade_batch(x: Tensor, parameters: DegradationParameters, is_normalized: bool) -> Tensor:
    """A batch with some of its samples degraded; `x` is left as it was.

    Args:
        x: float [N, C, H, W], in [0, 1], or in ImageNet's units where `is_normalized` (three channels then):
            degradations act on what the camera saw, before normalisation.
    """
    out = x.clone()
    for position, kind in enumerate(KINDS):
        chosen = (parameters.kind == position).nonzero().flatten()
        if len(chosen):
            rows = chosen.to(x.device)
            pixels = _to_pixels(x[rows]) if is_normalized else x[rows]
            seed = parameters.seed + position
            pixels = degrade(pixels, kind, parameters.severity[chosen], torch.Generator().manual_seed(seed))
            out[rows] = _from_pixels(pixels) if is_normalized else pixels
    return out


@torch.no_grad()
def degrade(images: Tensor, kind: str, severity: Tensor, generator: torch.Generator) -> Tensor:
    """Images degraded in one way.

    Args:
        images: float [N, C, H, W] in [0, 1], any number of channels.
        kind: one of `KINDS`.
        severity: int64 [N] on the CPU, 1 to 5.
        generator: a CPU generator, from which noise is drawn.

    Returns:
        New images of the same shape, in [0, 1]. Raises UserError for an unknown kind.
    """
    if kind not in DEGRADATIONS:
        raise unknown_name("degradation", kind, KINDS)
    return DEGRADATIONS[kind](images, severity - 1, generator).clamp_(0, 1)


def degraded_copy(x: Tensor, kind: str, severity: int, is_normalized: bool, seed: int) -> Tensor:
    """All of a batch degraded in one way and severity; `x` and `is_normalized` as in `degrade_batch`."""
    if kind not in DEGRADATIONS:
        raise unknown_name("degradation", kind, KINDS)
    kinds = torch.full((len(x),), KINDS.index(kind))
    return degrade_batch(x, DegradationParameters(kinds, torch.full((len(x),), severity), seed), is_normalized)


def _to_pixels(x: Tensor) -> Tensor:
    mean, std = (x.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (x * std + mean).clamp_(0, 1)


def _from_pixels(x: Tensor) -> Tensor:
    mean, std = (x.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (x - mean) / std


def _strength(images: Tensor, table: tuple[float, ...], level: Tensor) -> Tensor:
    """Of each sample, [N, 1, 1, 1]."""
    return torch.tensor(table)[level].to(images.device).view(-1, 1, 1, 1)


def _blur(images: Tensor, level: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian, each sample with its own width; the border is repeated."""
    n, channels, height, width = images.shape
    sigma = _strength(images, BLUR, level) * max(1.0, max(height, width) / BLUR_SIDE)
    reach = int(3 * float(sigma.max()) + 0.5) or 1
    offsets = torch.arange(-reach, reach + 1, device=images.device)
    kernel = (-((offsets / sigma) ** 2) / 2).softmax(-1)  # [N, 1, 1, K]
    kernel = kernel.repeat_interleave(channels, dim=0)
    planes = images.reshape(1, n * channels, height, width)
    planes = F.pad(planes, (reach,) * 4, mode="replicate")
    planes = F.conv2d(planes, kernel, groups=n * channels)
    planes = F.conv2d(planes, kernel.transpose(2, 3), groups=n * channels)
    return planes.view(n, channels, height, width)


def _noise(images: Tensor, level: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(images.shape, generator=generator)
    return images + _strength(images, NOISE, level) * noise.to(images.device)


def _contrast(images: Tensor, level: Tensor, generator: torch.Generator) -> Tensor:
    """Towards each channel's mean, so that colours stay what they are."""
    mean = images.mean((2, 3), keepdim=True)
    return mean + _strength(images, CONTRAST, level) * (images - mean)


def _resize(images: Tensor, level: Tensor, generator: torch.Generator) -> Tensor:
    """Down with averaging, up again bilinearly."""
    out = torch.empty_like(images)
    size = images.shape[2:]
    for number in level.unique().tolist():
        rows = (level == number).nonzero().flatten().to(images.device)
        small = [max(1, round(side * RESIZE[number])) for side in size]
        reduced = F.interpolate(images[rows], small, mode="bilinear", antialias=True, align_corners=False)
        out[rows] = F.interpolate(reduced, size, mode="bilinear", align_corners=False)
    return out


def _jpeg(images: Tensor, level: Tensor, generator: torch.Generator) -> Tensor:
    """Through libjpeg, on the CPU: images of one or three channels as grey and RGB. JPEG knows no others; then each
    channel is a grey image of its own (which spares colours the coarser sampling they have in RGB)."""
    # Imported here because it takes as long as torch itself, and most commands degrade nothing.
    from torchvision.io import decode_jpeg, encode_jpeg

    levels = (images.nan_to_num() * 255).round().to(torch.uint8).cpu().contiguous()
    out = torch.empty_like(levels)
    for sample, number in enumerate(level.tolist()):
        parts = levels[sample].split(levels.shape[1] if levels.shape[1] in (1, 3) else 1)
        quality = JPEG_QUALITY[number]
        out[sample] = torch.cat([decode_jpeg(encode_jpeg(part.contiguous(), quality)) for part in parts])
    return out.to(images.device, images.dtype) / 255


Degradation = Callable[[Tensor, Tensor, torch.Generator], Tensor]

DEGRADATIONS: dict[str, Degradation] = {
    "blur": _blur,
    "noise": _noise,
    "contrast": _contrast,
    "resize": _resize,
    "jpeg": _jpeg,
}
KINDS = tuple(DEGRADATIONS)
