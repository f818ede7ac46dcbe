"""Captioned images as a source stores them, by number: all that a source has to know."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from PIL import Image

from lcm_jax.data import images
from lcm_jax.data.captioned import SourceError
from lcm_jax.files import whole_file

THREADS = 8  # that read the headers of images


class StoredImages(Protocol):
    """Captioned images as a source stores them, by number.

    formats: Pillow's names of those to accept. values: float64[N] of each field that filters name, NaN for images
    without it.
    """

    @property
    def formats(self) -> Sequence[str]: ...

    @property
    def values(self) -> Mapping[str, np.ndarray]: ...

    def __len__(self) -> int: ...

    def name(self, number: int) -> str:
        """Return the name of an image in messages."""
        ...

    def captions(self, number: int) -> Sequence[str]:
        """Return one or more captions of an image. Raises whatever reading them raises, CaptionError if it has none."""
        ...

    def image(self, number: int) -> BinaryIO | np.ndarray:
        """Return an image as an open file, or uint8[H, W], [H, W, 1], [H, W, 3] or [H, W, 4].

        Raises SourceError if the files of the source are gone.
        """
        ...

    def digest(self, numbers: np.ndarray) -> str:
        """Return a digest of the files that these images and captions are in. numbers: int64[n]."""
        ...


def open_image(stored: StoredImages, number: int) -> Image.Image:
    """Return an image upright, as RGB. Raises ImageError, and whatever reading it raises."""
    image = stored.image(number)
    if isinstance(image, np.ndarray):
        height, width = image.shape[:2]
        if width * height > images.MAX_PIXELS:
            raise images.ImageError(f"{width} x {height} pixels are more than {images.MAX_PIXELS}")
        return images.to_rgb(Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image))
    with image as file:
        return images.to_rgb(images.open_upright(file, tuple(stored.formats), images.MAX_PIXELS))


def read_sizes(stored: StoredImages, folder: Path, log: Callable[[str], None]) -> np.ndarray:
    """Return (height, width) of every image, upright, int32[N, 2]; 0 for those that cannot be read.

    They are the fields "height" and "width" where both are known, else those of the image's header, which is read.
    folder: keeps them under a digest of the files.
    """
    sizes = np.zeros((len(stored), 2), np.int32)
    known = np.ones(len(stored), bool)
    for axis, field in enumerate(("height", "width")):
        value = stored.values[field]
        known &= (value >= 1) & (value < 2**31)
        sizes[:, axis] = np.where(known, value, 0)
    unknown = np.flatnonzero(~known)
    sizes[unknown] = 0
    if not len(unknown):
        return sizes
    path = folder / f"sizes-{stored.digest(np.arange(len(stored)))[:16]}.npy"
    if path.exists():
        return np.load(path)

    def read(number: int) -> tuple[int, int]:
        try:
            image = stored.image(number)
            if isinstance(image, np.ndarray):
                return image.shape[0], image.shape[1]
            with image as file:
                return images.upright_size(file, tuple(stored.formats))
        except SourceError:
            raise
        except Exception:  # it is reported, with its reason, when it is read to train on
            return 0, 0

    log(f"reading the sizes of {len(unknown)} images from their headers")
    with ThreadPoolExecutor(THREADS) as pool:
        sizes[unknown] = list(pool.map(read, map(int, unknown)))
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, sizes)
    return sizes


def digest(*parts: bytes | str) -> str:
    """Return a hexadecimal digest of all parts, in order."""
    found = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()
