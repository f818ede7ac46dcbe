"""Image files and PIL images of every mode, as the RGB image that a person sees."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 2**26  # of an image to train on: a small file can unpack to more than the memory holds


class ImageError(ValueError):
    """A file or an image that cannot be shown."""


def open_upright(
    file: str | Path | BinaryIO, formats: tuple[str, ...] | None = None, max_pixels: int | None = None
) -> Image.Image:
    """Return the image of a file, turned as its EXIF orientation says; the first frame of an animation.

    formats: Pillow's names of the formats to accept, all by default. max_pixels: the largest width x height to decode.
    Raises ImageError if the file is not an image or has more pixels, and OSError if it cannot be opened.
    """
    try:
        with Image.open(file, formats=formats) as stored:
            width, height = stored.size
            if max_pixels is not None and width * height > max_pixels:
                raise ImageError(f"{width} x {height} pixels are more than {max_pixels}")
            return ImageOps.exif_transpose(stored)
    except Exception as error:  # Pillow's decoders raise many kinds
        if isinstance(error, OSError) and error.errno is not None:  # no such file, no permission
            raise
        what = "" if hasattr(file, "read") else f"{file} is not an undamaged image; use another file: "
        reason = "its format is unknown" if isinstance(error, UnidentifiedImageError) else error
        raise ImageError(f"{what}{reason}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a PIL image of any mode as 8-bit RGB.

    Transparency, as an alpha channel or as a transparent color, is composited on white. 16 bits (I;16, and I, which
    Pillow opens 16-bit PGM files as) are scaled to 8, not clipped. Floats (F) are 0..1 if none is above 1, else 0..255.
    Raises ImageError if an I or F image has values outside these ranges.
    """
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bits(image)).convert("RGB")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    transparent = image.info.get("transparency")
    if image.mode == "La":  # Pillow converts it to LA alone
        image = image.convert("LA")
    elif isinstance(transparent, tuple) and max(transparent) > 255:
        image = image.copy()  # Pillow narrows the pixels of a 16-bit PNG to 8 bits, but not this color
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def crop(
    image: Image.Image, height: int, width: int, rng: np.random.Generator | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return part of an RGB image, uint8[height, width, 3], and SDXL's sizes for it, float32[6] (see `time_ids`).

    As in the published scripts, the image is resized, up or down, until it just covers height x width, with Pillow's
    bilinear filter, which averages when it shrinks. The part is at a place that `rng` chooses, or in the middle.
    Raises ImageError if the image is so narrow that resizing it takes more than `MAX_PIXELS`.
    """
    stored_width, stored_height = image.size
    if height * stored_width >= width * stored_height:
        resized = (height * stored_width // stored_height, height)
    else:
        resized = (width, width * stored_height // stored_width)
    if resized[0] * resized[1] > MAX_PIXELS:
        raise ImageError(f"{stored_width} x {stored_height} pixels are too narrow a strip")
    image = image.resize(resized, Image.Resampling.BILINEAR)
    room = (resized[1] - height, resized[0] - width)
    top, left = (side // 2 if rng is None else int(rng.integers(side + 1)) for side in room)
    sizes = np.array([stored_height, stored_width, top, left, height, width], np.float32)
    return np.asarray(image.crop((left, top, left + width, top + height))), sizes


def upright_size(file: BinaryIO, formats: tuple[str, ...] | None = None) -> tuple[int, int]:
    """Return (height, width) of an image file as it is upright, from its header. Raises as `open_upright` does."""
    try:
        with Image.open(file, formats=formats) as stored:
            width, height = stored.size
            turned = stored.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            return (width, height) if turned else (height, width)
    except Exception as error:  # Pillow's decoders raise many kinds
        raise ImageError(str(error)) from error


def _to_8_bits(image: Image.Image) -> np.ndarray:
    """Gray values of mode I, I;16 or F -> uint8[H, W], white at a transparent value."""
    values = np.asarray(image)
    if image.mode == "F":
        top = 1 if values.max() <= 1 else 255
    else:
        top = 65535
    if not (values.min() >= 0 and values.max() <= top):  # NaN neither
        raise ImageError(
            f"an image of mode {image.mode} has values from {values.min()} to {values.max()}, outside 0..{top}; "
            "save it with 8 or 16 bits"
        )
    gray = np.round(values.astype(np.float64) * (255 / top)).astype(np.uint8)
    if "transparency" in image.info:
        gray[values == image.info["transparency"]] = 255
    return gray
