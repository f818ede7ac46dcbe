"""The consistency function f(z, t) = c_skip z + c_out x0, and the embedding of the guidance weight (2310.04378)."""

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.diffusion.schedule import Schedule, like, predict_x0


def boundary_scalings(
    t: jax.Array, timestep_scaling: float = 10.0, sigma_data: float = 0.5
) -> tuple[jax.Array, jax.Array]:
    """Return (c_skip, c_out) = (d^2 / (u^2 + d^2), u / sqrt(u^2 + d^2)), float32 of t's shape, with u = 10 t.

    At t = 0 they are (1, 0), so that f(z, 0) = z.
    """
    u = jnp.asarray(t, jnp.float32) * timestep_scaling
    return sigma_data**2 / (u**2 + sigma_data**2), u / jnp.sqrt(u**2 + sigma_data**2)


def consistency_function(schedule: Schedule, output: jax.Array, z: jax.Array, t: jax.Array) -> jax.Array:
    """Return f(z, t), float32[B, h, w, c], from the network's output at z: [B, h, w, c] and t: int32[B]."""
    c_skip, c_out = boundary_scalings(t)
    return like(c_skip, z) * z + like(c_out, z) * predict_x0(schedule, output, z, t)


def guidance_embedding(w: jax.Array, dim: int = 256) -> jax.Array:
    """Return [sin, cos] of 1000 w exp(-j ln(10^4) / (dim/2 - 1)), j < dim/2, float32[B, dim].

    w: float32[B], the paper's weight (guidance_scale - 1). Computed in float32: in half precision the rounding error of
    1000 w exceeds a full turn.
    """
    half = dim // 2
    frequencies = np.exp(-np.arange(half) * np.log(10000.0) / (half - 1)).astype(np.float32)
    angles = 1000.0 * w.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
