"""Aspect-ratio buckets: a few shapes of images, each of which an image of any shape is cropped to the nearest of."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

Size = tuple[int, int]  # (height, width) in pixels


def check_buckets(buckets: Any) -> tuple[Size, ...]:
    """Return the sizes of `data.buckets`. Raises ValueError if these are not sizes, or two have one aspect ratio."""
    example = "use (height, width) pairs in pixels, each of another ratio, such as ((512, 512), (448, 576), (576, 448))"
    try:
        sizes = tuple((height, width) for height, width in buckets)
    except (TypeError, ValueError):
        raise ValueError(f"data.buckets {buckets!r} is not supported; {example}") from None
    ratios = []
    for size in sizes:
        valid = all(type(side) is int and side >= 8 for side in size)
        if not valid or (ratio := Fraction(*size)) in ratios:
            raise ValueError(f"data.buckets has {size!r}, which is not supported; {example}")
        ratios.append(ratio)
    return sizes


def nearest_bucket(sizes: np.ndarray, buckets: Sequence[Size]) -> np.ndarray:
    """Return the number of the bucket whose aspect ratio is the nearest to that of each image, int32[N].

    sizes: [N, 2], (height, width); 0 is unknown, and counts as a square. Ratios differ by their logarithms, so that
    2:1 is as far from a square as 1:2 is.
    """
    known = (sizes > 0).all(axis=1)
    ratio = np.zeros(len(sizes))
    ratio[known] = np.log(sizes[known, 0] / sizes[known, 1])
    ratios = np.array([np.log(height / width) for height, width in buckets])
    # By places between neighbors, so that millions of images need no table of all distances.
    order = np.argsort(ratios, kind="stable")
    middles = (ratios[order][1:] + ratios[order][:-1]) / 2
    return order[np.searchsorted(middles, ratio)].astype(np.int32)
