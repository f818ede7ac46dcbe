"""The results of a call, in the type that was asked for."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image


@dataclass
class Output:
    """images: a list of PIL images, float32[N, H, W, 3] in [0, 1] (`np`), or latents float32[N, h, w, c]."""

    images: Any


def make_output(images: np.ndarray, output_type: str) -> Output:
    """Return images uint8[N, H, W, 3] as `pil` or `np`, or latents as they are."""
    if output_type == "pil":
        return Output([Image.fromarray(each) for each in images])
    return Output(images.astype(np.float32) / 255.0 if output_type == "np" else images)
