"""Masks for models that inpaint: random ones for each training record, fixed ones for held-out images."""

from collections.abc import Mapping
from typing import Any

import numpy as np

FULL = 0.25  # of all masks cover the image, as those that Stable Diffusion's inpainting models were trained with
MIN_EXTENT = 0.25  # of a rectangle's height and width, as a fraction of the image's
FIXED_SEED = 3


def random_mask(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return uint8[height, width, 1], 255 where to paint: a random rectangle, or everywhere (`FULL`).

    Each side of the rectangle is uniform in `MIN_EXTENT`..1 of the image's, and its place uniform within the image.
    """
    full = rng.uniform() < FULL
    extent = np.ones(2) if full else rng.uniform(MIN_EXTENT, 1.0, 2)
    first = rng.uniform(size=2) * (1.0 - extent)

    def inside(axis: int, size: int) -> np.ndarray:
        middle = (np.arange(size) + 0.5) / size
        return (middle >= first[axis]) & (middle <= first[axis] + extent[axis])

    return np.where(inside(0, height)[:, None] & inside(1, width)[None, :], np.uint8(255), np.uint8(0))[..., None]


def add_mask(record: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Return the record with "mask", a `random_mask` of the size of its "image"."""
    height, width, _ = record["image"].shape
    return {**record, "mask": random_mask(rng, height, width)}


def fixed_masks(count: int, height: int, width: int) -> np.ndarray:
    """Return uint8[count, height, width, 1]: the same random masks each time, for previews and reports.

    Mask i does not depend on `count`.
    """
    rng = np.random.default_rng(FIXED_SEED)
    return np.stack([random_mask(rng, height, width) for _ in range(count)])
