"""Pixels as files hold them, 8 bits, and as networks take them, in [-1, 1]."""

import jax
import jax.numpy as jnp
import numpy as np


def to_float(images: np.ndarray | jax.Array) -> jax.Array:
    """Return uint8[...] as float32[...] in [-1, 1]."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1.0


def to_uint8(images: jax.Array) -> jax.Array:
    """Return float32[...] in [-1, 1] as uint8[...], rounded; values outside are clipped."""
    return jnp.round(jnp.clip(images * 0.5 + 0.5, 0.0, 1.0) * 255.0).astype(jnp.uint8)
