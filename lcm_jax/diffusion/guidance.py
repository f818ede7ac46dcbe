"""Classifier-free guidance (arXiv 2207.12598), and how much of it a timestep takes."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def classifier_free(uncond, cond, w):
    """cond + w (cond - uncond) with the paper's w = guidance_scale - 1 of diffusers."""
    return cond + w * (cond - uncond)


def capped(w: jax.Array, t: jax.Array, caps: Sequence[tuple[int, float]]) -> jax.Array:
    """The weight that guides at t, float32[B]: w, but at most what the last of `caps` at or before t allows.

    w: float32[B]; t: int32[B]. caps: (timestep, most) pairs, timesteps rising; from that timestep on, towards noise, w
    counts as `most` where it is more. ((0, 0.0), (300, inf)) guides an interval, as arXiv 2404.07724 does.
    """
    most = jnp.full(w.shape, jnp.inf, jnp.float32)
    for first, limit in caps:
        most = jnp.where(t >= first, limit, most)
    return jnp.minimum(w, most)
