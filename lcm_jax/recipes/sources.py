"""Shapes of batches, pixels as floats, the autoencoder as an encoder, and digests of parameters."""

import hashlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from lcm_jax.diffusion.pixels import to_float
from lcm_jax.models.stable_diffusion import StableDiffusion


def batch_shapes(model: StableDiffusion, size: int, count: int, content: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes and dtypes of a batch of `count` images of size x size pixels and their captions.

    content: "image" for uint8[B, H, W, 3], or "moments" for float32[B, h, w, 2c], as data.encode=cache stores them.
    Raises ValueError if the autoencoder does not divide the size.
    """
    length = model.text_encoder.config.max_position_embeddings
    ids = (length,) if model.text_encoder_2 is None else (2, length)
    if size % model.downscale:
        raise ValueError(f"data.size {size} is not supported; use a multiple of {model.downscale}, for the autoencoder")
    side, channels = size // model.downscale, 2 * model.vae.config["latent_channels"]
    contents = {
        "image": jax.ShapeDtypeStruct((count, size, size, 3), jnp.uint8),
        "moments": jax.ShapeDtypeStruct((count, side, side, channels), jnp.float32),
    }
    return {
        "token_ids": jax.ShapeDtypeStruct((count, *ids), jnp.int32),
        "time_ids": jax.ShapeDtypeStruct((count, 6), jnp.float32),
        content: contents[content],
    }


def make_encoder(model: StableDiffusion, vae_params) -> Callable[[], Callable[[np.ndarray], jax.Array]]:
    """Return a function without arguments: it puts the autoencoder on a device and returns images -> moments."""

    def make():
        encode, on_device = jax.jit(lambda params, x: model.encode(params, to_float(x))), jax.device_put(vae_params)
        return lambda images: encode(on_device, images)

    return make


def digest(params) -> str:
    """sha256 of a parameter tree's names and bytes, in hexadecimal."""
    total = hashlib.sha256()
    for path, leaf in sorted(flatten_dict(params).items()):
        total.update("/".join(path).encode())
        total.update(np.ascontiguousarray(leaf).tobytes())
    return total.hexdigest()
