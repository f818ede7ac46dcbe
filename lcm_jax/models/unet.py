"""The denoising UNet with cross-attention of Stable Diffusion 1.x, 2.x and XL (diffusers' UNet2DConditionModel)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from lcm_jax.models.layers import (
    ACTIVATIONS,
    COUNT,
    SIZE,
    Between,
    Conv,
    Dtype,
    GroupNorm,
    activation,
    check_config,
    check_groups,
    freeze,
)
from lcm_jax.models.unet_blocks import UpLevel, embed_time, expand_depth, go_down, heads_per_level, per_level

DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")
MID_BLOCKS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)  # the second is a single resnet, as in SSD-1B

DEFAULTS = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "only_cross_attention": False,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "num_attention_heads": None,
    "use_linear_projection": False,
    "upcast_attention": False,
    "time_embedding_dim": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "reverse_transformer_layers_per_block": None,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
}

DEPTH = range(65)  # number of transformer blocks; 0 for levels without attention
# Supported values of every option in the published config.json files (see `supports` in layers.py).
SUPPORTED = {
    "sample_size": (None, SIZE, [SIZE]),
    "in_channels": (SIZE,),
    "out_channels": (SIZE,),
    "freq_shift": (0, 1),
    "down_block_types": (list(DOWN_BLOCKS),),
    "up_block_types": (list(UP_BLOCKS),),
    "block_out_channels": ([SIZE],),
    "layers_per_block": (COUNT, [COUNT]),
    "mid_block_scale_factor": (Between(1e-3, 1e3),),
    "norm_num_groups": (SIZE,),
    "norm_eps": (Between(0, 1),),
    "cross_attention_dim": (SIZE, [SIZE]),
    "transformer_layers_per_block": (DEPTH, [DEPTH, [DEPTH]]),
    "reverse_transformer_layers_per_block": (None, DEPTH, [DEPTH, [DEPTH]]),
    "attention_head_dim": (SIZE, [SIZE]),
    "num_attention_heads": (None, SIZE, [SIZE]),
    "time_embedding_dim": (None, SIZE),
    "time_cond_proj_dim": (None, SIZE),
    "addition_time_embed_dim": (None, SIZE),
    "projection_class_embeddings_input_dim": (None, SIZE),
    "center_input_sample": (True, False),
    "flip_sin_to_cos": (True, False),
    "mid_block_type": MID_BLOCKS,
    "act_fn": tuple(ACTIVATIONS),
    "use_linear_projection": (True, False),
    "upcast_attention": (True, False, None),
    "downsample_padding": (0, 1),
    "conv_in_kernel": (1, 3, 5),
    "conv_out_kernel": (1, 3, 5),
    "only_cross_attention": (False,),
    "dropout": (0, 0.0),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "addition_embed_type": (None, "text_time"),
    "num_class_embeds": (None,),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1, 1.0),
    "time_embedding_type": ("positional",),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,),
    "addition_embed_type_num_heads": None,
}


def check_heads(network: str, config: Mapping[str, Any]) -> None:
    """Raise ValueError, naming `network`, if a level has more attention heads than channels."""
    heads = config["num_attention_heads"] or config["attention_head_dim"]
    each = heads if isinstance(heads, list | tuple) else [heads] * len(config["block_out_channels"])
    if any(head > width for head, width in zip(each, config["block_out_channels"], strict=True)):
        raise ValueError(
            f"{network} config: {heads!r} attention heads are not supported; use at most one per channel of "
            f"block_out_channels={list(config['block_out_channels'])!r}"
        )


def check_levels(network: str, config: Mapping[str, Any], kinds: Mapping[str, tuple], options: tuple[str, ...]) -> None:
    """Raise ValueError, naming `network`, unless block types and options fit the number of levels.

    kinds: option -> the supported block types, one for each level. options: those with one value, or one per level.
    """
    levels = len(config["block_out_channels"])
    for option, supported in kinds.items():
        if len(config[option]) != levels or any(kind not in supported for kind in config[option]):
            raise ValueError(
                f"{network} config: {option}={list(config[option])!r} is not supported; "
                f"it needs one of {', '.join(supported)} for each of the {levels} block_out_channels"
            )
    for option in options:
        value = config[option]
        if isinstance(value, list | tuple) and len(value) != levels:
            raise ValueError(f"{network} config: {option}={list(value)!r} needs 1 or {levels} values")


def check_addition(network: str, config: Mapping[str, Any]) -> None:
    """Raise ValueError, naming `network`, unless SDXL's additional embedding has its two sizes."""
    if config["addition_embed_type"] and not (
        config["addition_time_embed_dim"] and config["projection_class_embeddings_input_dim"]
    ):
        raise ValueError(
            f"{network} config: addition_embed_type='text_time' needs addition_time_embed_dim and "
            "projection_class_embeddings_input_dim; set both"
        )


def check_depths(config: Mapping[str, Any], levels: int) -> None:
    """Raise ValueError unless the transformer blocks are one number, a number per level, or a list per level."""
    layers = config["layers_per_block"]
    layers = list(layers) if isinstance(layers, list | tuple) else [layers] * levels
    down, up = config["transformer_layers_per_block"], config["reverse_transformer_layers_per_block"]
    for option, value, counts in [
        ("transformer_layers_per_block", down, layers),
        ("reverse_transformer_layers_per_block", up, [n + 1 for n in layers[::-1]]),
    ]:
        each = value if isinstance(value, list | tuple) else [value or 1] * levels
        lists = [list(d) if isinstance(d, list | tuple) else [d] * n for d, n in zip(each, counts, strict=False)]
        if len(each) != levels or [len(d) for d in lists] != counts or any(type(d) is not int for d in sum(lists, [])):
            raise ValueError(
                f"UNet2DConditionModel config: {option}={value!r} is not supported; use a number, or for each of "
                f"the {levels} levels a number or a list with one number per resnet (here {counts})"
            )
    if up is None and isinstance(down, list | tuple) and any(isinstance(d, list | tuple) for d in down):
        raise ValueError(
            f"UNet2DConditionModel config: transformer_layers_per_block={down!r} contains a list; set "
            "reverse_transformer_layers_per_block for the way up"
        )


def up_depths(config: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Return the transformer blocks after each resnet of each level on the way up."""
    layers, down = (per_level(config, config[name]) for name in ("layers_per_block", "transformer_layers_per_block"))
    reverse = config["reverse_transformer_layers_per_block"]
    up = down[::-1] if reverse is None else per_level(config, reverse)
    return [expand_depth(k, d, n + 1) for k, d, n in zip(config["up_block_types"], up, layers[::-1], strict=True)]


class Residuals(NamedTuple):
    """Outputs of ControlNets that a UNet adds: to each skip [B, h, w, C] of the way down in order, and to the middle's.

    The axes h and w are 1 if they are pooled.
    """

    down: tuple
    middle: Any


def add_residuals(x, skips: list, residuals: Residuals) -> tuple[Any, list]:
    """Return x, the middle's output, and the skips with the residuals added, in the dtype of each.

    Raises ValueError if their number or widths differ.
    """
    shapes, theirs = ([each.shape[-1] for each in (*down, mid)] for down, mid in ((skips, x), residuals))
    if shapes != theirs:
        raise ValueError(
            f"residuals have {theirs} channels, and the UNet's skips and middle have {shapes}; use a ControlNet of "
            "this UNet's family"
        )
    down = [skip + more.astype(skip.dtype) for skip, more in zip(skips, residuals.down, strict=True)]
    return x + residuals.middle.astype(x.dtype), down


class UNet2DCondition(nn.Module):
    """The UNet; build it with `from_config`. Parameters and output are float32; `dtype` is the compute dtype."""

    config: Mapping[str, Any]
    dtype: Dtype = jnp.float32
    remat: str = "none"

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], dtype: Dtype = jnp.float32, remat: str = "none"
    ) -> "UNet2DCondition":
        """Build the network of a published config.json; absent options have diffusers' defaults.

        remat: the activations that the backward pass recomputes, see `rematerialize`.
        Raises ValueError that names every option that is unknown or has an unsupported value.
        """
        check_config("UNet2DConditionModel", config, SUPPORTED)
        config = DEFAULTS | {name: value for name, value in config.items() if name in DEFAULTS}
        check_groups("UNet2DConditionModel", config)
        kinds = {"down_block_types": DOWN_BLOCKS, "up_block_types": UP_BLOCKS}
        options = ("attention_head_dim", "num_attention_heads", "layers_per_block", "cross_attention_dim")
        check_levels("UNet2DConditionModel", config, kinds, options)
        check_heads("UNet2DConditionModel", config)
        if isinstance(size := config["sample_size"], list | tuple) and len(size) != 2:
            raise ValueError(f"UNet2DConditionModel config: sample_size={size!r} is not supported; use [height, width]")
        check_depths(config, len(config["block_out_channels"]))
        check_addition("UNet2DConditionModel", config)
        return cls(freeze(config), dtype, remat)

    @nn.compact
    def __call__(self, sample, timesteps, context, guidance_embedding=None, pooled=None, time_ids=None, residuals=None):
        """Return the network's output, float32[B, h, w, out_channels].

        sample: [B, h, w, in_channels]; timesteps: int32[B]; context: [B, L, cross_attention_dim]; guidance_embedding:
        float32[B, time_cond_proj_dim] or None; for SDXL pooled: float32[B, P], the pooled prompt, and time_ids:
        float32[B, n], sizes in pixels. residuals: `Residuals` of a ControlNet, added to the skips and to the middle's
        output, or None. Raises ValueError if an unused input is given, or one that is needed is None.
        """
        c, dtype = self.config, self.dtype
        if guidance_embedding is not None and c["time_cond_proj_dim"] is None:
            raise ValueError("guidance_embedding is not supported without time_cond_proj_dim; pass None")
        widths, heads = c["block_out_channels"], heads_per_level(c)

        time = embed_time(c, dtype, timesteps, guidance_embedding, pooled, time_ids)
        context = context.astype(dtype)
        x = 2.0 * sample - 1.0 if c["center_input_sample"] else sample
        x = Conv(widths[0], c["conv_in_kernel"], dtype=dtype, name="conv_in")(x)
        x, skips = go_down(c, dtype, x, time, context, self.remat)
        if residuals is not None:
            x, skips = add_residuals(x, skips, residuals)

        for i, depths in enumerate(up_depths(c)):
            level = len(widths) - 1 - i
            taken, skips = skips[-len(depths) :][::-1], skips[: -len(depths)]
            size = (skips[-1].shape[1], skips[-1].shape[2]) if skips else None
            name = f"up_blocks_{i}"
            up = UpLevel(c, widths[level], heads[level], depths, dtype, self.remat, level > 0, size, name=name)
            x = up(x, taken, time, context)

        x = activation(c["act_fn"])(GroupNorm(c["norm_num_groups"], c["norm_eps"], dtype, name="conv_norm_out")(x))
        out = Conv(c["out_channels"], c["conv_out_kernel"], dtype=dtype, zero=True, name="conv_out")(x)
        return out.astype(jnp.float32)
