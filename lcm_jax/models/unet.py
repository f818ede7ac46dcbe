"""The denoising UNet with cross-attention of Stable Diffusion 1.x, 2.x and XL (diffusers' UNet2DConditionModel)."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from lcm_jax.models.attention import Attention
from lcm_jax.models.layers import (
    ACTIVATIONS,
    COUNT,
    SIZE,
    Between,
    Conv,
    Downsample,
    Dtype,
    GroupNorm,
    ResnetBlock,
    Upsample,
    activation,
    check_config,
    check_groups,
    freeze,
)

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


def timestep_embedding(t, dim: int, flip_sin_to_cos: bool, freq_shift: float):
    """Return sinusoids of t: [B] with frequencies exp(-ln(10000) j / (dim/2 - freq_shift)), float32[B, dim]."""
    half = dim // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
    parts = (jnp.cos(angles), jnp.sin(angles)) if flip_sin_to_cos else (jnp.sin(angles), jnp.cos(angles))
    return jnp.concatenate(parts, axis=-1)


class TimestepEmbedding(nn.Module):
    """MLP(embedding + cond_proj(condition)), where the condition is the guidance embedding (arXiv 2310.04378)."""

    features: int
    condition_dim: int | None
    act: str
    dtype: Dtype

    @nn.compact
    def __call__(self, embedding, condition=None):
        if self.condition_dim is not None:
            # Zeros, so that a student that gains this input equals its teacher at first for every guidance weight.
            project = nn.Dense(embedding.shape[-1], use_bias=False, kernel_init=nn.initializers.zeros, name="cond_proj")
            if condition is None:
                condition = jnp.zeros((embedding.shape[0], self.condition_dim), jnp.float32)
            embedding = embedding + project(condition)
        hidden = nn.Dense(self.features, dtype=self.dtype, name="linear_1")(embedding)
        return nn.Dense(self.features, dtype=self.dtype, name="linear_2")(activation(self.act)(hidden))


class GEGLU(nn.Module):
    """h gelu(g) with (h, g) = W x (arXiv 2002.05202). x: [B, N, C] -> [B, N, features]."""

    features: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x):
        hidden, gate = jnp.split(nn.Dense(2 * self.features, dtype=self.dtype, name="proj")(x), 2, axis=-1)
        return hidden * nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    dtype: Dtype

    @nn.compact
    def __call__(self, x):
        hidden = GEGLU(4 * x.shape[-1], self.dtype, name="net_0")(x)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="net_2")(hidden)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and a feed-forward layer of x: [B, N, C], each with a norm and a residual."""

    heads: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x, context):
        norm = lambda name: nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, use_fast_variance=False, name=name)  # noqa: E731
        head_dim = x.shape[-1] // self.heads
        x = x + Attention(self.heads, head_dim, dtype=self.dtype, name="attn1")(norm("norm1")(x))
        x = x + Attention(self.heads, head_dim, dtype=self.dtype, name="attn2")(norm("norm2")(x), context)
        return x + FeedForward(self.dtype, name="ff")(norm("norm3")(x))


class Transformer2D(nn.Module):
    """Transformer blocks over the positions of x: [B, H, W, C], between two projections, with a residual connection."""

    heads: int
    depth: int
    groups: int
    linear_projection: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x, context):
        b, h, w, c = x.shape

        def project(y, name):
            if self.linear_projection:
                return nn.Dense(c, dtype=self.dtype, name=name)(y)
            return Conv(c, size=1, dtype=self.dtype, name=name)(y)

        y = project(GroupNorm(self.groups, 1e-6, self.dtype, name="norm")(x), "proj_in").reshape(b, h * w, c)
        for i in range(self.depth):
            y = TransformerBlock(self.heads, self.dtype, name=f"transformer_blocks_{i}")(y, context)
        return x + project(y.reshape(b, h, w, c), "proj_out")


class Level(nn.Module):
    """Base of the blocks of one resolution: resnets, the i-th followed by depths[i] transformer blocks."""

    config: Mapping[str, Any]
    features: int
    heads: int
    depths: tuple[int, ...]
    dtype: Dtype

    def resnet(self, i, x, time):
        c = self.config
        return ResnetBlock(
            self.features, c["norm_num_groups"], c["norm_eps"], c["act_fn"], dtype=self.dtype, name=f"resnets_{i}"
        )(x, time)

    def attend(self, i, x, context):
        if not self.depths[i]:
            return x
        c = self.config
        return Transformer2D(
            self.heads,
            self.depths[i],
            c["norm_num_groups"],
            c["use_linear_projection"],
            self.dtype,
            name=f"attentions_{i}",
        )(x, context)


class DownLevel(Level):
    downsample: bool = True

    @nn.compact
    def __call__(self, x, time, context):
        """Return x and the intermediate results that the way up concatenates."""
        skips = []
        for i in range(len(self.depths)):
            x = self.attend(i, self.resnet(i, x, time), context)
            skips.append(x)
        if self.downsample:
            x = Downsample(self.features, self.config["downsample_padding"], self.dtype, name="downsamplers_0")(x)
            skips.append(x)
        return x, skips


class UpLevel(Level):
    upsample: bool = True
    size: tuple[int, int] | None = None  # (height, width) of the next level, which odd sizes need

    @nn.compact
    def __call__(self, x, skips, time, context):
        """Concatenate `skips` in their order, innermost first, before the resnets."""
        for i, skip in enumerate(skips):
            x = self.attend(i, self.resnet(i, jnp.concatenate([x, skip], axis=-1), time), context)
        return Upsample(self.features, self.dtype, name="upsamplers_0")(x, self.size) if self.upsample else x


class MidLevel(Level):
    @nn.compact
    def __call__(self, x, time, context):
        c = self.config
        resnet = lambda i, y: ResnetBlock(  # noqa: E731
            self.features,
            c["norm_num_groups"],
            c["norm_eps"],
            c["act_fn"],
            c["mid_block_scale_factor"],
            dtype=self.dtype,
            name=f"resnets_{i}",
        )(y, time)
        x = resnet(0, x)
        return resnet(1, self.attend(0, x, context)) if self.depths else x


def check_heads(config: Mapping[str, Any]) -> None:
    """Raise ValueError if a level has more attention heads than channels, or sample_size is not (height, width)."""
    heads, size = config["num_attention_heads"] or config["attention_head_dim"], config["sample_size"]
    each = heads if isinstance(heads, list | tuple) else [heads] * len(config["block_out_channels"])
    if any(head > width for head, width in zip(each, config["block_out_channels"], strict=True)):
        raise ValueError(
            f"UNet2DConditionModel config: {heads!r} attention heads are not supported; use at most one per channel "
            f"of block_out_channels={list(config['block_out_channels'])!r}"
        )
    if isinstance(size, list | tuple) and len(size) != 2:
        raise ValueError(f"UNet2DConditionModel config: sample_size={size!r} is not supported; use [height, width]")


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


def transformer_depths(
    config: Mapping[str, Any],
) -> tuple[list[tuple[int, ...]], tuple[int, ...], list[tuple[int, ...]]]:
    """Return the transformer blocks after each resnet: per level down, in the middle, and per level up."""
    levels = len(config["block_out_channels"])
    per_level = lambda value: value if isinstance(value, tuple) else (value,) * levels  # noqa: E731
    layers, down = per_level(config["layers_per_block"]), per_level(config["transformer_layers_per_block"])
    reverse = config["reverse_transformer_layers_per_block"]
    up = down[::-1] if reverse is None else per_level(reverse)

    def expand_depth(kind, depth, count):
        if "CrossAttn" not in kind:
            return (0,) * count
        return depth if isinstance(depth, tuple) else (depth,) * count

    kind = config["mid_block_type"] or ""
    last = down[-1][0] if isinstance(down[-1], tuple) else down[-1]
    return (
        [expand_depth(k, d, n) for k, d, n in zip(config["down_block_types"], down, layers, strict=True)],
        (last,) if "CrossAttn" in kind else (),
        [expand_depth(k, d, n + 1) for k, d, n in zip(config["up_block_types"], up, layers[::-1], strict=True)],
    )


class UNet2DCondition(nn.Module):
    """The UNet; build it with `from_config`. Parameters and output are float32; `dtype` is the compute dtype."""

    config: Mapping[str, Any]
    dtype: Dtype = jnp.float32
    remat: bool = False

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], dtype: Dtype = jnp.float32, remat: bool = False
    ) -> "UNet2DCondition":
        """Build the network of a published config.json; absent options have diffusers' defaults.

        remat: recompute each block's activations in the backward pass (less memory, about a third more time).
        Raises ValueError that names every option that is unknown or has an unsupported value.
        """
        check_config("UNet2DConditionModel", config, SUPPORTED)
        config = DEFAULTS | {name: value for name, value in config.items() if name in DEFAULTS}
        check_groups("UNet2DConditionModel", config)
        levels = len(config["block_out_channels"])
        for option, supported in [("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)]:
            kinds = config[option]
            if len(kinds) != levels or any(kind not in supported for kind in kinds):
                raise ValueError(
                    f"UNet2DConditionModel config: {option}={list(kinds)!r} is not supported; "
                    f"it needs one of {', '.join(supported)} for each of the {levels} block_out_channels"
                )
        for option in ("attention_head_dim", "num_attention_heads", "layers_per_block", "cross_attention_dim"):
            value = config[option]
            if isinstance(value, list | tuple) and len(value) != levels:
                raise ValueError(f"UNet2DConditionModel config: {option}={list(value)!r} needs 1 or {levels} values")
        check_heads(config)
        check_depths(config, levels)
        if config["addition_embed_type"] and not (
            config["addition_time_embed_dim"] and config["projection_class_embeddings_input_dim"]
        ):
            raise ValueError(
                "UNet2DConditionModel config: addition_embed_type='text_time' needs addition_time_embed_dim and "
                "projection_class_embeddings_input_dim; set both"
            )
        return cls(freeze(config), dtype, remat)

    @nn.compact
    def __call__(self, sample, timesteps, context, guidance_embedding=None, pooled=None, time_ids=None):
        """Return the network's output, float32[B, h, w, out_channels].

        sample: [B, h, w, in_channels]; timesteps: int32[B]; context: [B, L, cross_attention_dim]; guidance_embedding:
        float32[B, time_cond_proj_dim] or None; for SDXL pooled: float32[B, P], the pooled prompt, and time_ids:
        float32[B, n], sizes in pixels. Raises ValueError if an unused input is given, or one that is needed is None.
        """
        c, dtype = self.config, self.dtype
        if guidance_embedding is not None and c["time_cond_proj_dim"] is None:
            raise ValueError("guidance_embedding is not supported without time_cond_proj_dim; pass None")
        wanted = c["addition_embed_type"] == "text_time"
        if (pooled is not None, time_ids is not None) != (wanted, wanted):
            raise ValueError(
                f"this UNet {'requires' if wanted else 'does not support'} pooled and time_ids, since its "
                f"addition_embed_type is {c['addition_embed_type']!r}; pass {'both' if wanted else 'None'}"
            )
        widths, levels = c["block_out_channels"], len(c["block_out_channels"])
        per_level = lambda value: value if isinstance(value, tuple) else (value,) * levels  # noqa: E731
        heads = per_level(c["num_attention_heads"] or c["attention_head_dim"])
        down_depths, mid_depths, up_depths = transformer_depths(c)
        block = (lambda kind: nn.remat(kind)) if self.remat else (lambda kind: kind)

        embedding = timestep_embedding(timesteps, widths[0], c["flip_sin_to_cos"], c["freq_shift"])
        time_dim = c["time_embedding_dim"] or 4 * widths[0]
        time = TimestepEmbedding(time_dim, c["time_cond_proj_dim"], c["act_fn"], dtype, name="time_embedding")(
            embedding, guidance_embedding
        )
        if wanted:
            assert pooled is not None and time_ids is not None
            sizes = timestep_embedding(
                time_ids.reshape(-1), c["addition_time_embed_dim"], c["flip_sin_to_cos"], c["freq_shift"]
            )
            added = jnp.concatenate([pooled.astype(jnp.float32), sizes.reshape(len(time_ids), -1)], axis=-1)
            if added.shape[-1] != (dim := c["projection_class_embeddings_input_dim"]):
                raise ValueError(
                    f"pooled [.., {pooled.shape[-1]}] and time_ids [.., {time_ids.shape[-1]}] have {added.shape[-1]} "
                    f"features, and projection_class_embeddings_input_dim is {dim}; use inputs of this size"
                )
            # diffusers' activation is SiLU here for any act_fn.
            time = time + TimestepEmbedding(time_dim, None, "silu", dtype, name="add_embedding")(added)
        context = context.astype(dtype)

        x = 2.0 * sample - 1.0 if c["center_input_sample"] else sample
        x = Conv(widths[0], c["conv_in_kernel"], dtype=dtype, name="conv_in")(x)
        skips = [x]
        for i, depths in enumerate(down_depths):
            x, more = block(DownLevel)(c, widths[i], heads[i], depths, dtype, i < levels - 1, name=f"down_blocks_{i}")(
                x, time, context
            )
            skips += more

        if c["mid_block_type"]:
            x = block(MidLevel)(c, widths[-1], heads[-1], mid_depths, dtype, name="mid_block")(x, time, context)

        for i, depths in enumerate(up_depths):
            level = levels - 1 - i
            taken, skips = skips[-len(depths) :][::-1], skips[: -len(depths)]
            size = skips[-1].shape[1:3] if skips else None
            x = block(UpLevel)(c, widths[level], heads[level], depths, dtype, level > 0, size, name=f"up_blocks_{i}")(
                x, taken, time, context
            )

        x = activation(c["act_fn"])(GroupNorm(c["norm_num_groups"], c["norm_eps"], dtype, name="conv_norm_out")(x))
        out = Conv(c["out_channels"], c["conv_out_kernel"], dtype=dtype, zero=True, name="conv_out")(x)
        return out.astype(jnp.float32)
