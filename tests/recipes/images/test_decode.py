"""What becomes of each kind of image."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from headwater_recipes.images.decode import TooLarge, Unreadable, read_image, square


def _bytes(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _colour(data: bytes) -> tuple[int, ...]:
    image = read_image(data)
    assert image.mode == "RGB"
    return tuple(image.getpixel((0, 0)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mode", "value", "kind", "expected"),
    [
        ("1", 1, "PNG", (255, 255, 255)),
        ("L", 100, "PNG", (100, 100, 100)),
        ("LA", (100, 0), "PNG", (100, 100, 100)),
        ("RGB", (10, 20, 30), "PNG", (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), "PNG", (10, 20, 30)),
        ("CMYK", (255, 0, 0, 0), "TIFF", (0, 255, 255)),
        ("YCbCr", (100, 128, 128), "TIFF", (100, 100, 100)),
        ("I;16", 25600, "PNG", (100, 100, 100)),
    ],
)
def test_every_mode_becomes_rgb(mode: str, value: object, kind: str, expected: tuple[int, ...]) -> None:
    assert _colour(_bytes(Image.new(mode, (3, 2), value), kind)) == expected  # type: ignore[arg-type]


def test_a_palette_and_its_transparent_colour() -> None:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 7, 8, 9])
    assert _colour(_bytes(image)) == (7, 8, 9)
    assert _colour(_bytes(image, transparency=1)) == (7, 8, 9)


def test_an_animation_is_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    assert _colour(_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_of_no_stated_range_are_refused(mode: str) -> None:
    with pytest.raises(Unreadable, match=f"mode {mode} has no stated range"):
        read_image(_bytes(Image.new(mode, (2, 2)), "TIFF"))


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (2, (1, 0)), (3, (1, 2)), (6, (2, 0)), (8, (0, 1))])
def test_a_photo_is_turned_upright(orientation: int, corner: tuple[int, int]) -> None:
    """The first stored pixel comes to lie where EXIF says: 2 mirrored, 3 upside down, 6 and 8 on their sides."""
    image = Image.new("RGB", (2, 3))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = read_image(_bytes(image, exif=exif))
    assert found.size == ((3, 2) if orientation > 4 else (2, 3))
    assert found.getpixel(corner) == (255, 255, 255)


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"<svg/>", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_bytes_that_are_no_image_are_refused(data: bytes) -> None:
    with pytest.raises(Unreadable):
        read_image(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_an_image_that_is_cut_off_is_refused(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    whole = _bytes(Image.fromarray(noise), kind)
    with pytest.raises(Unreadable):
        read_image(whole[: len(whole) // 2])


def test_no_damage_raises_anything_else() -> None:
    random = np.random.default_rng(1)
    noise = Image.fromarray(random.integers(0, 255, (9, 9, 3), dtype=np.uint8))
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
        whole = np.frombuffer(_bytes(noise, kind), np.uint8)
        for _ in range(100):
            bad = whole.copy()
            bad[random.integers(0, len(bad), 4)] = random.integers(0, 256, 4)
            with contextlib.suppress(Unreadable):
                assert read_image(bad.tobytes()).mode == "RGB"


def _claims(side: int) -> bytes:
    """A PNG of which there is only the header."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_500, 20_000])
def test_a_huge_image_is_refused_by_its_header(side: int) -> None:
    with pytest.raises(TooLarge):
        read_image(_claims(side))


def test_one_pixel_is_an_image(tmp_path: Path) -> None:
    path = tmp_path / "one.png"
    Image.new("RGB", (1, 1), (1, 2, 3)).save(path)
    assert (square(read_image(path), 8) == [1, 2, 3]).all()
    assert square(read_image(path), 8).shape == (8, 8, 3)
