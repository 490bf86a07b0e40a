"""The batched augmentation against torchvision's PIL pipeline: each operation, its draws, the whole."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from sklearn.datasets import load_sample_image
from torchvision import transforms
from torchvision.transforms import functional as pil

from domainbed_sfp.data.images.augmentation import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    JITTER_OPERATIONS,
    AugmentationParameters,
    augment,
    draw_parameters,
    normalize,
)

SIZE = 64
# Hue in whole levels hangs on the last bit of a division for about one pixel in a thousand.
ALMOST_ALL = 0.995


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The images are small: on busy cores threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def as_pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def levels(normalised):
    """Normalised images back in PIL's 0..255."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((normalised * std + mean) * 255).round()


def natural_images(n, width, height, seed=0):
    """uint8 [n, 3, height, width]: smooth colour fields with some noise, and crops of two photographs."""
    generator = seeded(seed)
    coarse = torch.rand(n // 2, 3, 5, 5, generator=generator)
    fields = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic") * 255
    fields = fields + 6 * torch.randn(fields.shape, generator=generator)
    images = [fields.clamp(0, 255).round().byte()]
    photographs = [torch.from_numpy(load_sample_image(f"{name}.jpg").copy()) for name in ("china", "flower")]
    for k in range(n - n // 2):
        photograph = photographs[k % 2].permute(2, 0, 1)
        zoom = min(1 + k % 3, 400 // max(width, height))
        top, left = (
            int(torch.randint(0, side - zoom * part + 1, (1,), generator=generator))
            for side, part in zip(photograph.shape[1:], (height, width))
        )
        crop = pil.crop(as_pil(photograph), top, left, zoom * height, zoom * width)
        images.append(as_tensor(crop.resize((width, height)))[None])
    return torch.cat(images)


def neutral(n):
    """Parameters that change nothing."""
    return AugmentationParameters(
        crop=torch.tensor([[0.0, 0.0, 1.0, 1.0]], dtype=torch.float64).repeat(n, 1),
        flip=torch.zeros(n, dtype=torch.bool),
        brightness=torch.ones(n),
        contrast=torch.ones(n),
        saturation=torch.ones(n),
        hue=torch.zeros(n),
        order=torch.arange(4).repeat(n, 1),
        grey=torch.zeros(n, dtype=torch.bool),
    )


def drawn(n, size=SIZE, seed=0):
    return draw_parameters(n, torch.full((n, 2), size), seeded(seed))


def with_pil(images, operations):
    """float32 images after `operations(image, k)` on each as a PIL image."""
    return torch.stack([as_tensor(operations(as_pil(image), k)) for k, image in enumerate(images)]).float()


def jitter_with_pil(image, parameters, k):
    for position in parameters.order[k].tolist():
        name = JITTER_OPERATIONS[position]
        image = getattr(pil, f"adjust_{name}")(image, getattr(parameters, name)[k].item())
    return image


# Values


def test_normalize_equals_torchvision_to_the_last_bit():
    images = natural_images(8, 32, 24)
    reference = transforms.Compose([transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    expected = torch.stack([reference(as_pil(image)) for image in images])
    every_value = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        given = images.contiguous(memory_format=memory_format)
        result = normalize(given)
        assert torch.equal(result, expected) and result.dtype == torch.float32 and result.is_contiguous()
    assert torch.equal(normalize(every_value)[0], reference(as_pil(every_value[0])))


def test_neutral_parameters_only_normalise():
    images = natural_images(6, SIZE, SIZE)
    # PIL's hue goes through 256 levels even for no turn, and so does ours: a grey image is left alone.
    grey = images[:, :1].repeat(1, 3, 1, 1)
    assert torch.equal(augment(grey, neutral(6)), normalize(grey))


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_each_colour_operation_equals_pil(name):
    images, parameters = natural_images(48, SIZE, SIZE), drawn(48)
    alone = dataclasses.replace(neutral(48), **{name: getattr(parameters, name)})
    factors = getattr(parameters, name)

    def operation(image, k):
        # The neutral hue step is not quite neutral in PIL either.
        image = getattr(pil, f"adjust_{name}")(image, factors[k].item())
        return image if name == "hue" else pil.adjust_hue(image, 0.0)

    difference = (levels(augment(images, alone)) - with_pil(images, operation)).abs()
    assert (difference == 0).float().mean() > ALMOST_ALL
    assert difference.mean() < 0.02 and difference.max() <= 12
    assert (levels(augment(images, neutral(48))) - levels(augment(images, alone))).abs().mean() > 2


def test_colour_operations_equal_pil_on_extreme_colours():
    """Black, white, primaries, greys and saturated ramps, where hue and saturation divide by zero."""
    corners = torch.tensor(list(itertools.product((0, 1, 127, 254, 255), repeat=3)), dtype=torch.uint8)
    image = torch.cat((corners, corners[:19])).view(12, 12, 3).permute(2, 0, 1)
    parameters = drawn(48)
    parameters = dataclasses.replace(
        neutral(48), **{name: getattr(parameters, name) for name in (*JITTER_OPERATIONS, "order")}
    )
    images = image.expand(48, 3, 12, 12)
    result = levels(augment(images, parameters))
    expected = with_pil(images, lambda image, k: jitter_with_pil(image, parameters, k))
    assert torch.isfinite(result).all()
    assert (result == expected).float().mean() > 0.98
    assert (result - expected).abs().mean() < 0.1


def test_all_24_orders_equal_pil():
    orders = torch.tensor(list(itertools.permutations(range(4))))
    images, parameters = natural_images(24, SIZE, SIZE), drawn(24)
    jitter = {name: getattr(parameters, name) for name in JITTER_OPERATIONS}
    parameters = dataclasses.replace(neutral(24), **jitter, order=orders)
    result = levels(augment(images, parameters))
    expected = with_pil(images, lambda image, k: jitter_with_pil(image, parameters, k))
    equal = (result == expected).float().mean(dim=(1, 2, 3))
    assert equal.min() > 0.98, f"order {orders[equal.argmin()].tolist()}: {equal.min():.4f} equal"
    assert equal.mean() > ALMOST_ALL
    backwards = augment(images, dataclasses.replace(parameters, order=orders.flip(1)))
    assert ((levels(backwards) == expected).float().mean(dim=(1, 2, 3)) < 0.9).all()


def test_grey_equals_pil_for_the_chosen_samples_alone():
    images = natural_images(12, SIZE, SIZE)
    chosen = torch.arange(12) % 3 == 0
    result = levels(augment(images, dataclasses.replace(neutral(12), grey=chosen)))

    def operation(image, k):
        image = pil.adjust_hue(image, 0.0)
        return pil.rgb_to_grayscale(image, 3) if chosen[k] else image

    assert (result == with_pil(images, operation)).float().mean() > ALMOST_ALL
    colourless = (result.amax(1) == result.amin(1)).flatten(1).all(1)
    assert torch.equal(colourless, chosen)


def test_flip_is_exact():
    images = natural_images(8, SIZE, SIZE)
    flipped = dataclasses.replace(neutral(8), flip=torch.arange(8) % 2 == 1)
    result, straight = augment(images, flipped), augment(images, neutral(8))
    assert torch.equal(result[0::2], straight[0::2])
    assert torch.equal(result[1::2], straight[1::2].flip(-1))


@pytest.mark.parametrize("out_size", [SIZE, 96, 56, 40, 16])
def test_crop_and_resize_equal_pil_within_rounding(out_size):
    """PIL rounds after the horizontal and after the vertical pass, so one level of difference remains."""
    images, parameters = natural_images(48, SIZE, SIZE), drawn(48)
    # A grey image passes the hue step unchanged, which leaves the crop alone to compare.
    images = images[:, 1:2].repeat(1, 3, 1, 1)
    alone = dataclasses.replace(neutral(48), crop=parameters.crop, flip=parameters.flip)

    def operation(image, k):
        left, top, width, height = (parameters.crop[k] * SIZE).round().int().tolist()
        image = pil.resized_crop(image, top, left, height, width, [out_size, out_size])
        return pil.hflip(image) if parameters.flip[k] else image

    expected = with_pil(images, operation)
    difference = levels(augment(images, alone, out_size)) - expected
    assert difference.abs().max() <= 1
    assert difference.abs().mean() < 0.25 and difference.mean().abs() < 0.05
    shifted = dataclasses.replace(alone, crop=parameters.crop + torch.tensor([0.5, 0, 0, 0]) / SIZE)
    assert (levels(augment(images, shifted, out_size)) - expected).abs().mean() > 0.5


@pytest.mark.parametrize("out_size", [None, 60, 96])
def test_crop_between_pixels_keeps_pixel_centres(out_size):
    """On a ramp bilinear resampling is exact, so each output pixel tells where it was taken."""
    size = out_size or SIZE
    ramp = (3 * torch.arange(SIZE)).byte()
    images = torch.stack((ramp.expand(SIZE, SIZE), ramp[:, None].expand(SIZE, SIZE)))[:, None]
    images = images.expand(2, 3, SIZE, SIZE)
    left, top, width, height = crop = (0.1234, 0.0567, 0.7654, 0.8321)
    parameters = dataclasses.replace(neutral(2), crop=torch.tensor([crop], dtype=torch.float64).repeat(2, 1))
    result = levels(augment(images, parameters, out_size))
    steps = (torch.arange(size) + 0.5) / size
    for image, start, extent, line in (
        (result[0, 0], left, width, lambda image: image[0]),
        (result[1, 0], top, height, lambda image: image[:, 0]),
    ):
        # The position of a pixel's centre, in pixels; the crop's edge repeats its outermost pixel, which a
        # cut between pixels puts within half a pixel.
        where = ((start + extent * steps) * SIZE).clamp(start * SIZE + 0.5, (start + extent) * SIZE - 0.5)
        difference = (line(image) - 3 * (where - 0.5)).abs()
        assert difference[2:-2].max() < 0.51 and difference.max() < 0.5 + 3 / 2


# Draws


def torchvision_crops(width, height, n):
    image = torch.empty(3, height, width)
    draws = [transforms.RandomResizedCrop.get_params(image, [0.7, 1.0], [3 / 4, 4 / 3]) for _ in range(n)]
    top, left, crop_height, crop_width = np.array(draws).T
    return np.stack((left, top, crop_width, crop_height), axis=1)


def crop_quantities(crops, width, height):
    left, top, crop_width, crop_height = np.asarray(crops, dtype=float).T
    return {
        "area fraction": crop_width * crop_height / (width * height),
        "aspect ratio": crop_width / crop_height,
        "left": left,
        "top": top,
        # Where the crop lies in the room it has, blurred a little so that whole pixels do not tie.
        "place": (left + 0.5) / (width - crop_width + 1),
    }


# Square, PACS-like, partly falling back, and always falling back on either side.
@pytest.mark.parametrize(("width", "height"), [(227, 227), (500, 375), (300, 200), (200, 310), (500, 200), (90, 400)])
def test_crops_are_distributed_as_torchvision_draws_them(width, height):
    n = 3000
    torch.manual_seed(1)
    expected = crop_quantities(torchvision_crops(width, height, n), width, height)
    crops = draw_parameters(n, torch.tensor([[width, height]]).repeat(n, 1), seeded(2)).crop
    in_pixels = crops * torch.tensor([width, height, width, height])
    assert (in_pixels - in_pixels.round()).abs().max() < 1e-9
    in_pixels = in_pixels.round()
    assert in_pixels.min() >= 0
    assert ((in_pixels[:, :2] + in_pixels[:, 2:]) <= torch.tensor([width, height])).all()
    for name, values in crop_quantities(in_pixels, width, height).items():
        test = stats.ks_2samp(values, expected[name])
        assert test.pvalue > 1e-3, f"{name}: KS {test.statistic:.3f}, p {test.pvalue:.1e}"
        assert values.mean() == pytest.approx(expected[name].mean(), rel=0.05, abs=1e-9)


def test_fallback_is_torchvisions_for_every_shape_that_never_fits():
    shapes = [(500, 200), (501, 201), (200, 500), (97, 31), (31, 97), (1, 1), (2, 1), (1, 3), (640, 5)]
    for width, height in shapes:
        expected = torchvision_crops(width, height, 1)[0]
        crop = draw_parameters(1, torch.tensor([[width, height]]), seeded()).crop[0]
        assert (crop * torch.tensor([width, height] * 2)).round().tolist() == expected.tolist()


def test_wrong_crop_frame_would_be_seen():
    """Drawing in the cached square instead of the file's frame gives another distribution."""
    square = draw_parameters(3000, torch.full((3000, 2), 224), seeded(2)).crop
    expected = torchvision_crops(500, 375, 3000)
    widths = expected[:, 2] / 500
    assert stats.ks_2samp(square[:, 2].numpy(), widths).pvalue < 1e-6


def test_jitter_is_distributed_as_torchvision_draws_it():
    n = 3000
    torch.manual_seed(1)
    bounds = transforms.ColorJitter(0.3, 0.3, 0.3, 0.3)
    arguments = [getattr(bounds, name) for name in JITTER_OPERATIONS]
    draws = [transforms.ColorJitter.get_params(*arguments) for _ in range(n)]
    parameters = drawn(n, seed=3)
    for position, name in enumerate(JITTER_OPERATIONS, start=1):
        values = getattr(parameters, name).numpy()
        expected = np.array([draw[position] for draw in draws])
        assert stats.ks_2samp(values, expected).pvalue > 1e-3, name
        low, high = arguments[position - 1]
        assert low <= values.min() < low + 0.002 and high - 0.002 < values.max() <= high
    for orders in (parameters.order.numpy(), np.array([draw[0].numpy() for draw in draws])):
        counts = np.unique(orders, axis=0, return_counts=True)[1]
        assert len(counts) == 24 and stats.chisquare(counts).pvalue > 1e-3


def test_rates_and_independence():
    n = 20_000
    parameters = drawn(n, size=224, seed=4)
    for name, probability in (("flip", 0.5), ("grey", 0.1)):
        rate = getattr(parameters, name).double().mean().item()
        assert abs(rate - probability) < 4 * (probability * (1 - probability) / n) ** 0.5, name
    # The draws of a sample are independent of each other, and of the next sample's.
    columns = [getattr(parameters, name).double() for name in (*JITTER_OPERATIONS, "flip", "grey")]
    columns += [parameters.crop[:, 2:].prod(1), parameters.crop[:, 2] / parameters.crop[:, 3]]
    columns += [parameters.order[:, 0].double()]
    columns += [column.roll(1) for column in columns]
    correlation = torch.corrcoef(torch.stack(columns)).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / n**0.5


# The whole, over a set of images

REPEATS = 16
STANDARD_ERRORS = 4.5


def statistics(augmented):
    """[images, repeats, 3, S, S] in 0..255 -> per image, what each operation leaves a trace in."""
    x = augmented
    mean, std = x.mean(dim=(3, 4)), x.std(dim=(3, 4))
    right, down = x.diff(dim=4).abs().mean(dim=(3, 4)), x.diff(dim=3).abs().mean(dim=(3, 4))
    grey = 0.299 * x[:, :, 0] + 0.587 * x[:, :, 1] + 0.114 * x[:, :, 2]
    level = grey.mean(dim=(2, 3))
    # Value and chroma, unlike the grey level, stay as they are when the hue turns.
    value = x.amax(2)
    chroma = (value - x.amin(2)).mean(dim=(2, 3))
    coloured = (chroma > 0).float()
    count = coloured.sum(1).clamp_min(2)

    def spread_of_coloured(values):
        centre = (values * coloured).sum(1, keepdim=True) / count[:, None]
        return (((values - centre).square() * coloured).sum(1) / (count - 1)).sqrt()

    half = x.shape[-1] // 2
    table = {
        "grey rate": 1 - coloured.mean(1),
        "spread of level": level.std(1),
        "spread of contrast": (grey.std(dim=(2, 3)) / level).std(1),
        "spread of saturation": spread_of_coloured(chroma / value.mean(dim=(2, 3))),
        "spread of colour": spread_of_coloured((mean[:, :, 0] - mean[:, :, 2]) / level),
        "spread of left against right": (grey[..., :half] - grey[..., half:]).mean(dim=(2, 3)).std(1),
    }
    for channel, name in enumerate(("red", "green", "blue")):
        table[f"{name} mean"] = mean[:, :, channel].mean(1)
        table[f"{name} std"] = std[:, :, channel].mean(1)
        table[f"{name} first difference right"] = right[:, :, channel].mean(1)
        table[f"{name} first difference down"] = down[:, :, channel].mean(1)
        table[f"spread of {name} mean"] = mean[:, :, channel].std(1)
    return table


def torchvision_pipeline(size):
    """The lines of DomainBed's `augment_transform`."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.7, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.3, 0.3, 0.3, 0.3),
            transforms.RandomGrayscale(),
            transforms.ToTensor(),
            transforms.Normalize(mean=IMAGENET_MEAN, std=IMAGENET_STD),
        ]
    )


def augmented_by_torchvision(files, size, seed=5):
    torch.manual_seed(seed)
    pipeline = torchvision_pipeline(size)
    return torch.stack([torch.stack([levels(pipeline(f)) for _ in range(REPEATS)]) for f in files])


def augmented_by_us(images, sizes, out_size, seed=6, left_out=()):
    repeated = images.repeat_interleave(REPEATS, dim=0)
    parameters = draw_parameters(len(repeated), sizes.repeat_interleave(REPEATS, dim=0), seeded(seed))
    off = neutral(len(repeated))
    parameters = dataclasses.replace(parameters, **{name: getattr(off, name) for name in left_out})
    return levels(augment(repeated, parameters, out_size)).unflatten(0, (len(images), REPEATS))


def disagreements(ours, theirs):
    """The statistics whose mean over the images differs by more than chance, in standard errors."""
    found = {}
    for name, values in statistics(ours).items():
        difference = values - theirs[name]
        # A twentieth of a level is what rounding in the crop may do beyond chance.
        excess = difference.mean().abs() - (0.05 if "spread" not in name and "rate" not in name else 0)
        error = difference.std() / len(difference) ** 0.5
        found[name] = (excess / error.clamp_min(1e-9)).item()
    return {name: value for name, value in found.items() if value > STANDARD_ERRORS}


@pytest.fixture(scope="module")
def square_images():
    return natural_images(200, 32, 32)


@pytest.fixture(scope="module")
def square_statistics(square_images):
    return statistics(augmented_by_torchvision([as_pil(image) for image in square_images], 32))


def test_augmented_images_have_the_pil_pipelines_statistics(square_images, square_statistics):
    ours = augmented_by_us(square_images, torch.full((200, 2), 32), 32)
    assert disagreements(ours, square_statistics) == {}


@pytest.mark.parametrize("left_out", ["crop", "flip", *JITTER_OPERATIONS, "grey"])
def test_leaving_out_an_operation_shows_in_the_statistics(square_images, square_statistics, left_out):
    ours = augmented_by_us(square_images, torch.full((200, 2), 32), 32, left_out=[left_out])
    worst = max(disagreements(ours, square_statistics).values(), default=0)
    assert worst > 1.5 * STANDARD_ERRORS


@pytest.mark.parametrize(("cached_side", "lowest"), [(48, 0.7), (160, 0.96)])
def test_files_larger_than_the_cached_square_differ_in_sharpness_alone(cached_side, lowest):
    """Resampling twice costs sharpness; a cache as large as the files, reduced after the crop, does not."""
    files = [as_pil(image) for image in natural_images(60, 160, 120, seed=7)]
    side = (cached_side, cached_side)
    cached = torch.stack([as_tensor(file.resize(side, Image.Resampling.BILINEAR)) for file in files])
    ours = augmented_by_us(cached, torch.tensor([[160, 120]]).repeat(60, 1), 48)
    theirs = statistics(augmented_by_torchvision(files, 48))
    assert {name for name in disagreements(ours, theirs) if "first difference" not in name} == set()
    for name, values in statistics(ours).items():
        if "first difference" in name:
            assert lowest < values.mean() / theirs[name].mean() < 1.04, name


# Contracts


def test_same_seed_same_bits_and_the_generator_moves_on():
    images = natural_images(16, SIZE, SIZE)
    generator = seeded(8)
    first = augment(images, draw_parameters(16, torch.full((16, 2), SIZE), generator))
    state = generator.get_state()
    second = augment(images, draw_parameters(16, torch.full((16, 2), SIZE), generator))
    assert torch.equal(first, augment(images, drawn(16, seed=8)))
    assert not torch.equal(first, second)
    generator.set_state(state)
    assert torch.equal(second, augment(images, draw_parameters(16, torch.full((16, 2), SIZE), generator)))


def test_global_random_state_is_neither_read_nor_moved():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = drawn(4)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    assert torch.equal(first.crop, drawn(4).crop)


def test_a_sample_does_not_depend_on_its_companions():
    # More samples than are taken at once on a CPU, so that chunks are crossed.
    images, parameters = natural_images(30, 160, 160), drawn(30, size=160)
    together = augment(images, parameters)
    alone = torch.cat([augment(images[k : k + 1], parameters[k : k + 1]) for k in range(30)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-6)
    shuffled = torch.randperm(30, generator=seeded())
    result = augment(images[shuffled], parameters[shuffled])
    torch.testing.assert_close(result, together[shuffled], rtol=0, atol=1e-6)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_input_is_left_alone_in_every_memory_format(memory_format):
    images = natural_images(8, SIZE, SIZE).contiguous(memory_format=memory_format)
    parameters, copy = drawn(8), images.clone()
    result = augment(images, parameters)
    assert torch.equal(images, copy) and not result.requires_grad
    assert result.is_contiguous() and result.dtype == torch.float32
    assert torch.equal(result, augment(copy.contiguous(), parameters))
    strided = torch.stack((images, images), dim=1)[:, 0]
    assert torch.equal(result, augment(strided, parameters))


def test_empty_batch_and_out_size():
    empty = torch.empty(0, 3, 8, 8, dtype=torch.uint8)
    parameters = draw_parameters(0, torch.empty(0, 2, dtype=torch.int64), seeded())
    assert augment(empty, parameters).shape == (0, 3, 8, 8)
    assert augment(empty, parameters, out_size=4).shape == (0, 3, 4, 4)
    assert augment(natural_images(2, 32, 32), drawn(2), out_size=24).shape == (2, 3, 24, 24)


@pytest.mark.parametrize("out_size", [16, 32, 40])
def test_crops_thinner_than_a_pixel_stay_finite(out_size):
    """A file of 2,000 x 3 falls back to a crop 4 wide, a fraction of a pixel of the cached square."""
    parameters = draw_parameters(8, torch.tensor([[2000, 3], [3, 2000]] * 4), seeded())
    result = levels(augment(natural_images(8, 32, 32), parameters, out_size))
    assert result.min() >= 0 and result.max() <= 255


def test_no_step_waits_for_the_device():
    """Meta tensors have no values: reading one, or mixing it with a CPU tensor, is an error."""
    images = torch.empty(4, 3, 16, 16, dtype=torch.uint8, device="meta")
    assert augment(images, drawn(4)).device.type == "meta"
    assert augment(images, drawn(4), out_size=8).shape == (4, 3, 8, 8)
    assert normalize(images).device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu():
    images, parameters = natural_images(24, SIZE, SIZE), drawn(24)
    result = augment(images.cuda(), parameters)
    assert result.is_cuda
    difference = (levels(result.cpu()) - levels(augment(images, parameters))).abs()
    assert (difference == 0).float().mean() > 0.98 and difference.mean() < 0.1
    torch.testing.assert_close(normalize(images.cuda()).cpu(), normalize(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("images", "told"),
    [
        (torch.zeros(2, 3, 8, 8), r"uint8 .*given torch.float32 \[2, 3, 8, 8\]"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"\[N, 3, H, W\], given torch.uint8 \[3, 8, 8\]"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), r"given torch.uint8 \[2, 8, 8, 3\]"),
    ],
)
def test_wrong_images_are_named(images, told):
    with pytest.raises(ValueError, match=told):
        normalize(images)
    with pytest.raises(ValueError, match=told):
        augment(images, drawn(2))


def test_wrong_arguments_are_named():
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="2 images were given with parameters for 3"):
        augment(images, drawn(3))
    with pytest.raises(ValueError, match=r"square images .*given \[2, 3, 8, 6\]"):
        augment(images[..., :6], drawn(2))
    with pytest.raises(ValueError, match="out_size must be a positive integer, given 0"):
        augment(images, drawn(2), out_size=0)
    with pytest.raises(ValueError, match=r"integer tensor \[2, 2\] .*given torch.int64 \[3, 2\]"):
        draw_parameters(2, torch.ones(3, 2, dtype=torch.int64), seeded())
    with pytest.raises(ValueError, match=r"given torch\.float32"):
        draw_parameters(2, torch.ones(2, 2), seeded())
    with pytest.raises(ValueError, match="must be positive, given 0"):
        draw_parameters(1, torch.tensor([[0, 5]]), seeded())
