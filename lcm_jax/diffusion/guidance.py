"""Classifier-free guidance (arXiv 2207.12598), and what keeps it from burning pictures."""

import jax
import jax.numpy as jnp


def classifier_free(uncond, cond, w):
    """cond + w (cond - uncond) with the paper's w = guidance_scale - 1 of diffusers."""
    return cond + w * (cond - uncond)


def excess_of_means(x0: jax.Array, cond: jax.Array, allowed: jax.Array) -> jax.Array:
    """How far guidance took the channel means of x0 beyond `allowed`, float32[B, 1, 1, c]; subtract it from x0.

    x0, cond: float32[B, h, w, c], guided and unguided. allowed: float32[2, c], the least and the greatest mean. Where
    `cond` itself lies beyond these, its own mean is the limit, so that an unguided prediction never changes. A static
    threshold as in arXiv 2205.11487, section 2.3, on means of latents in place of pixels: a mean that is guided away
    from what it was, such as a light ground's, burns the picture out.
    """
    own, mean = (jnp.mean(x, (1, 2), keepdims=True) for x in (cond, x0))
    least, greatest = jnp.expand_dims(allowed, (1, 2, 3))
    return mean - jnp.clip(mean, jnp.minimum(least, own), jnp.maximum(greatest, own))
