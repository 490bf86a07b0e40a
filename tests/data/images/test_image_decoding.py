"""Decoding image files: 8 bits as PIL and DomainBed decode them, more bits by their format's range, damage by name."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.data.images import cache, decoding

LEVELS = np.arange(4 * 6).reshape(4, 6)
RGBA = np.random.default_rng(0).integers(0, 256, (4, 6, 4)).astype(np.uint8)


def decoded(path: Path) -> np.ndarray:
    """The pixels of a file without resizing: uint8 [H, W, 3]."""
    with Image.open(path) as image:
        return np.asarray(decoding.rgb(image))


def tiff(
    path: Path, pixels: np.ndarray, bits: int, photometric: int = 1, sample_format: int = 1, order: str = "<"
) -> Path:
    """An uncompressed grey TIFF of one strip, written by hand: PIL writes few of the kinds there are."""
    if bits == 12:
        pairs = pixels.reshape(-1, 2).astype(int)
        data = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs)
    else:
        data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    tags = [
        (256, pixels.shape[1]), (257, pixels.shape[0]), (258, bits), (259, 1), (262, photometric), (273, 8),
        (277, 1), (278, pixels.shape[0]), (279, len(data)), (339, sample_format),
    ]  # fmt: skip
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    path.write_bytes(head + data + struct.pack(f"{order}H", len(tags)) + entries + bytes(4))
    return path


def png(path: Path, pixels: np.ndarray) -> Path:
    """A PNG of 16 bits a channel (grey, grey and alpha, RGB or RGBA by the last axis)."""
    height, width = pixels.shape[:2]
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    return path


def pgm(path: Path, pixels: np.ndarray, largest: int) -> Path:
    path.write_bytes(b"P5 %d %d %d\n" % (pixels.shape[1], pixels.shape[0], largest) + pixels.astype(">u2").tobytes())
    return path


@pytest.mark.parametrize("mode, suffix", [
    ("RGB", ".png"), ("L", ".png"), ("1", ".png"), ("P", ".png"), ("LA", ".png"), ("RGBA", ".png"), ("RGB", ".jpg"),
    ("L", ".jpg"), ("CMYK", ".jpg"), ("YCbCr", ".jpg"), ("RGB", ".webp"), ("RGBA", ".webp"), ("RGB", ".bmp"), ("P", ".bmp"),
    ("RGB", ".tif"), ("CMYK", ".tif"), ("P", ".tif"), ("1", ".tif"), ("RGB", ".ppm"), ("L", ".pgm"), ("PA", ".tif"),
])  # fmt: skip
def test_images_of_8_bits_are_what_domainbeds_loader_gives(tmp_path, mode, suffix):
    image = Image.fromarray(RGBA, "RGBA") if mode in ("RGBA", "LA", "PA") else Image.fromarray(RGBA[..., :3])
    path = tmp_path / f"image{suffix}"
    image.convert("LA" if mode == "PA" else mode).save(path)
    with Image.open(path) as opened:
        expected = np.asarray(opened.convert("RGB"))
    assert np.array_equal(decoded(path), expected)
    with Image.open(path) as opened:
        small = np.asarray(opened.convert("RGB").resize((3, 3), Image.Resampling.BILINEAR))
    pixels, size = decoding.decode(path, 3)
    assert np.array_equal(pixels, small) and size == (6, 4)


def test_transparency_orientation_and_further_frames_are_passed_over_as_in_domainbed(tmp_path):
    frames = [Image.fromarray(RGBA[..., :3]), Image.new("RGB", (6, 4))]
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter when shown
    frames[0].save(tmp_path / "turned.png", exif=exif)
    frames[0].convert("P").save(tmp_path / "transparent.png", transparency=0)
    frames[0].save(tmp_path / "pages.tif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "moving.png", save_all=True, append_images=frames[1:])
    frames[0].convert("P").save(
        tmp_path / "moving.jpg", format="GIF", save_all=True, append_images=[frames[1].convert("P")]
    )
    for path in tmp_path.iterdir():
        with Image.open(path) as opened:
            assert np.array_equal(decoded(path), np.asarray(opened.convert("RGB"))), path.name
    assert np.array_equal(decoded(tmp_path / "turned.png"), RGBA[..., :3])
    assert np.array_equal(decoded(tmp_path / "pages.tif"), RGBA[..., :3])


GREY_16 = (LEVELS * 2849).astype(np.uint16)  # 0 to 65527
SCALED_16 = np.rint(GREY_16 / 257).astype(np.uint8)


@pytest.mark.parametrize("make", [
    lambda path: png(path, GREY_16), lambda path: tiff(path, GREY_16, 16), lambda path: tiff(path, GREY_16, 16, order=">"),
    lambda path: tiff(path, 65535 - GREY_16, 16, photometric=0), lambda path: pgm(path, GREY_16, 65535),
    lambda path: (Image.fromarray(GREY_16).save(path, format="TIFF", compression="tiff_lzw"), path)[1],
    lambda path: (Image.fromarray(GREY_16).save(path, format="PNG"), path)[1],
], ids=["png", "tiff", "big endian", "white is zero", "pgm", "lzw", "PIL's png"])  # fmt: skip
def test_grey_of_16_bits_is_scaled(tmp_path, make):
    pixels = decoded(make(tmp_path / "image.png"))
    assert np.array_equal(pixels, np.repeat(SCALED_16[..., None], 3, axis=2))


def test_fewer_bits_are_scaled_by_their_own_range(tmp_path):
    grey = (LEVELS * 178).astype(np.uint16)  # 0 to 4094
    expected = grey / 4095 * 255
    assert np.array_equal(decoded(tiff(tmp_path / "12.tif", grey, 12))[..., 0], np.rint(expected))
    assert np.abs(decoded(pgm(tmp_path / "12.pgm", grey, 4095))[..., 0] - expected).max() <= 0.51


def test_colour_of_16_bits_keeps_its_high_byte(tmp_path):
    """As PIL, and so DomainBed, reads it."""
    wide = RGBA.astype(np.uint16) * 256 + 77
    assert np.array_equal(decoded(png(tmp_path / "rgb.png", wide[..., :3])), RGBA[..., :3])
    assert np.array_equal(decoded(png(tmp_path / "rgba.png", wide)), RGBA[..., :3])
    grey = decoded(png(tmp_path / "la.png", wide[..., :2]))
    assert np.array_equal(grey, np.repeat(RGBA[..., :1], 3, axis=2))


@pytest.mark.parametrize("pixels, bits, sample_format, words", [
    (LEVELS.astype(np.float32), 32, 3, "floating-point numbers"),
    (LEVELS.astype(np.uint32), 32, 1, "32-bit or signed integers"), (LEVELS.astype(np.int32), 32, 2, "signed integers"),
    (LEVELS.astype(np.int16), 16, 2, "signed integers"), (LEVELS.astype(np.int8), 8, 2, "signed integers"),
])  # fmt: skip
def test_pixels_without_a_defined_range_are_refused_by_name(tmp_path, pixels, bits, sample_format, words):
    path = tiff(tmp_path / "image.tif", pixels, bits, sample_format=sample_format)
    with pytest.raises(UserError, match=rf"^image '{path}' cannot be decoded \(its pixels are .*{words}.*8 bits\)"):
        decoding.decode(path, 4)


def test_a_portable_float_map_is_refused(tmp_path):
    path = tmp_path / "image.ppm"
    path.write_bytes(b"Pf 6 4 -1.0\n" + LEVELS.astype("<f4").tobytes())
    with pytest.raises(UserError, match=r"floating-point numbers, whose range PPM does not define"):
        decoding.decode(path, 4)


def test_a_cache_of_images_that_were_clipped_is_not_used(tmp_path, monkeypatch):
    path = png(tmp_path / "image.png", GREY_16)
    monkeypatch.setattr(cache, "FORMAT", "1")
    old = cache.cached_images([path], tmp_path, 8, tmp_path / "cache")[0].filename
    monkeypatch.undo()
    assert cache.cached_images([path], tmp_path, 8, tmp_path / "cache")[0].filename != old


def _sample(kind: str) -> bytes:
    pixels = np.random.default_rng(1).integers(0, 256, (20, 24, 3)).astype(np.uint8)
    image, file = Image.fromarray(pixels), io.BytesIO()
    options = {"TIFF": {"compression": "tiff_lzw"}, "MPO": {"save_all": True}, "PNG": {"exif": Image.Exif().tobytes()}}
    if kind == "PNG16":
        image, kind = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), "PNG"
    if kind in ("GIF", "PCX", "MSP"):
        image = image.convert("1" if kind == "MSP" else "P")
    image.save(file, format=kind, **options.get(kind, {}))
    return file.getvalue()


SAMPLES = {kind: _sample(kind) for kind in (
    "PNG", "PNG16", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "TGA", "ICO", "PCX", "SGI", "DDS", "MSP", "ICNS",
)}  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(sorted(SAMPLES)),
    length=st.floats(0, 1),
    # Half of the bytes changed are in the header, where the plugins' parsing is.
    flips=st.lists(st.tuples(st.booleans(), st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=4),
)
def test_a_damaged_file_of_any_format_is_decoded_or_named(tmp_path_factory, kind, length, flips):
    data = bytearray(SAMPLES[kind])
    if not flips:
        del data[int(length * len(data)) :]
    for in_header, where, change in flips:
        data[int(where * (min(64, len(data)) if in_header else len(data)))] ^= change
    path = tmp_path_factory.getbasetemp() / "damaged.png"
    path.write_bytes(data)
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, 10_000  # no example takes long
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            message = decoding.why_undecodable(path)
            if message is None:
                pixels, _ = decoding.decode(path, 8)
                assert (pixels.shape, pixels.dtype) == ((8, 8, 3), np.uint8)
            else:
                assert message.startswith(f"image {str(path)!r} can") and "\n" not in message
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def test_what_pil_doubts_is_told_once_with_a_name(tmp_path, capsys):
    """Damaged metadata: the pixels are there, and PIL warns of no file by name."""
    cut = b"Exif\0\0MM\0*\0\0\0\x08\0\x03"
    paths = [tmp_path / f"{index}.jpg" for index in range(3)]
    for path in paths:
        Image.new("RGB", (6, 4), (200, 30, 90)).save(path, **({} if path == paths[0] else {"exif": cut}))
    images, _ = cache.cached_images(paths, tmp_path, 4, tmp_path / "cache")
    assert np.array_equal(images[0], images[1]) and np.array_equal(images[0], images[2])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"warning: {tmp_path.parent.name}/{tmp_path.name}: decoded, but PIL has its doubts about 2 images, first '"
    )
    assert "/1.jpg' (" in line or "/2.jpg' (" in line
    with pytest.warns(UserWarning, match="Corrupt EXIF data"):
        decoding.decode(paths[1], 4)
    cache.cached_images(paths, tmp_path, 4, tmp_path / "cache")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "error", [struct.error("x"), SyntaxError("x"), IndexError(), EOFError("two\nlines"), MemoryError(), KeyError("x"),
              zlib.error("x"), Image.DecompressionBombError("x"), RecursionError("x"), AttributeError("x"), OSError("x")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_whatever_a_plugin_raises_names_the_file(tmp_path, monkeypatch, error):
    path = tmp_path / "image.png"
    path.write_bytes(SAMPLES["PNG"])

    def fail(image):
        raise error

    monkeypatch.setattr(decoding, "rgb", fail)
    with pytest.raises(UserError, match=r"^image '.*image\.png' cannot be decoded \(.+\); replace") as told:
        cache.cached_images([path], tmp_path, 8, tmp_path / "cache")
    assert "\n" not in str(told.value)
