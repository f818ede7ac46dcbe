"""A KL-regularized autoencoder (arXiv 2112.10752, section 3.1), without its perceptual and adversarial terms."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcm_jax.objectives.networks import Metrics
from lcm_jax.ranges import REAL, check_fields, setting


class Networks(NamedTuple):
    """Bound to their parameters: encode(images float32[B,H,W,3]) -> moments [B,h,w,2c]; decode(latents [B,h,w,c]) ->
    images."""

    encode: Callable[[jax.Array], jax.Array]
    decode: Callable[[jax.Array], jax.Array]


class Draws(NamedTuple):
    noise: jax.Array  # float32[B, h, w, c], picks the latent from its posterior


@dataclass(frozen=True)
class Autoencoder:
    """kl_weight: of the divergence from a standard normal, beside the absolute error. Raises ValueError below 0."""

    kl_weight: float = setting(1e-6, REAL)

    def __post_init__(self):
        check_fields(self, "objective")

    def draw(self, rng: jax.Array, latents: jax.ShapeDtypeStruct) -> Draws:
        """Draw the random numbers of a step for latents of that shape, [B, h, w, c]."""
        return Draws(jax.random.normal(rng, latents.shape, jnp.float32))

    def loss(self, networks: Networks, images: jax.Array, draws: Draws) -> tuple[jax.Array, Metrics]:
        """mean |x - D(mu + sigma e)| + kl_weight mean KL(q(z|x) || N(0, 1)), each a mean over all its elements.

        images: float32[B, H, W, 3] in [-1, 1]. Return (float32[], metrics).
        """
        mean, logvar = jnp.split(networks.encode(images), 2, axis=-1)
        logvar = jnp.clip(logvar, -30.0, 20.0)
        reconstruction = networks.decode(mean + jnp.exp(0.5 * logvar) * draws.noise)

        difference = reconstruction - images
        absolute = jnp.mean(jnp.abs(difference))
        kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
        total = absolute + self.kl_weight * kl
        return total, {"loss": total, "absolute_error": absolute, "kl": kl, "mse": jnp.mean(jnp.square(difference))}
