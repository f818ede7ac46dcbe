"""All that images are made from, as one pytree, and how its parts are made."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from lcm_jax.data import images
from lcm_jax.diffusion.pixels import to_float
from lcm_jax.sampling.control import Control


class Inpainting(NamedTuple):
    """Inputs of an inpainting model; N is 1 (shared by all images) or B.

    image: float32[N, H, W, 3] in [-1, 1]. mask: float32[N, H, W, 1], 1 to repaint and 0 to keep. noise:
    float32[N, h, w, c], standard normal, that samples the image's latents from the autoencoder's posterior.
    """

    image: Any
    mask: Any
    noise: Any


class Source(NamedTuple):
    """Image that the latents start from or are blended with; N is 1 (shared by all images) or B.

    image: float32[N, H, W, 3] in [-1, 1]. noise: float32[N, h, w, c], standard normal, that samples the image's latents
    from the autoencoder's posterior. mask: float32[N, H, W, 1], 1 to repaint and 0 to keep: after each step the latents
    to keep are replaced by the image's, at the same level of noise. None repaints everything.
    """

    image: Any
    noise: Any
    mask: Any = None


class Inputs(NamedTuple):
    """Inputs of B images; an absent part is None.

    token_ids, negative_ids: int32[B, C, L] of C chunks, or int32[B, 2, C, L] for SDXL, of the prompts and of what to
    guide away from, as a rule the empty prompt; None samples without classifier-free guidance, in one pass; one chunk
    may be without its axis. token_weights, negative_weights: float32, of their shapes. latents: float32[B, h, w, c],
    standard normal. noise: key[B], from which `step_noise` makes the noise that steps add. guidance_scale: float32[] in
    diffusers' convention, w + 1. time_ids: float32[B, 6], SDXL's sizes. inpainting: for an inpainting model. source:
    for image-to-image, and for inpainting with a model that was not trained for it. control: for each ControlNet.
    """

    token_ids: Any
    negative_ids: Any
    latents: Any
    noise: Any
    guidance_scale: Any
    time_ids: Any = None
    inpainting: Inpainting | None = None
    source: Source | None = None
    control: tuple[Control, ...] | None = None
    token_weights: Any = None
    negative_weights: Any = None


def make_time_ids(
    count: int, size: tuple[int, int], original: tuple[int, int] | None = None, corner: tuple[int, int] = (0, 0)
) -> np.ndarray:
    """Return SDXL's sizes, float32[count, 6]: original (height, width), (top, left) of the crop, (height, width)."""
    return np.tile(np.array([*(original or size), *corner, *size], np.float32), (count, 1))


@partial(jax.jit, static_argnames="shape")
def draw_noise(seed: int, numbers: np.ndarray, shape: tuple[int, int, int]) -> tuple[jax.Array, jax.Array]:
    """Return (latents float32[B, h, w, c], noise key[B]) of the images with these numbers, uint32[B].

    An image's numbers depend on the seed and on its own number alone, so that it is the same in any batch.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers)
    return _normal(keys, 0, shape), keys


def step_noise(noise: jax.Array, i: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """Return the noise that step i adds, float32[B, h, w, c]. noise: key[B] of `draw_noise`."""
    return _normal(noise, i + 1, shape)


def _normal(keys: jax.Array, number: int | jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), shape, jnp.float32))(keys)


def draw_image_noise(seed: int, shape: tuple[int, int, int]) -> jax.Array:
    """Return float32[1, h, w, c] for the posterior of the image to inpaint; it depends on the seed alone."""
    key = jax.random.fold_in(jax.random.key(seed), 2**32 - 1)  # larger than the numbers of images in draw_noise
    return jax.random.normal(key, (1, *shape), jnp.float32)


def to_pixels(image: Image.Image, size: tuple[int, int]) -> jax.Array:
    """Return a PIL image of any mode, resized to (height, width), as float32[1, H, W, 3] in [-1, 1].

    Raises ImageError as `to_rgb` does.
    """
    return to_float(resize(image, size, "RGB"))


def to_unit(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Return a PIL image of any mode, resized to (height, width), as float32[1, H, W, 3] in [0, 1].

    Raises ImageError as `to_rgb` does.
    """
    return resize(image, size, "RGB").astype(np.float32) / 255.0


def to_mask(mask: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Return a PIL mask of any mode, resized, as float32[1, H, W, 1]: 1 where it is 50% white or more, else 0."""
    return (resize(mask, size, "L") >= 128).astype(np.float32)


def resize(image: Image.Image, size: tuple[int, int], mode: str) -> np.ndarray:
    """Return a PIL image of any mode as uint8[1, height, width, bands of `mode`], resized as diffusers does.

    mode: RGB or L. Raises ImageError as `to_rgb` does.
    """
    if image.mode != "1":  # resized without a filter, to the same mask as in diffusers
        image = images.to_rgb(image)
    height, width = size
    resized = image.resize((width, height), Image.Resampling.LANCZOS).convert(mode)
    return np.asarray(resized).reshape(1, height, width, len(resized.getbands()))
