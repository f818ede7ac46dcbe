"""The noise of images as arrays, for tests that pass it to another implementation."""

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.sampling import inputs


def draw_noise(
    seed: int, count: int, steps: int, shape: tuple[int, int, int], first: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Return (latents float32[count, h, w, c], noise float32[steps - 1, count, h, w, c])."""
    latents, keys = inputs.draw_noise(seed, np.arange(first, first + count, dtype=np.uint32), shape)
    noise = [inputs.step_noise(keys, i, shape) for i in range(steps - 1)]
    return latents, jnp.stack(noise) if noise else jnp.zeros((0, *latents.shape))
