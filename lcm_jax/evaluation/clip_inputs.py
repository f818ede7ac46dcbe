"""Inputs of CLIP's and DINOv2's towers, equal to the pixel to those of the tools that published figures come from.

A `Preprocess` takes uint8[H, W, 3] and the size of the inputs, and returns float32[size, size, 3], normalized. PIL
resizes, bicubic and antialiased.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training images
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Preprocess = Callable[[np.ndarray, int], np.ndarray]


def normalize(image: np.ndarray, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> np.ndarray:
    """image: uint8 or float[H, W, 3] in [0, 255]. Return (image / 255 - mean) / std in float32."""
    pixels = image.astype(np.float32) / np.float32(255)
    return (pixels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """image: uint8[H, W, 3] -> uint8[height, width, 3]."""
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def shorten(image: np.ndarray, size: int) -> np.ndarray:
    """Resize an image so that its shorter side has `size` pixels; the other is rounded down."""
    height, width = image.shape[:2]
    if height <= width:
        return resize(image, size, int(size * width / height))
    return resize(image, int(size * height / width), size)


def for_transformers(image: np.ndarray, size: int) -> np.ndarray:
    """Resize the shorter side and crop the center, as transformers' CLIPImageProcessor does by PIL.

    If the rest is odd, one pixel more is cut off at the right or at the bottom.
    """
    image = shorten(image, size)
    top, left = ((side - size) // 2 for side in image.shape[:2])
    return normalize(image[top : top + size, left : left + size])


def for_open_clip(image: np.ndarray, size: int) -> np.ndarray:
    """Resize the shorter side and crop the center, as OpenCLIP and OpenAI's CLIP do by torchvision.

    It differs from `for_transformers` if the rest is odd: half of it is rounded to an even number.
    """
    image = shorten(image, size)
    top, left = (round((side - size) / 2) for side in image.shape[:2])
    return normalize(image[top : top + size, left : left + size])


def for_hps(image: np.ndarray, size: int) -> np.ndarray:
    """Resize the longer side in floating point, and center the image on black, as HPSv2 does by torchvision."""
    scale = size / max(image.shape[:2])
    height, width = (round(side * scale) for side in image.shape[:2])
    resized = image.astype(np.float32)
    if (height, width) != image.shape[:2]:
        channels = [Image.fromarray(resized[..., i]) for i in range(3)]
        resized = np.stack(
            [np.asarray(each.resize((width, height), Image.Resampling.BICUBIC)) for each in channels], axis=-1
        )
    top, left = (size - height) // 2, (size - width) // 2
    padded = np.zeros((size, size, 3), np.float32)
    padded[top : top + height, left : left + width] = resized
    return normalize(padded)


def for_cmmd(image: np.ndarray, size: int) -> np.ndarray:
    """Crop the square at the center, then resize it, as the code of CMMD does (google-research, folder cmmd)."""
    side = min(image.shape[:2])
    top, left = ((each - side) // 2 for each in image.shape[:2])
    return normalize(resize(image[top : top + side, left : left + side], size, size))


def for_dinov2(image: np.ndarray, size: int) -> np.ndarray:
    """Resize to a square whatever the aspect, as the code of FD-DINOv2 does (layer6ai-labs/dgm-eval)."""
    return normalize(resize(image, size, size), IMAGENET_MEAN, IMAGENET_STD)
