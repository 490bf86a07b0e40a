"""DomainBed's training transform for whole batches of uint8 tensors, on the device that trains.

Upstream runs this per file, on PIL images, in loader processes (`domainbed/datasets.py`,
MultipleEnvironmentImageFolder):

    RandomResizedCrop(size, scale=(0.7, 1.0)), RandomHorizontalFlip(), ColorJitter(0.3, 0.3, 0.3, 0.3),
    RandomGrayscale(0.1), ToTensor(), Normalize(ImageNet)

Here the same random choices are drawn per sample by `draw_parameters`, always on the CPU and from one
generator, and `augment` applies them. The colour operations follow PIL's integer arithmetic (truncated
blends, hue and saturation in 256 levels), because its truncation darkens an image by half a level per
operation and that belongs to upstream's distribution.

One difference remains. Upstream crops the original file and resizes the crop; we crop the cached image,
already resized to a square. The crop covers the same region but is resampled twice, which smooths it: the
mean step between neighbouring pixels is 7 % smaller for files of 128 pixels cached and trained at 224, 13 %
for 227 at 224, 15 to 20 % for photographs larger than the cache, 28 % for line drawings cached at half
their size. With a cache as large as the files, and `out_size` the network's, the difference is below 1 %.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

CROP_SCALE = (0.7, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
CROP_TRIES = 10
FLIP_PROBABILITY = 0.5
JITTER = 0.3
GREY_PROBABILITY = 0.1

# The columns of `AugmentationParameters.order` hold these positions, torchvision's own numbering.
JITTER_OPERATIONS = ("brightness", "contrast", "saturation", "hue")

# PIL's RGB -> L in 16-bit fixed point. The weighted sums stay below 2**24, so float32 holds them exactly.
GREY_WEIGHTS = (19595.0, 38470.0, 7471.0)
GREY_UNIT = 65536.0

# Red, green and blue lie below the value by clamp(slope * |hue - centre| + offset, 0, 1), hue in sextants.
HUE_TRAPEZIA = ((3.0, 2.0, 4.0), (-1.0, 1.0, 1.0), (2.0, -1.0, -1.0))

# On a CPU, samples are taken a few at a time so that the dozens of passes over them hit the L2 cache.
CPU_CHUNK_VALUES = 1_000_000


@dataclass(frozen=True)
class AugmentationParameters:
    """The random choices for N samples, one row each, on the CPU.

    crop: float64 [N, 4], left, top, width, height as fractions of the image.
    flip: bool [N], mirror left to right after the crop.
    brightness, contrast, saturation: float32 [N], PIL enhancement factors, 1 changes nothing.
    hue: float32 [N] in [-0.5, 0.5], fraction of the colour circle to turn by, 0 changes nothing.
    order: int64 [N, 4], column k is the k-th operation to apply, as its position in `JITTER_OPERATIONS`.
    grey: bool [N], end with a grey image.
    """

    crop: Tensor
    flip: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    order: Tensor
    grey: Tensor

    def __len__(self) -> int:
        return len(self.crop)

    def __getitem__(self, rows: slice | Tensor) -> AugmentationParameters:
        """The parameters of some samples; `rows` is a slice, a bool mask or a tensor of positions."""
        return AugmentationParameters(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


def join_parameters(parts: Sequence[AugmentationParameters]) -> AugmentationParameters:
    """The parameters of the samples of all parts, one after the other."""
    return AugmentationParameters(
        **{
            field.name: torch.cat([getattr(part, field.name) for part in parts])
            for field in fields(AugmentationParameters)
        }
    )


def normalize(images: Tensor) -> Tensor:
    """Upstream's evaluation transform after the resize: ToTensor and Normalize, equal to the last bit.

    Takes uint8 [N, 3, H, W] in any memory format, gives a contiguous float32 tensor of that shape on the
    same device. Raises ValueError for another dtype or shape.
    """
    _check_images(images)
    return _normalize_(images.to(torch.float32, memory_format=torch.contiguous_format, copy=True))


def draw_parameters(n: int, original_sizes: Tensor, generator: torch.Generator) -> AugmentationParameters:
    """Draws what upstream's training transform would draw for `n` files.

    `original_sizes` is an integer tensor [n, 2] with the width and height of each file before any resize:
    upstream picks the crop's area and aspect ratio in that frame, in whole pixels, and falls back to a
    central crop after ten tries that do not fit. `generator` is a CPU generator, whatever device trains, so
    that a run's augmentations are the same on every device and follow from the generator's state.

    Raises ValueError for a generator on another device, or sizes of the wrong shape, type or sign.
    """
    if generator.device.type != "cpu":
        raise ValueError(f"augmentation draws from a CPU generator, given one on {generator.device}")
    if tuple(original_sizes.shape) != (n, 2) or original_sizes.is_floating_point():
        raise ValueError(
            f"original_sizes must be an integer tensor [{n}, 2] of widths and heights, given "
            f"{original_sizes.dtype} {list(original_sizes.shape)}"
        )
    if n and int(original_sizes.min()) < 1:
        raise ValueError(f"original_sizes must be positive, given {int(original_sizes.min())}")

    def uniform(*columns: int) -> Tensor:
        return torch.rand(n, *columns, generator=generator, dtype=torch.float64)

    crop = _draw_crop(original_sizes.cpu().double(), uniform(CROP_TRIES), uniform(CROP_TRIES), uniform(2))
    factors = (1 - JITTER + 2 * JITTER * uniform(3)).float()
    return AugmentationParameters(
        crop=crop,
        flip=uniform() < FLIP_PROBABILITY,
        brightness=factors[:, 0],
        contrast=factors[:, 1],
        saturation=factors[:, 2],
        hue=(JITTER * (2 * uniform() - 1)).float(),
        order=uniform(len(JITTER_OPERATIONS)).argsort(dim=1, stable=True),
        grey=uniform() < GREY_PROBABILITY,
    )


@torch.no_grad()
def augment(images: Tensor, parameters: AugmentationParameters, out_size: int | None = None) -> Tensor:
    """Applies upstream's training transform with the given choices, and normalises.

    Takes uint8 [N, 3, S, S] in any memory format, on any device; gives contiguous float32 [N, 3, T, T] on
    that device, T being `out_size`, or S when it is None. A sample's result depends on its own row of
    `parameters` alone; `images` is left as it was. The crop is resampled as PIL's bilinear filter does, to
    one level of 255. T below S costs several times as much on a CPU, see `_filter`.

    Raises ValueError where images or parameters do not have these types and lengths.
    """
    _check_images(images)
    n, channels, height, width = images.shape
    if height != width:
        raise ValueError(f"augment takes square images [N, 3, S, S], given {list(images.shape)}")
    if len(parameters) != n:
        raise ValueError(f"{n} images were given with parameters for {len(parameters)}")
    size = width if out_size is None else out_size
    if size < 1:
        raise ValueError(f"out_size must be a positive integer, given {out_size}")

    output = torch.empty((n, channels, size, size), dtype=torch.float32, device=images.device)
    at_once = n if images.device.type != "cpu" else max(1, CPU_CHUNK_VALUES // (channels * size * size))
    scratch = _Scratch(min(at_once, n), size, images.device)
    for start in range(0, n, max(1, at_once)):
        rows = slice(start, start + at_once)
        chunk = parameters[rows]
        pixels = _crop(images[rows], chunk, size)
        _jitter_(pixels, chunk, scratch)
        for sample in chunk.grey.nonzero().flatten().tolist():
            _grey_(pixels[sample : sample + 1], scratch)
        _normalize_(pixels, out=output[rows])
    return output


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be a uint8 tensor [N, 3, H, W], given {images.dtype} {list(images.shape)}")


def _normalize_(pixels: Tensor, out: Tensor | None = None) -> Tensor:
    """float32 [N, 3, H, W] in 0..255 to ImageNet's units, in place; the last step writes to `out`."""
    mean, std = (_per_channel(values, pixels.device) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return torch.div(pixels.div_(255).sub_(mean), std, out=pixels if out is None else out)


@functools.cache
def _per_channel(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """Constants [3, 1, 1], kept on their device: each copy there would wait for the work queued on it."""
    return torch.tensor(values, device=device).view(3, 1, 1)


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`, without waiting for the work queued there."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _draw_crop(sizes: Tensor, area_draws: Tensor, ratio_draws: Tensor, place_draws: Tensor) -> Tensor:
    """RandomResizedCrop.get_params for all samples at once, as fractions [n, 4] of the original image.

    `sizes` float64 [n, 2]; the draws are uniform in [0, 1): [n, tries], [n, tries] and [n, 2].
    """
    image_width, image_height = sizes.unbind(1)
    low, high = CROP_SCALE
    area = (image_width * image_height)[:, None] * (low + (high - low) * area_draws)
    low, high = (math.log(ratio) for ratio in CROP_RATIO)
    ratio = torch.exp(low + (high - low) * ratio_draws)
    widths, heights = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (widths > 0) & (widths <= image_width[:, None]) & (heights > 0) & (heights <= image_height[:, None])
    first = fits.byte().argmax(dim=1, keepdim=True)
    found = fits.any(dim=1)

    # The fallback trims the longer side to the nearest allowed ratio and centres the crop.
    narrowest, widest = CROP_RATIO
    trimmed_width = torch.minimum(image_width, (image_height * widest).round())
    trimmed_height = torch.minimum(image_height, (image_width / narrowest).round())
    width = torch.where(found, widths.gather(1, first).squeeze(1), trimmed_width)
    height = torch.where(found, heights.gather(1, first).squeeze(1), trimmed_height)
    spare = torch.stack((image_width - width, image_height - height), dim=1)
    corner = torch.where(found[:, None], (place_draws * (spare + 1)).floor(), (spare / 2).floor())
    return torch.cat((corner, torch.stack((width, height), dim=1)), dim=1) / sizes.repeat(1, 2)


class _Scratch:
    """Buffers reused by all steps: fresh memory costs a CPU several times what the arithmetic does."""

    def __init__(self, n: int, size: int, device: torch.device) -> None:
        self.pixels = torch.empty((n, 3, size, size), device=device)
        self._planes = [torch.empty((n, 1, size, size), device=device) for _ in range(5)]

    def planes(self, n: int) -> list[Tensor]:
        return [plane[:n] for plane in self._planes]


def _crop(images: Tensor, parameters: AugmentationParameters, size: int) -> Tensor:
    """Crops, resizes and flips; float32 [n, 3, size, size] of whole numbers in 0..255."""
    side = images.shape[-1]
    steps = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    # [n, 2, .]: horizontal and vertical, in pixels of the given image, pixel k centred on k + 0.5.
    start, extent = parameters.crop[:, :2, None] * side, parameters.crop[:, 2:, None] * side
    centres = start + extent * steps
    centres[:, 0] = torch.where(parameters.flip[:, None], centres[:, 0].flip(1), centres[:, 0])
    source = images.to(torch.float32, memory_format=torch.contiguous_format)
    resample = _interpolate if size >= side else _filter
    return resample(source, start, extent, centres).round_()


def _interpolate(source: Tensor, start: Tensor, extent: Tensor, centres: Tensor) -> Tensor:
    """PIL's bilinear resize where no crop is shrunk: each centre lies between two pixels an axis."""
    side, size = source.shape[-1], centres.shape[-1]
    # PIL resizes the crop alone and never sees what lies beyond its outer pixels.
    first, last = start + 0.5, start + extent - 0.5
    centres = torch.minimum(torch.maximum(centres, first), torch.maximum(first, last))
    columns, rows = _send((2 * centres / side - 1).float(), source.device).unbind(1)
    grid = torch.empty((len(source), size, size, 2), device=source.device)
    grid[..., 0] = columns[:, None, :]
    grid[..., 1] = rows[:, :, None]
    return F.grid_sample(source, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _filter(source: Tensor, start: Tensor, extent: Tensor, centres: Tensor) -> Tensor:
    """PIL's bilinear resize in general: a triangle filter, as wide as an output pixel where it shrinks.

    As two matrix products it takes several times as long as `_interpolate`, where both apply.
    """
    side, size = source.shape[-1], centres.shape[-1]
    pixels = torch.arange(side, dtype=torch.float64) + 0.5
    # The crop's own pixels, and never none where it is thinner than one.
    inside = ((pixels - (start + extent / 2)).abs() <= (extent / 2).clamp_min(0.5)).float()
    slope = -1 / (extent / size).clamp_min(1)
    given = (centres, slope, inside, pixels)
    centres, slope, inside, pixels = (_send(values.float(), source.device) for values in given)
    weights = (centres[..., None] - pixels).abs_().mul_(slope[..., None]).add_(1).clamp_min_(0)
    weights.mul_(inside[:, :, None])
    weights.div_(weights.sum(dim=-1, keepdim=True))
    columns, rows = weights.unbind(1)
    narrowed = source.flatten(1, 2) @ columns.mT
    return rows[:, None] @ narrowed.view(-1, 3, side, size)


def _jitter_(pixels: Tensor, parameters: AugmentationParameters, scratch: _Scratch) -> None:
    """ColorJitter in place, each sample in its own order."""
    operations: tuple[Callable[[Tensor, Tensor, _Scratch], None], ...]
    operations = (_brightness_, _contrast_, _saturation_, _hue_)
    # PIL turns the hue by whole levels of 256.
    turn = (parameters.hue.double() * 255).trunc().remainder(256).float()
    factors = torch.stack((parameters.brightness, parameters.contrast, parameters.saturation, turn))
    factors = _send(factors, pixels.device)[:, :, None, None, None]
    # At each step the samples that share an operation are taken out, changed and put back.
    samples = _send(parameters.order.argsort(dim=0, stable=True).T.contiguous(), pixels.device)
    for step in range(len(operations)):
        counts = torch.bincount(parameters.order[:, step], minlength=len(operations)).tolist()
        for operation, factor, chosen in zip(operations, factors, samples[step].split(counts)):
            if not len(chosen):
                continue
            taken = torch.index_select(pixels, 0, chosen, out=scratch.pixels[: len(chosen)])
            operation(taken, factor[chosen], scratch)
            pixels.index_copy_(0, chosen, taken)


def _brightness_(pixels: Tensor, factor: Tensor, scratch: _Scratch) -> None:
    pixels.mul_(factor).clamp_max_(255).floor_()


def _contrast_(pixels: Tensor, factor: Tensor, scratch: _Scratch) -> None:
    grey = _grey_plane(pixels, scratch)
    # PIL blends with one grey, the rounded mean of the grey image.
    _blend_(pixels, grey.mean(dim=(2, 3), keepdim=True).add_(0.5).floor_(), factor)


def _saturation_(pixels: Tensor, factor: Tensor, scratch: _Scratch) -> None:
    _blend_(pixels, _grey_plane(pixels, scratch), factor)


def _blend_(pixels: Tensor, degenerate: Tensor, factor: Tensor) -> None:
    """PIL's Image.blend(degenerate, pixels, factor), which truncates; in its order of arithmetic."""
    pixels.sub_(degenerate).mul_(factor).add_(degenerate).clamp_(0, 255).floor_()


def _grey_plane(pixels: Tensor, scratch: _Scratch) -> Tensor:
    """PIL's L image of whole-numbered RGB [n, 3, H, W], exactly; [n, 1, H, W] in scratch memory."""
    grey, term = scratch.planes(len(pixels))[:2]
    torch.mul(pixels[:, 0:1], GREY_WEIGHTS[0], out=grey)
    for channel in (1, 2):
        grey.add_(torch.mul(pixels[:, channel : channel + 1], GREY_WEIGHTS[channel], out=term))
    return grey.add_(GREY_UNIT / 2).mul_(1 / GREY_UNIT).floor_()


def _grey_(pixels: Tensor, scratch: _Scratch) -> None:
    pixels.copy_(_grey_plane(pixels, scratch).expand_as(pixels))


def _hue_(pixels: Tensor, turn: Tensor, scratch: _Scratch) -> None:
    """Turns the hue by `turn` levels of 256, through PIL's HSV with 256 levels of hue and saturation."""
    red, green, blue = pixels.split(1, dim=1)
    value, chroma, hue, term, smaller = scratch.planes(len(pixels))
    torch.maximum(torch.maximum(red, green, out=value), blue, out=value)
    torch.minimum(torch.minimum(red, green, out=chroma), blue, out=chroma)
    torch.sub(value, chroma, out=chroma)

    # Hue times chroma: green - blue if red is largest, else blue - red + 2c if green is, else
    # red - green + 4c. With whole numbers min(value - channel, 1) is 0 or 1, and lerp then chooses
    # exactly; on a CPU that is four times as fast as torch.where.
    torch.sub(red, green, out=hue).add_(chroma, alpha=4)
    torch.sub(blue, red, out=term).add_(chroma, alpha=2)
    torch.lerp(term, hue, torch.sub(value, green, out=smaller).clamp_max_(1), out=hue)
    torch.sub(green, blue, out=term)
    torch.lerp(term, hue, torch.sub(value, red, out=smaller).clamp_max_(1), out=hue)
    # Colourless pixels have no hue; their saturation is 0, which makes the choice immaterial.
    hue.div_(torch.clamp_min(chroma, 1, out=term)).mul_(255 / 6)
    _wrap_(hue, 255, term).floor_()
    _wrap_(hue.add_(turn), 256, term)
    hue.mul_(6 / 255)

    # Saturation in whole levels, times value / 255: how far a channel lies below the value at most.
    torch.clamp_min(value, 1, out=term)
    chroma.mul_(255).div_(term).floor_().mul_(value).div_(255)

    # How far each channel does: a trapezium in the hue, 0 within a sextant of the channel's own colour.
    centre, slope, offset = (_per_channel(values, pixels.device) for values in HUE_TRAPEZIA)
    torch.sub(hue, centre, out=pixels).abs_().mul_(slope).add_(offset).clamp_(0, 1).mul_(chroma)
    torch.sub(value, pixels, out=pixels).round_()


def _wrap_(values: Tensor, period: int, scratch: Tensor) -> Tensor:
    """values modulo period, in place; `torch.remainder` is ten times slower on a CPU."""
    turns = torch.mul(values, 1 / period, out=scratch).floor_()
    return values.sub_(turns, alpha=period)
