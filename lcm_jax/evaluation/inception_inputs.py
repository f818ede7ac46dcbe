"""The inputs of Inception v3, made from images as each tool that publishes FID makes them: the flavours.

Tools resize differently, which changes FID by points, so a flavour is named with every figure.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image

from lcm_jax.evaluation.evaluate import Images
from lcm_jax.models.inception import INPUT_SIZE

GIGAGAN_SIZE = 256


class Flavour(NamedTuple):
    """A tool's way from images to statistics.

    prepare: uint8[H, W, 3] -> float32[299, 299, 3], in [-1, 1]. mean: the dtype in which the tool averages features.
    one_size: True if the tool reads only sets whose images have one size.
    """

    prepare: Callable[[np.ndarray], np.ndarray]
    mean: type[np.floating]
    one_size: bool


def torch_fidelity(image: np.ndarray) -> np.ndarray:
    """Resize as TensorFlow 1 did: bilinear without half-pixel centers, not antialiased."""
    resized = _interpolate(image.astype(np.float32), INPUT_SIZE, lambda index, scale: index * scale)
    return (resized - 128) / 128


def pytorch_fid(image: np.ndarray) -> np.ndarray:
    """Resize by `pytorch_bilinear`."""
    return 2 * pytorch_bilinear(image.astype(np.float32) / 255, INPUT_SIZE) - 1


def clean_fid(image: np.ndarray) -> np.ndarray:
    """Resize each channel by PIL's antialiased bicubic filter in float32, without rounding (arXiv 2104.11222)."""
    size, bicubic = (INPUT_SIZE, INPUT_SIZE), Image.Resampling.BICUBIC
    channels = [Image.fromarray(image[..., i].astype(np.float32)).resize(size, bicubic) for i in range(3)]
    return (np.stack([np.asarray(channel) for channel in channels], -1).clip(0, 255) - 128) / 128


def gigagan(image: np.ndarray) -> np.ndarray:
    """Crop the central square, resize it to 256 x 256 by PIL's Lanczos filter, then as `clean_fid`.

    The protocol of GigaGAN (arXiv 2303.05511) and DMD2 (arXiv 2405.14867) on COCO, for real images as well.
    """
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = round((height - side) / 2), round((width - side) / 2)
    square = Image.fromarray(image[top : top + side, left : left + side])
    return clean_fid(np.asarray(square.resize((GIGAGAN_SIZE, GIGAGAN_SIZE), Image.Resampling.LANCZOS)))


FLAVOURS: Mapping[str, Flavour] = {
    "torch-fidelity": Flavour(torch_fidelity, np.float32, one_size=True),
    "pytorch-fid": Flavour(pytorch_fid, np.float64, one_size=True),
    "clean-fid": Flavour(clean_fid, np.float32, one_size=False),
    "gigagan": Flavour(gigagan, np.float32, one_size=False),
}


def prepare_images(images: Images, flavour: str) -> np.ndarray:
    """images: uint8[H, W, 3] each. Return float32[B, 299, 299, 3], in [-1, 1].

    Raises ValueError for another shape or dtype.
    """
    for image in images:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.size:
            raise ValueError(f"an image is {image.dtype.name}{list(image.shape)}; use RGB images, uint8[H, W, 3]")
    with ThreadPoolExecutor() as pool:  # PIL and NumPy release the lock
        return np.stack(list(pool.map(FLAVOURS[flavour].prepare, images)))


def check_one_size(sizes: np.ndarray, flavour: str) -> None:
    """sizes: int[N, 2], (height, width). Raise ValueError if they differ and the tool cannot read such a set."""
    different = np.unique(sizes, axis=0)
    if FLAVOURS[flavour].one_size and len(different) > 1:
        (height, width), (other_height, other_width) = different[:2].tolist()
        free = " or ".join(name for name, each in FLAVOURS.items() if not each.one_size)
        raise ValueError(
            f"images of one set have {len(different)} sizes, such as {width} x {height} and {other_width} x "
            f"{other_height}, which {flavour} does not support; resize them, or use --fid_flavour={free}"
        )


def pytorch_bilinear(image: np.ndarray, size: int) -> np.ndarray:
    """image: float32[H, W, 3]. Resize as PyTorch does: bilinear with half-pixel centers, not antialiased."""

    def position(index: np.ndarray, scale: np.float32) -> np.ndarray:
        at = (index.astype(np.float64) + 0.5) * float(scale) - 0.5
        return np.maximum(at, 0).astype(np.float32)  # rounded once, since processors fuse the two operations

    return _interpolate(image, size, position)


def _interpolate(image: np.ndarray, size: int, position: Callable[[np.ndarray, np.float32], np.ndarray]) -> np.ndarray:
    """image: float32[H, W, 3]. Return [size, size, 3], linear between two pixels along each axis.

    position: (indices float32[size] of the output, input size / size) -> positions in the input.
    """
    for axis in (1, 0):
        length = image.shape[axis]
        at = position(np.arange(size, dtype=np.float32), np.float32(length / size))
        low = at.astype(np.int64)
        a, b = image.take(low, axis), image.take(np.minimum(low + 1, length - 1), axis)
        image = a + (b - a) * (at - low).astype(np.float32).reshape((-1, 1) if axis else (-1, 1, 1))
    return image
