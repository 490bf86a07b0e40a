"""Milliseconds a batch of training augmentation, against torchvision's PIL pipeline on the same images.

    python benchmarks/augmentation.py [--batch 96] [--sizes 224 64] [--threads 1 2] [--repeats 7]

The baseline is what one upstream loader process does after decoding: DomainBed's augment_transform on each
PIL image, then stacking. PIL uses one thread whatever torch is given; upstream spreads samples over loader
processes instead, so its time on k cores is at best the one-thread time over k. Prints the median of the
repeats, and the ratio (above 1: ours is faster). `reduced` crops from a cache of twice the side.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from PIL import Image
from torchvision import transforms

from domainbed_sfp.data.images.augmentation import IMAGENET_MEAN, IMAGENET_STD, augment, draw_parameters


def median_ms(work: Callable[[], object], repeats: int) -> float:
    """Median milliseconds of `work`, after one call to warm up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def smooth_images(n: int, side: int, generator: torch.Generator) -> torch.Tensor:
    """uint8 [n, 3, side, side] of smooth colour fields with noise: PIL's speed depends on the content."""
    coarse = torch.rand(n, 3, 6, 6, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic") * 255
    images += 6 * torch.randn(images.shape, generator=generator)
    return images.clamp_(0, 255).byte()


def augmented_batch(images: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """What a training step does: draw, then augment."""
    sizes = torch.full((len(images), 2), images.shape[-1])
    return augment(images, draw_parameters(len(images), sizes, generator), size)


def pil_batch(files: list[Image.Image], pipeline: Callable[[Image.Image], torch.Tensor]) -> torch.Tensor:
    """What an upstream loader does after decoding."""
    return torch.stack([pipeline(file) for file in files])


def main() -> None:
    parser = argparse.ArgumentParser(description="augmentation speed against torchvision's PIL pipeline")
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 64])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    print(f"{'size':>5} {'threads':>7} {'ours ms':>9} {'reduced ms':>10} {'PIL ms':>9} {'PIL / ours':>10}")
    for size in args.sizes:
        images = smooth_images(args.batch, size, generator)
        larger = smooth_images(args.batch, 2 * size, generator)
        files = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        pipeline = transforms.Compose(
            [
                transforms.RandomResizedCrop(size, scale=(0.7, 1.0)),
                transforms.RandomHorizontalFlip(),
                transforms.ColorJitter(0.3, 0.3, 0.3, 0.3),
                transforms.RandomGrayscale(),
                transforms.ToTensor(),
                transforms.Normalize(mean=IMAGENET_MEAN, std=IMAGENET_STD),
            ]
        )

        batched = partial(augmented_batch, size=size, generator=generator)
        for threads in args.threads:
            torch.set_num_threads(threads)
            ours = median_ms(partial(batched, images), args.repeats)
            reduced = median_ms(partial(batched, larger), args.repeats)
            pil = median_ms(partial(pil_batch, files, pipeline), args.repeats)
            print(f"{size:5d} {threads:7d} {ours:9.1f} {reduced:10.1f} {pil:9.1f} {pil / ours:10.1f}")


if __name__ == "__main__":
    main()
