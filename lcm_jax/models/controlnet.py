"""The ControlNet of Stable Diffusion 1.x, 2.x and XL (arXiv 2302.05543; diffusers' ControlNetModel)."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lcm_jax.models import unet
from lcm_jax.models.layers import COUNT, SIZE, Conv, Dtype, abstract_network, check_config, check_groups, freeze
from lcm_jax.models.unet import Residuals
from lcm_jax.models.unet_blocks import embed_time, go_down

NAME = "ControlNetModel"
# Options that a UNet has and a ControlNet has not, with the value that the shared blocks use.
FIXED = {"time_embedding_dim": None, "time_cond_proj_dim": None}
SHARED = (
    "in_channels",
    "flip_sin_to_cos",
    "freq_shift",
    "down_block_types",
    "mid_block_type",
    "only_cross_attention",
    "block_out_channels",
    "layers_per_block",
    "downsample_padding",
    "mid_block_scale_factor",
    "act_fn",
    "norm_num_groups",
    "norm_eps",
    "cross_attention_dim",
    "transformer_layers_per_block",
    "attention_head_dim",
    "num_attention_heads",
    "use_linear_projection",
    "upcast_attention",
    "addition_embed_type",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
)
DEFAULTS = {name: unet.DEFAULTS[name] for name in SHARED} | {
    "conditioning_embedding_out_channels": (16, 32, 96, 256),
    "controlnet_conditioning_channel_order": "rgb",
    "global_pool_conditions": False,
}
IGNORED = ("encoder_hid_dim", "encoder_hid_dim_type", "class_embed_type", "num_class_embeds", "resnet_time_scale_shift")
# Supported values of every option in the published config.json files (see `supports` in layers.py).
TIME_IDS = 6  # sizes that SDXL's networks get
SUPPORTED = {name: unet.SUPPORTED[name] for name in (*SHARED, *IGNORED, "addition_embed_type_num_heads")} | {
    "layers_per_block": (COUNT,),
    "cross_attention_dim": (SIZE,),
    "transformer_layers_per_block": (unet.DEPTH, [unet.DEPTH]),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
    "conditioning_channels": (3,),  # control images are RGB
    "conditioning_embedding_out_channels": ([SIZE],),
    "controlnet_conditioning_channel_order": ("rgb", "bgr"),
    "global_pool_conditions": (True, False),
}


class ConditioningEmbedding(nn.Module):
    """Features [B, H / s, W / s, features] of images [B, H, W, 3] in [0, 1], with s = 2^(number of widths - 1)."""

    features: int
    widths: tuple[int, ...]
    dtype: Dtype

    @nn.compact
    def __call__(self, images):
        x = nn.silu(Conv(self.widths[0], dtype=self.dtype, name="conv_in")(images))
        for i, (width, wider) in enumerate(zip(self.widths[:-1], self.widths[1:], strict=True)):
            x = nn.silu(Conv(width, dtype=self.dtype, name=f"blocks_{2 * i}")(x))
            x = nn.silu(Conv(wider, stride=2, dtype=self.dtype, name=f"blocks_{2 * i + 1}")(x))
        return Conv(self.features, dtype=self.dtype, zero=True, name="conv_out")(x)


class ControlNet(nn.Module):
    """Copy of a UNet's way down that sees an image; build it with `from_config`. `dtype` is the compute dtype."""

    config: Mapping[str, Any]
    dtype: Dtype = jnp.float32

    @classmethod
    def from_config(cls, config: Mapping[str, Any], dtype: Dtype = jnp.float32) -> "ControlNet":
        """Build the network of a published config.json; absent options have diffusers' defaults.

        Raises ValueError that names every option that is unknown or has an unsupported value.
        """
        check_config(NAME, config, SUPPORTED)
        config = DEFAULTS | {name: value for name, value in config.items() if name in DEFAULTS}
        check_groups(NAME, config)
        options = ("attention_head_dim", "num_attention_heads", "transformer_layers_per_block")
        unet.check_levels(NAME, config, {"down_block_types": unet.DOWN_BLOCKS}, options)
        unet.check_heads(NAME, config)
        unet.check_addition(NAME, config)
        if not config["conditioning_embedding_out_channels"]:
            raise ValueError(
                f"{NAME} config: conditioning_embedding_out_channels is empty; it needs at least one width"
            )
        network = cls(freeze(config | FIXED), dtype)
        if network.pooled_width is not None and network.pooled_width <= 0:
            raise ValueError(
                f"{NAME} config: addition_time_embed_dim={config['addition_time_embed_dim']} is not supported; "
                f"projection_class_embeddings_input_dim={config['projection_class_embeddings_input_dim']} has to be "
                f"more than {TIME_IDS} times as much"
            )
        return network

    def setup(self):
        self.controlnet_cond_embedding = ConditioningEmbedding(
            self.config["block_out_channels"][0], self.config["conditioning_embedding_out_channels"], self.dtype
        )

    @property
    def downscale(self) -> int:
        """Pixels of the control image per latent along one axis."""
        return 2 ** (len(self.config["conditioning_embedding_out_channels"]) - 1)

    @property
    def pooled_width(self) -> int | None:
        """Features of the pooled prompt that SDXL's networks get; None for the others."""
        if self.config["addition_embed_type"] is None:
            return None
        return self.config["projection_class_embeddings_input_dim"] - TIME_IDS * self.config["addition_time_embed_dim"]

    def abstract_params(self) -> Any:
        """Return the parameters as ShapeDtypeStructs. Nothing is allocated; the tree is not a copy."""
        spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
        c, size = self.config, 2 ** (len(self.config["block_out_channels"]) - 1)
        sample, context = spec(1, size, size, c["in_channels"]), spec(1, 1, c["cross_attention_dim"])
        image = spec(1, size * self.downscale, size * self.downscale, 3)
        more = [] if self.pooled_width is None else [spec(1, self.pooled_width), spec(1, TIME_IDS)]
        network: Any = self.clone(dtype=jnp.float32)
        return abstract_network(network, sample, spec(1), context, image, *more)

    def embed(self, images):
        """Return the features of images: float32[N, H, W, 3], RGB in [0, 1]; they are the same at every timestep."""
        bgr = self.config["controlnet_conditioning_channel_order"] == "bgr"
        return self.controlnet_cond_embedding(images[..., ::-1] if bgr else images)

    @nn.compact
    def residuals(self, sample, timesteps, context, features, pooled=None, time_ids=None):
        """Return what a UNet adds, `Residuals` of float32[B, h, w, C], or [B, 1, 1, C] with global_pool_conditions.

        sample, timesteps, context, pooled, time_ids: as the UNet gets them, sample without mask and masked latents;
        features: [B or 1, h, w, C] of `embed`. Raises ValueError as the UNet does.
        """
        c, dtype = self.config, self.dtype
        time = embed_time(c, dtype, timesteps, None, pooled, time_ids)
        x = Conv(c["block_out_channels"][0], dtype=dtype, name="conv_in")(sample) + features
        x, skips = go_down(c, dtype, x, time, context.astype(dtype))

        def finish(x, name):
            x = Conv(x.shape[-1], size=1, zero=True, dtype=dtype, name=name)(x).astype(jnp.float32)
            return x.mean((1, 2), keepdims=True) if c["global_pool_conditions"] else x

        down = tuple(finish(skip, f"controlnet_down_blocks_{i}") for i, skip in enumerate(skips))
        return Residuals(down, finish(x, "controlnet_mid_block"))

    def __call__(self, sample, timesteps, context, images, pooled=None, time_ids=None):
        """Return the `residuals` for images: float32[B or 1, H, W, 3]."""
        return self.residuals(sample, timesteps, context, self.embed(images), pooled, time_ids)


def check_fit(controlnet: ControlNet, denoiser: unet.UNet2DCondition, downscale: int) -> None:
    """Raise ValueError unless the UNet can add the ControlNet's residuals, and gives it the inputs that it needs.

    downscale: pixels per latent of the autoencoder.
    """
    mine, theirs = controlnet.config, denoiser.config
    options = ["block_out_channels", "layers_per_block", "addition_embed_type", "projection_class_embeddings_input_dim"]
    if any("CrossAttn" in kind for kind in (*mine["down_block_types"], mine["mid_block_type"])):
        options.append("cross_attention_dim")
    pairs = [(option, mine[option], option, theirs[option]) for option in options]
    pairs.append(("in_channels", mine["in_channels"], "out_channels", theirs["out_channels"]))
    for option, value, other, expected in pairs:
        same = {value} == {*expected} if isinstance(expected, tuple) and type(value) is int else value == expected
        if not same:
            raise ValueError(
                f"{option} is {value!r}, and {other} of the model's UNet is {expected!r}; use a ControlNet of the same "
                "family"
            )
    if controlnet.downscale != downscale:
        raise ValueError(
            f"conditioning_embedding_out_channels={list(mine['conditioning_embedding_out_channels'])} makes "
            f"{controlnet.downscale} pixels one, and the autoencoder {downscale}; use a ControlNet of the same family"
        )
