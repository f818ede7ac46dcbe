"""Every mode that Pillow opens becomes the RGB image that a person sees; files are upright."""

import io

import numpy as np
import pytest
from PIL import Image

from lcm_jax import files
from lcm_jax.data import images

RED, GRAY, WHITE = (255, 0, 0), (128, 128, 128), (255, 255, 255)


def saved(image: Image.Image, kind: str, **options) -> Image.Image:
    """The image as Pillow opens it from a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(io.BytesIO(file.getvalue()))


def filled(mode: str, value, **info) -> Image.Image:
    image = Image.new(mode, (2, 2), value)
    image.info |= info
    return image


def palette(mode: str = "P", **info) -> Image.Image:
    """Index 1 is red."""
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, *RED])
    image.info |= info
    if mode == "PA":
        image = image.convert("PA")
        image.putalpha(0)
    return image


def array(values, dtype) -> Image.Image:
    return Image.fromarray(np.full((2, 2), values, dtype))


def png16(value: int, transparent: int | None = None) -> Image.Image:
    options = {} if transparent is None else {"transparency": transparent}
    return saved(array(value, np.uint16), "PNG", **options)


def pgm16(value: int) -> Image.Image:
    return Image.open(io.BytesIO(b"P5 2 2 65535\n" + value.to_bytes(2, "big") * 4))


def adobe_cmyk() -> Image.Image:
    """A JPEG whose inks are stored inverted, as Adobe's programs do; Pillow turns them round."""
    return saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)


def animated(kind: str) -> Image.Image:
    frames = [Image.new("RGB", (2, 2), color) for color in (RED, (0, 0, 255))]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)


MODES = {
    "1": (filled("1", 1), WHITE),
    "L": (filled("L", 128), GRAY),
    "L with tRNS": (saved(filled("L", 5), "PNG", transparency=5), WHITE),
    "LA": (filled("LA", (0, 127)), GRAY),
    "La": (filled("LA", (0, 127)).convert("La"), GRAY),
    "P": (palette(), RED),
    "P with a transparent index": (saved(palette(), "PNG", transparency=1), WHITE),
    "P with another transparent": (saved(palette(), "PNG", transparency=0), RED),
    "P with alpha by index": (saved(palette(), "PNG", transparency=b"\xff\x00"), WHITE),
    "PA": (palette("PA"), WHITE),
    "RGB": (filled("RGB", RED), RED),
    "RGB with tRNS": (saved(filled("RGB", (1, 2, 3)), "PNG", transparency=(1, 2, 3)), WHITE),
    "RGB with another tRNS": (saved(filled("RGB", RED), "PNG", transparency=(1, 2, 3)), RED),
    "RGB of 16 bits with tRNS": (filled("RGB", (1, 2, 3), transparency=(0x0102, 0x0203, 0x0304)), WHITE),
    "RGBA": (filled("RGBA", (255, 0, 0, 128)), (255, 127, 127)),
    "RGBA, clear": (filled("RGBA", (9, 9, 9, 0)), WHITE),
    "RGBa": (filled("RGBA", (255, 0, 0, 128)).convert("RGBa"), (255, 127, 127)),
    "CMYK": (filled("CMYK", (0, 255, 255, 0)), RED),
    "CMYK JPEG": (adobe_cmyk(), RED),
    "YCbCr": (filled("RGB", RED).convert("YCbCr"), (254, 0, 0)),
    "LAB": (filled("LAB", (255, 128, 128)), WHITE),
    "HSV": (filled("HSV", (0, 255, 255)), RED),
    "I": (pgm16(128 * 257), GRAY),
    "I, white": (array(65535, np.int32), WHITE),
    "I;16": (png16(128 * 257), GRAY),
    "I;16, dark": (png16(257), (1, 1, 1)),
    "I;16 with tRNS": (png16(300, transparent=255), (1, 1, 1)),
    "I;16 that is transparent": (filled("I;16", 300, transparency=300), WHITE),
    "I;16B": (Image.frombytes("I;16B", (2, 2), (128 * 257).to_bytes(2, "big") * 4), GRAY),
    "F to 1": (array(0.5, np.float32), GRAY),
    "F to 255": (array(128.0, np.float32), GRAY),
    "animated GIF": (animated("GIF"), RED),
    "animated WebP": (animated("WEBP"), RED),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_is_the_color_that_a_person_sees(name):
    image, expected = MODES[name]
    found = images.to_rgb(image)
    assert found.mode == "RGB" and found.size == image.size
    assert np.abs(np.asarray(found, int) - expected).max() <= 1
    mode = name.split(" ")[0].rstrip(",")
    assert image.mode == mode or mode in ("animated",), image.mode


@pytest.mark.parametrize(
    "values",
    [
        np.array([[70000]], np.int32),
        np.array([[-1]], np.int32),
        np.array([[np.nan]], np.float32),
        np.array([[300.0]], np.float32),
    ],
)
def test_values_without_a_known_range_are_an_error(values):
    with pytest.raises(images.ImageError, match=r"values from .* outside 0\.\..*save it with 8 or 16 bits"):
        images.to_rgb(Image.fromarray(values))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_files_are_upright(orientation, kind, tmp_path):
    """The stored rows are what the inverse of EXIF's eight turns makes of an upright image."""
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8] = 255
    turned = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation](upright)
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(np.ascontiguousarray(turned)).save(tmp_path / "a", kind, exif=exif, quality=95)
    found = np.asarray(images.to_rgb(images.open_upright(tmp_path / "a")), int)
    assert found.shape == upright.shape and np.abs(found - upright).mean() < 8


def test_files_that_are_not_images_are_named(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(images.ImageError, match="text.png is not an undamaged image"):
        images.open_upright(tmp_path / "text.png")
    file = io.BytesIO()
    Image.effect_noise((64, 64), 9).save(file, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(file.getvalue()[:900])
    with pytest.raises(images.ImageError, match="cut.jpg is not an undamaged image.*truncated"):
        images.open_upright(tmp_path / "cut.jpg")
    with pytest.raises(FileNotFoundError, match="none.png"):
        images.open_upright(tmp_path / "none.png")
    with pytest.raises(images.ImageError, match="64 x 64 pixels are more than 100"):
        images.open_upright(io.BytesIO(file.getvalue()), max_pixels=100)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_are_understood(encoding):
    assert files.decode("ein Kreis, größer\n".encode(encoding), "a.txt") == "ein Kreis, größer\n"
    assert files.decode("".encode(encoding), "a.txt") == ""


@pytest.mark.parametrize(
    "data, message",
    [
        ("größer".encode("latin-1"), "not UTF-8 .*at byte 2"),
        ("circle".encode("utf-16-le"), "NUL characters"),
        (b"\xff\xfea", "not UTF-16"),
    ],
)
def test_other_bytes_are_not_text(data, message):
    with pytest.raises(files.TextError, match=f"^a.txt .*{message}.*save it as UTF-8"):
        files.decode(data, "a.txt")
