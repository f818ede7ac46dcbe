"""What images are made from: noise, sizes, and the image and mask of an inpainting model."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from lcm_jax.data import images


class Inpainting(NamedTuple):
    """Inputs of an inpainting model; N is 1 (shared by all images) or B."""

    image: jax.Array  # float32[N, H, W, 3] in -1..1
    mask: jax.Array  # float32[N, H, W, 1], 1 where to paint and 0 where to keep
    noise: jax.Array  # float32[N, h, w, c], for the autoencoder's draw


def make_time_ids(
    count: int, size: tuple[int, int], original: tuple[int, int] | None = None, corner: tuple[int, int] = (0, 0)
) -> np.ndarray:
    """SDXL's sizes, float32[count, 6]: original (height, width), the crop's (top, left), size (height, width)."""
    return np.tile(np.array([*(original or size), *corner, *size], np.float32), (count, 1))


def draw_noise(
    seed: int, count: int, steps: int, shape: tuple[int, int, int], first: int = 0
) -> tuple[jax.Array, jax.Array]:
    """(latents float32[count, h, w, c], noise float32[steps - 1, count, h, w, c]).

    Image i's numbers depend on (seed, first + i) alone, so that it is the same in any batch, and with 64-bit types
    enabled too.
    """

    def one(i):
        key = jax.random.fold_in(jax.random.key(seed), i)
        draws = [jax.random.normal(jax.random.fold_in(key, s), shape, jnp.float32) for s in range(steps)]
        return draws[0], jnp.stack(draws)[1:]

    latents, noise = jax.vmap(one)(jnp.arange(first, first + count, dtype=jnp.uint32))
    return latents, jnp.moveaxis(noise, 1, 0)


def draw_image_noise(seed: int, shape: tuple[int, int, int]) -> jax.Array:
    """float32[1, h, w, c] for the autoencoder's draw of the image to inpaint, by the seed alone."""
    key = jax.random.fold_in(jax.random.key(seed), 2**32 - 1)  # which no image's number reaches in draw_noise
    return jax.random.normal(key, (1, *shape), jnp.float32)


def to_pixels(image: Image.Image, height: int, width: int, mode: str) -> np.ndarray:
    """A PIL image of any mode -> float32[1, height, width, bands of `mode`] in 0..1, resized first, as diffusers does.

    mode: RGB or L. Raises ImageError as `to_rgb` does.
    """
    if image.mode != "1":  # which is resized without a filter, to the same mask as in diffusers
        image = images.to_rgb(image)
    resized = image.resize((width, height), Image.Resampling.LANCZOS).convert(mode)
    return np.asarray(resized, np.float32).reshape(1, height, width, len(resized.getbands())) / np.float32(255)
