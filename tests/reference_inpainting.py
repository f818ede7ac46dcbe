"""Diffusers' own inpainting pipelines in small, an image and a mask."""

import numpy as np
import pytest
import reference_families
from PIL import Image

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")


def build(folder, family):
    """Diffusers' inpainting pipeline, written to `folder`/model."""
    plain = reference_families.build(folder, family)
    torch.manual_seed(1)
    unet = diffusers.UNet2DConditionModel(**reference_families.FAMILIES[family][0], in_channels=9).eval()
    with torch.no_grad():
        unet.conv_in.weight[:, 4:].mul_(10.0)  # so that mask and picture are seen
    parts = plain.components | {"unet": unet}
    if "xl" in family:
        theirs = diffusers.StableDiffusionXLInpaintPipeline(**parts, add_watermarker=False)
    else:
        theirs = diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(folder / "model")
    return theirs


def image(seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Smooth colours, of another size than is asked for."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(coarse).resize((40, 30), Image.Resampling.BICUBIC).convert(mode)


def mask(left: int = 0, right: int = 17, mode: str = "L") -> Image.Image:
    """White where to paint, with an edge that falls between two latents."""
    array = np.zeros((30, 40), np.uint8)
    array[4:21, left:right] = 255
    return Image.fromarray(array).convert(mode)
