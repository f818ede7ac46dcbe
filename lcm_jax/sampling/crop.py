"""Inpainting at full resolution: crop the surroundings of a mask, and paste the generated images back over it."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


def crop_region(mask: Image.Image, size: tuple[int, int], padding: int) -> Box:
    """Return the box around the mask's pixels above 0, with `padding` pixels on each side, as diffusers has it.

    mask: mode L. size: (height, width), whose aspect ratio the box gets as far as the image reaches. Raises ValueError
    for a mask without such pixels.
    """
    box = mask.getbbox()
    if box is None:
        raise ValueError("mask_image is all black, so that padding_mask_crop has nothing to crop; mask a part in white")
    left, top = max(box[0] - padding, 0), max(box[1] - padding, 0)
    right, bottom = min(box[2] + padding, mask.width), min(box[3] + padding, mask.height)
    ratio = size[1] / size[0]
    if (right - left) / (bottom - top) > ratio:
        top, bottom = _widen(top, bottom, int((right - left) / ratio - (bottom - top)), mask.height)
    else:
        left, right = _widen(left, right, int((bottom - top) * ratio - (right - left)), mask.width)
    return left, top, right, bottom


def _widen(low: int, high: int, more: int, limit: int) -> tuple[int, int]:
    """Return the interval with `more` added to its length, within [0, limit]: moved inside first, then cut."""
    low, high = low - more // 2, high + more - more // 2
    excess = max(high - limit, 0)
    low, high = low - excess, high - excess
    if low < 0:
        low, high = 0, high - low
    return low, min(high, limit)


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize an image to fit into (height, width), centered; the rest repeats its outermost pixels.

    A box at the border of an image can miss the aspect ratio.
    """
    height, width = size
    wide = width / height < image.width / image.height
    inner = (
        width if wide else image.width * height // image.height,
        image.height * width // image.width if wide else height,
    )
    array = np.asarray(image.resize(inner, Image.Resampling.LANCZOS))
    top, left = height // 2 - inner[1] // 2, width // 2 - inner[0] // 2
    margins = ((top, height - top - inner[1]), (left, width - left - inner[0]), (0, 0))
    return Image.fromarray(np.pad(array, margins[: array.ndim], mode="edge"))


def paste(images: Sequence[Image.Image], original: Image.Image, mask: Image.Image, box: Box) -> list[Image.Image]:
    """Return `original` with each of the images, resized to the box, where the mask is white.

    original: mode RGB. mask: mode L, of the same size; gray pixels blend the two.
    """
    pasted = []
    for image in images:
        whole = original.copy()
        whole.paste(_cover(image, box[2] - box[0], box[3] - box[1]), box[:2])
        pasted.append(Image.composite(whole, original, mask))
    return pasted


def _cover(image: Image.Image, width: int, height: int) -> Image.Image:
    """Resize an image to cover width x height, and cut what is more on both sides."""
    wide = width / height > image.width / image.height
    outer = (
        width if wide else image.width * height // image.height,
        image.height * width // image.width if wide else height,
    )
    left, top = outer[0] // 2 - width // 2, outer[1] // 2 - height // 2
    return image.resize(outer, Image.Resampling.LANCZOS).crop((left, top, left + width, top + height))
