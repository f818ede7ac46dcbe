"""The tiny autoencoder of TAESD and TAESDXL (diffusers' AutoencoderTiny): plain convolutions, in milliseconds.

It has the methods of `models.vae.AutoencoderKL` and is interchangeable with it.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from lcm_jax.models.layers import ACTIVATIONS, COUNT, SIZE, Between, Conv, Dtype, activation, check_config, freeze

DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "encoder_block_out_channels": (64, 64, 64, 64),
    "decoder_block_out_channels": (64, 64, 64, 64),
    "act_fn": "relu",
    "latent_channels": 4,
    "num_encoder_blocks": (1, 3, 3, 3),
    "num_decoder_blocks": (3, 3, 3, 1),
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
}

# Supported values of every option in the published config.json files (see `supports` in layers.py).
SUPPORTED = {
    "in_channels": (SIZE,),
    "out_channels": (SIZE,),
    "encoder_block_out_channels": ([SIZE],),
    "decoder_block_out_channels": ([SIZE],),
    "latent_channels": (SIZE,),
    "num_encoder_blocks": ([COUNT],),
    "num_decoder_blocks": ([COUNT],),
    "scaling_factor": (Between(1e-6, 1e6),),
    "shift_factor": (None, Between(-1e6, 1e6)),
    "act_fn": tuple(ACTIVATIONS),
    "upsample_fn": ("nearest",),
    "upsampling_scaling_factor": (2,),
    "force_upcast": (True, False),
    "latent_magnitude": None,
    "latent_shift": None,  # only for storing latents as bytes
    "block_out_channels": None,
}

LOG_VARIANCE = -30.0  # stands for no posterior: exp(-15) is below the resolution of float32 latents


class TinyBlock(nn.Module):
    """relu(x + three convolutions of x), for x: [B, H, W, C]."""

    act: str
    dtype: Dtype

    @nn.compact
    def __call__(self, x):
        act, y = activation(self.act), x
        for i in (0, 2, 4):  # odd numbers are activations
            y = Conv(x.shape[-1], dtype=self.dtype, name=f"conv_{i}")(y if i == 0 else act(y))
        return nn.relu(x + y)


class Stack(nn.Module):
    """Layers numbered as in the keys of the weights, where activations and upsampling count as well."""

    config: Mapping[str, Any]
    dtype: Dtype

    @nn.compact
    def encode(self, x):
        """Return (features before the last layer, latents [B, h, w, c]) of images [B, H, W, 3] in [0, 1]."""
        c, count = self.config, 0
        for i, (width, blocks) in enumerate(zip(c["encoder_block_out_channels"], c["num_encoder_blocks"], strict=True)):
            x = Conv(width, stride=1 + (i > 0), bias=i == 0, dtype=self.dtype, name=f"layers_{count}")(x)
            for j in range(1, blocks + 1):
                x = TinyBlock(c["act_fn"], self.dtype, name=f"layers_{count + j}")(x)
            count += 1 + blocks
        return x, Conv(c["latent_channels"], dtype=self.dtype, name=f"layers_{count}")(x)

    @nn.compact
    def decode(self, z):
        """Return images [B, H, W, 3] in [0, 1] from latents [B, h, w, c]."""
        c, count = self.config, 2
        widths, numbers = c["decoder_block_out_channels"], c["num_decoder_blocks"]
        x = activation(c["act_fn"])(Conv(widths[0], dtype=self.dtype, name="layers_0")(z))
        for i, (width, blocks) in enumerate(zip(widths, numbers, strict=True)):
            last = i == len(widths) - 1
            for j in range(blocks):
                x = TinyBlock(c["act_fn"], self.dtype, name=f"layers_{count + j}")(x)
            count += blocks
            count += not last  # for the upsampling
            features = c["out_channels"] if last else width
            x = Conv(features, bias=last, upsample=not last, dtype=self.dtype, name=f"layers_{count}")(x)
            count += 1
        return x


class AutoencoderTiny(nn.Module):
    """Tiny autoencoder; build it with `from_config` and call `vae.apply({"params": p}, x, method="encode")`."""

    config: Mapping[str, Any]
    dtype: Dtype = jnp.float32

    @classmethod
    def from_config(cls, config: Mapping[str, Any], dtype: Dtype = jnp.float32) -> "AutoencoderTiny":
        """Build the network of a published config.json. Raises ValueError that names the unsupported options."""
        check_config("AutoencoderTiny", config, SUPPORTED)
        config = DEFAULTS | {name: value for name, value in config.items() if name in DEFAULTS}
        for side in ("encoder", "decoder"):
            widths, blocks = config[f"{side}_block_out_channels"], config[f"num_{side}_blocks"]
            if len(widths) != len(blocks) or len(set(widths)) != 1:
                raise ValueError(
                    f"AutoencoderTiny config: {side}_block_out_channels={list(widths)!r} and num_{side}_blocks="
                    f"{list(blocks)!r} are not supported; use lists of equal length with equal widths"
                )
        return cls(freeze(config), dtype)

    def setup(self):
        self.encoder = Stack(self.config, self.dtype)
        self.decoder = Stack(self.config, self.dtype)

    def encode(self, images):
        """Return moments, float32[B, h, w, 2c], of images: float32[B, H, W, 3] in [-1, 1].

        They are the latents and a log variance of -30, so that `sample_latents` returns the latents almost unchanged.
        """
        latents = self.encoder.encode(images * 0.5 + 0.5)[1].astype(jnp.float32)
        return jnp.concatenate([latents, jnp.full_like(latents, LOG_VARIANCE)], axis=-1)

    def features(self, images):
        """Return the features before the encoder's last layer, [B, h, w, C], of images: [B, H, W, 3] in [-1, 1]."""
        return self.encoder.encode(images * 0.5 + 0.5)[0].astype(jnp.float32)

    def decode(self, latents):
        """Return images, float32[B, H, W, 3] near [-1, 1], from latents: float32[B, h, w, c]."""
        return self.decoder.decode(3.0 * jnp.tanh(latents / 3.0)).astype(jnp.float32) * 2.0 - 1.0

    def __call__(self, images, noise):
        """Return (reconstruction, moments) like the KL autoencoder; noise: float32[B, h, w, c] is ignored."""
        moments = self.encode(images)
        return self.decode(jnp.split(moments, 2, axis=-1)[0]), moments
