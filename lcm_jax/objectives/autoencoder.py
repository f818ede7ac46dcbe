"""A KL-regularised autoencoder (arXiv 2112.10752, section 3.1), without its perceptual and adversarial terms."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcm_jax.diffusion.pixels import to_float


class Networks(NamedTuple):
    """encode(params, images float32[B,H,W,3]) -> moments [B,h,w,2c]; decode(params, latents [B,h,w,c]) -> images."""

    encode: Callable
    decode: Callable


class Draws(NamedTuple):
    noise: jax.Array  # float32[B, h, w, c], picks the latent from its posterior


def draw(rng: jax.Array, batch, *, downscale: int, channels: int) -> Draws:
    """batch: {"image": uint8[B,H,W,3]}; downscale: pixels per latent along one axis."""
    b, height, width, _ = batch["image"].shape
    return Draws(jax.random.normal(rng, (b, height // downscale, width // downscale, channels), jnp.float32))


def loss(params, target, frozen, batch, draws: Draws, *, networks: Networks, kl_weight: float):
    """mean |x - D(mu + sigma e)| + kl_weight mean KL(q(z|x) || N(0, 1)), each a mean over all its elements.

    Returns (float32[], metrics).
    """
    images = to_float(batch["image"])
    mean, logvar = jnp.split(networks.encode(params, images), 2, axis=-1)
    logvar = jnp.clip(logvar, -30.0, 20.0)
    reconstruction = networks.decode(params, mean + jnp.exp(0.5 * logvar) * draws.noise)

    difference = reconstruction - images
    absolute = jnp.mean(jnp.abs(difference))
    kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
    total = absolute + kl_weight * kl
    return total, {"loss": total, "absolute_error": absolute, "kl": kl, "mse": jnp.mean(jnp.square(difference))}
