"""A model that inpaints as teacher: behind the noisy latents its UNet sees a mask, and the latents of what is kept.

Both ride with the context, so that whatever the objective does with the examples of a batch (pairs of them for
guidance, some in place of all) is done with these as well.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.diffusion.pixels import to_float
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.objectives import lcd
from lcm_jax.sampling.generate import masked_channels
from lcm_jax.sampling.inputs import Inpainting

EVERYWHERE = 0.25  # of all masks cover all, as those that Stable Diffusion's inpainting models were trained with
SEED = 3  # of the masks that samples and reports are drawn with


class Draws(NamedTuple):
    step: lcd.Draws
    mask: jax.Array  # float32[B, H, W, 1], 1 where to paint
    posterior: jax.Array  # float32[B, h, w, c], picks the latent of what is kept from the autoencoder's posterior


def draw_masks(rng: jax.Array, count: int, height: int, width: int) -> jax.Array:
    """float32[count, height, width, 1]: a rectangle of ones, each side from a quarter of the picture's to all of it,
    or ones alone (`EVERYWHERE`)."""
    extents, corners, everywhere = jax.random.split(rng, 3)
    everywhere = jax.random.uniform(everywhere, (count, 1), jnp.float32) < EVERYWHERE
    extent = jnp.where(everywhere, 1.0, jax.random.uniform(extents, (count, 2), jnp.float32, minval=0.25))
    first = jax.random.uniform(corners, (count, 2), jnp.float32) * (1.0 - extent)

    def inside(axis: int, size: int) -> jax.Array:
        middle = (jnp.arange(size, dtype=jnp.float32) + 0.5)[None] / size
        return (middle >= first[:, axis, None]) & (middle <= (first + extent)[:, axis, None])

    return (inside(0, height)[:, :, None] & inside(1, width)[:, None, :]).astype(jnp.float32)[..., None]


def masking(
    draw: Callable, loss: Callable, networks: lcd.Networks, model: StableDiffusion
) -> tuple[Callable, Callable]:
    """draw and loss(params, target, frozen, batch, draws) with a mask for each picture.

    loss: takes `networks` by name. batch has "image" uint8[B, H, W, 3] beside its moments; frozen the autoencoder.
    """

    def draw_with_masks(rng, batch):
        step, mask, posterior = jax.random.split(rng, 3)
        b, h, w, c2 = batch["moments"].shape
        masks = draw_masks(mask, b, h * model.downscale, w * model.downscale)
        return Draws(draw(step, batch), masks, jax.random.normal(posterior, (b, h, w, c2 // 2), jnp.float32))

    def loss_of_masked(params, target, frozen, batch, draws):
        kept = Inpainting(to_float(batch["image"]), draws.mask, draws.posterior)
        masked = masked_channels(model, frozen, kept)
        seeing = networks._replace(
            encode_prompt=lambda *prompt: networks.encode_prompt(*prompt)._replace(masked=masked)
        )
        return loss(params, target, frozen, batch, draws.step, networks=seeing)

    return draw_with_masks, loss_of_masked


def to_paint(model: StableDiffusion, records: Sequence, count: int) -> Inpainting | None:
    """The first `count` of `records` and the same masks each time; None for a model that does not inpaint."""
    if not model.inpaints:
        return None
    images = np.stack([records[i]["image"] for i in range(count)])
    _, height, width, _ = images.shape
    mask, noise = jax.random.split(jax.random.key(SEED))
    shape = (count, height // model.downscale, width // model.downscale, model.vae.config["latent_channels"])
    return Inpainting(
        to_float(images), draw_masks(mask, count, height, width), jax.random.normal(noise, shape, jnp.float32)
    )
