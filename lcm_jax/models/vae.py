"""The KL autoencoder of latent diffusion (diffusers' AutoencoderKL): images <-> a small grid of latents."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from lcm_jax.models.attention import Attention
from lcm_jax.models.layers import (
    COUNT,
    SIZE,
    Between,
    Conv,
    Downsample,
    Dtype,
    GroupNorm,
    ResnetBlock,
    Upsample,
    check_config,
    check_groups,
    freeze,
)

EPSILON = 1e-6

# Supported values of every option in the published config.json files (see `supports` in layers.py).
SUPPORTED = {
    "in_channels": (SIZE,),
    "out_channels": (SIZE,),
    "block_out_channels": ([SIZE],),
    "layers_per_block": (COUNT,),
    "latent_channels": (SIZE,),
    "norm_num_groups": (SIZE,),
    "sample_size": None,
    "scaling_factor": (Between(1e-6, 1e6),),
    "shift_factor": (None, Between(-1e6, 1e6)),
    "latents_mean": (None,),
    "latents_std": (None,),
    "force_upcast": (True, False),
    "use_quant_conv": (True, False),
    "use_post_quant_conv": (True, False),
    "mid_block_add_attention": (True, False),
    "act_fn": ("silu", "swish", "gelu", "mish", "relu"),
    "down_block_types": (["DownEncoderBlock2D"],),
    "up_block_types": (["UpDecoderBlock2D"],),
}

DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
    "act_fn": "silu",
}


class MidBlock(nn.Module):
    features: int
    groups: int
    act: str
    attend: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x):
        resnet = lambda i, y: ResnetBlock(  # noqa: E731
            self.features, self.groups, EPSILON, self.act, dtype=self.dtype, name=f"resnets_{i}"
        )(y)
        x = resnet(0, x)
        if self.attend:
            x = SpatialAttention(self.groups, self.dtype, name="attentions_0")(x)
        return resnet(1, x)


class SpatialAttention(nn.Module):
    """Single-head attention over all positions, with a residual connection."""

    groups: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x):
        b, h, w, c = x.shape
        normed = GroupNorm(self.groups, EPSILON, self.dtype, name="group_norm")(x)
        attention = Attention(1, c, bias=True, dtype=self.dtype)
        nn.share_scope(self, attention)  # the weights store the projections beside the norm
        return x + attention(normed.reshape(b, h * w, c)).reshape(x.shape)


class ResnetStack(nn.Module):
    """The resnets of one resolution, then an optional change of resolution: `resample` is None, "down" or "up"."""

    features: int
    layers: int
    groups: int
    act: str
    resample: str | None
    dtype: Dtype

    @nn.compact
    def __call__(self, x):
        for i in range(self.layers):
            x = ResnetBlock(self.features, self.groups, EPSILON, self.act, dtype=self.dtype, name=f"resnets_{i}")(x)
        if self.resample == "down":
            x = Downsample(self.features, padding=0, dtype=self.dtype, name="downsamplers_0")(x)
        elif self.resample == "up":
            x = Upsample(self.features, dtype=self.dtype, name="upsamplers_0")(x)
        return x


class Encoder(nn.Module):
    """Images [B, H, W, 3] -> (features before the last layer [B, h, w, C], moments [B, h, w, 2c])."""

    config: Mapping[str, Any]
    dtype: Dtype

    @nn.compact
    def __call__(self, x):
        c, groups, act = self.config, self.config["norm_num_groups"], self.config["act_fn"]
        widths = c["block_out_channels"]
        x = Conv(widths[0], dtype=self.dtype, name="conv_in")(x)
        for i, width in enumerate(widths):
            resample = "down" if i < len(widths) - 1 else None
            x = ResnetStack(width, c["layers_per_block"], groups, act, resample, self.dtype, name=f"down_blocks_{i}")(x)
        features = MidBlock(widths[-1], groups, act, c["mid_block_add_attention"], self.dtype, name="mid_block")(x)
        # diffusers' last activation is SiLU for any act_fn, here and in the decoder.
        x = nn.silu(GroupNorm(groups, EPSILON, self.dtype, name="conv_norm_out")(features))
        return features, Conv(2 * c["latent_channels"], dtype=self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """Latents [B, h, w, c] -> images [B, H, W, 3]."""

    config: Mapping[str, Any]
    dtype: Dtype

    @nn.compact
    def __call__(self, z):
        c, groups, act = self.config, self.config["norm_num_groups"], self.config["act_fn"]
        widths = tuple(reversed(c["block_out_channels"]))
        x = Conv(widths[0], dtype=self.dtype, name="conv_in")(z)
        x = MidBlock(widths[0], groups, act, c["mid_block_add_attention"], self.dtype, name="mid_block")(x)
        for i, width in enumerate(widths):
            resample = "up" if i < len(widths) - 1 else None
            layers = c["layers_per_block"] + 1
            x = ResnetStack(width, layers, groups, act, resample, self.dtype, name=f"up_blocks_{i}")(x)
        x = nn.silu(GroupNorm(groups, EPSILON, self.dtype, name="conv_norm_out")(x))
        return Conv(c["out_channels"], dtype=self.dtype, name="conv_out")(x)


class AutoencoderKL(nn.Module):
    """KL autoencoder; build it with `from_config` and call `vae.apply({"params": p}, x, method="encode")`."""

    config: Mapping[str, Any]
    dtype: Dtype = jnp.float32

    @classmethod
    def from_config(cls, config: Mapping[str, Any], dtype: Dtype = jnp.float32) -> "AutoencoderKL":
        """Build the network of a published config.json. Raises ValueError that names the unsupported options."""
        check_config("AutoencoderKL", config, SUPPORTED)
        config = DEFAULTS | {name: value for name, value in config.items() if not name.startswith("_")}
        check_groups("AutoencoderKL", config)
        levels = len(config["block_out_channels"])
        for option, kind in [("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")]:
            if tuple(config.get(option, (kind,) * levels)) != (kind,) * levels:
                raise ValueError(
                    f"AutoencoderKL config: {option}={list(config[option])!r} is not supported; "
                    f"it must be {kind!r} for each of the {levels} block_out_channels"
                )
        return cls(freeze(config), dtype)

    def setup(self):
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)
        latent_channels = self.config["latent_channels"]
        if self.config["use_quant_conv"]:
            self.quant_conv = Conv(2 * latent_channels, size=1, dtype=self.dtype)
        if self.config["use_post_quant_conv"]:
            self.post_quant_conv = Conv(latent_channels, size=1, dtype=self.dtype)

    def encode(self, images):
        """Return mean and log variance, not scaled, float32[B, h, w, 2c], of images: float32[B, H, W, 3] in [-1, 1]."""
        moments = self.encoder(images)[1]
        if self.config["use_quant_conv"]:
            moments = self.quant_conv(moments)
        return moments.astype(jnp.float32)

    def features(self, images):
        """Return the features before the encoder's last layer, [B, h, w, C], of images: [B, H, W, 3] in [-1, 1]."""
        return self.encoder(images)[0].astype(jnp.float32)

    def decode(self, latents):
        """Return images, float32[B, H, W, 3] near [-1, 1], from latents: float32[B, h, w, c], not scaled."""
        if self.config["use_post_quant_conv"]:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents).astype(jnp.float32)

    def __call__(self, images, noise):
        """Return (reconstruction, moments). noise: float32[B, h, w, c] samples the latents from the posterior."""
        moments = self.encode(images)
        return self.decode(sample_latents(moments, noise, scaling_factor=1.0)), moments


def sample_latents(moments, noise, scaling_factor: float, shift_factor: float | None = None):
    """Return z = (mean + exp(logvar / 2) noise - shift) scaling_factor, float32[B, h, w, c].

    moments: float32[B, h, w, 2c]. The log variance is clipped to [-30, 20], as in the training of the published models.
    """
    mean, logvar = jnp.split(moments, 2, axis=-1)
    z = mean + jnp.exp(0.5 * jnp.clip(logvar, -30.0, 20.0)) * noise
    return (z - (shift_factor or 0.0)) * scaling_factor


def unscale_latents(z, scaling_factor: float, shift_factor: float | None = None):
    """Invert the scaling of `sample_latents`; `AutoencoderKL.decode` expects the result."""
    return z / scaling_factor + (shift_factor or 0.0)
