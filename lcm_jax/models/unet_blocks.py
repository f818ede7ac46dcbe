"""Blocks of the denoising UNet, which a ControlNet shares: embeddings of the time, transformers, resnet levels."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from lcm_jax.models.attention import Attention
from lcm_jax.models.layers import Conv, Downsample, Dtype, GroupNorm, ResnetBlock, Upsample, activation
from lcm_jax.models.remat import rematerialize


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
    remat: str  # of each resnet and each transformer, see `rematerialize`

    def resnet(self, i, x, time, scale=1.0):
        c = self.config
        return rematerialize(self.remat)(ResnetBlock)(
            self.features, c["norm_num_groups"], c["norm_eps"], c["act_fn"], scale, self.dtype, name=f"resnets_{i}"
        )(x, time)

    def attend(self, i, x, context):
        if not self.depths[i]:
            return x
        c = self.config
        return rematerialize(self.remat)(Transformer2D)(
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
        scale = self.config["mid_block_scale_factor"]
        x = self.resnet(0, x, time, scale)
        return self.resnet(1, self.attend(0, x, context), time, scale) if self.depths else x


# The functions below are called in a module's compact method, whose submodules the layers then are.


def embed_time(config: Mapping[str, Any], dtype: Dtype, timesteps, guidance_embedding, pooled, time_ids):
    """Return the time embedding, [B, D], with what SDXL adds to it; the arguments are those of `UNet2DCondition`.

    Raises ValueError if pooled and time_ids are given without addition_embed_type, or missing, or of another size.
    """
    wanted = config["addition_embed_type"] == "text_time"
    if (pooled is not None, time_ids is not None) != (wanted, wanted):
        raise ValueError(
            f"this network {'requires' if wanted else 'does not support'} pooled and time_ids, since its "
            f"addition_embed_type is {config['addition_embed_type']!r}; pass {'both' if wanted else 'None'}"
        )
    width, flip, shift = config["block_out_channels"][0], config["flip_sin_to_cos"], config["freq_shift"]
    time_dim = config["time_embedding_dim"] or 4 * width
    embed = TimestepEmbedding(time_dim, config["time_cond_proj_dim"], config["act_fn"], dtype, name="time_embedding")
    time = embed(timestep_embedding(timesteps, width, flip, shift), guidance_embedding)
    if not wanted:
        return time
    sizes = timestep_embedding(time_ids.reshape(-1), config["addition_time_embed_dim"], flip, shift)
    added = jnp.concatenate([pooled.astype(jnp.float32), sizes.reshape(len(time_ids), -1)], axis=-1)
    if added.shape[-1] != (dim := config["projection_class_embeddings_input_dim"]):
        raise ValueError(
            f"pooled [.., {pooled.shape[-1]}] and time_ids [.., {time_ids.shape[-1]}] have {added.shape[-1]} "
            f"features, and projection_class_embeddings_input_dim is {dim}; use inputs of this size"
        )
    # diffusers' activation is SiLU here for any act_fn.
    return time + TimestepEmbedding(time_dim, None, "silu", dtype, name="add_embedding")(added)


def go_down(config: Mapping[str, Any], dtype: Dtype, x, time, context, remat: str = "none"):
    """Return the output of the middle, [B, h, w, C], and the list of skips, x first, from all levels down.

    x: [B, H, W, C], after the first convolution. remat: see `rematerialize`.
    """
    widths, heads, (depths, middle) = config["block_out_channels"], heads_per_level(config), down_depths(config)
    skips = [x]
    for i, width in enumerate(widths):
        last = i == len(widths) - 1
        level = DownLevel(config, width, heads[i], depths[i], dtype, remat, not last, name=f"down_blocks_{i}")
        x, more = level(x, time, context)
        skips += more
    if config["mid_block_type"]:
        x = MidLevel(config, widths[-1], heads[-1], middle, dtype, remat, name="mid_block")(x, time, context)
    return x, skips


def per_level(config: Mapping[str, Any], value: Any) -> tuple:
    """Return an option's value for each level, which config.json may have once for all."""
    return value if isinstance(value, tuple) else (value,) * len(config["block_out_channels"])


def heads_per_level(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the number of attention heads of each level; published configs name it attention_head_dim."""
    return per_level(config, config["num_attention_heads"] or config["attention_head_dim"])


def expand_depth(kind: str, depth: int | tuple[int, ...], count: int) -> tuple[int, ...]:
    """Return the transformer blocks after each of `count` resnets in a level of a block type."""
    if "CrossAttn" not in kind:
        return (0,) * count
    return depth if isinstance(depth, tuple) else (depth,) * count


def down_depths(config: Mapping[str, Any]) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    """Return the transformer blocks after each resnet of each level on the way down, and in the middle."""
    layers, depths = (per_level(config, config[name]) for name in ("layers_per_block", "transformer_layers_per_block"))
    last = depths[-1][0] if isinstance(depths[-1], tuple) else depths[-1]
    return (
        [expand_depth(k, d, n) for k, d, n in zip(config["down_block_types"], depths, layers, strict=True)],
        (last,) if "CrossAttn" in (config["mid_block_type"] or "") else (),
    )
