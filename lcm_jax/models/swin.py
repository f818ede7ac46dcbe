"""Swin Transformer (arXiv 2103.14030) as a backbone: attention within windows, shifted in every second block.

NHWC; submodule names follow the keys of transformers' weights.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.models.layers import activation

PATCH = 4  # pixels of a side
MASKED = -100.0  # added to logits between areas that are neighbors only in the shifted image, as in the published code


@dataclass(frozen=True)
class SwinConfig:
    """The options that determine the network, with the values of Swin-S."""

    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 18, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5


def layer_norm(dtype: Any, name: str, epsilon: float = 1e-5) -> nn.LayerNorm:
    """Return PyTorch's layer norm; its statistics are in float32."""
    return nn.LayerNorm(epsilon, dtype=dtype, use_fast_variance=False, name=name)


def relative_positions(window: int) -> np.ndarray:
    """Return int64[window^2, window^2]: the row of the bias table for each pair of positions in a window."""
    rows, columns = np.divmod(np.arange(window**2), window)
    down, right = (axis[:, None] - axis[None, :] + window - 1 for axis in (rows, columns))
    return down * (2 * window - 1) + right


def shift_mask(height: int, width: int, window: int, shift: int) -> np.ndarray:
    """Return float32[windows, window^2, window^2] to add to the logits of an image that is shifted by `shift`.

    The shift brings areas from opposite sides of the image into one window; they do not attend to each other.
    """

    def areas(length: int) -> np.ndarray:
        position = np.arange(length)
        return (position >= length - window).astype(int) + (position >= length - shift)

    area = areas(height)[:, None] * 3 + areas(width)[None, :]
    area = np.asarray(split_windows(area[None, :, :, None], window))[..., 0]
    return np.where(area[:, None, :] != area[:, :, None], np.float32(MASKED), np.float32(0))


def split_windows(x, window: int):
    """x: [B, H, W, C]. Return [B * windows, window^2, C]; H and W are multiples of `window`."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // window, window, w // window, window, c).swapaxes(2, 3)
    return x.reshape(-1, window**2, c)


def join_windows(x, window: int, height: int, width: int):
    """x: [B * windows, window^2, C]. Return [B, height, width, C], the inverse of `split_windows`."""
    c = x.shape[-1]
    x = x.reshape(-1, height // window, width // window, window, window, c).swapaxes(2, 3)
    return x.reshape(-1, height, width, c)


class WindowSelfAttention(nn.Module):
    """Attention among the positions of each window, with a learned bias for each offset; x: [B * windows, N, C].

    mask: float32[windows, N, N], added to the logits, or None.
    """

    config: SwinConfig
    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: np.ndarray | None) -> jax.Array:
        c, (count, length, width) = self.config, x.shape

        def project(name):
            y = nn.Dense(width, use_bias=c.qkv_bias, dtype=self.dtype, name=name)(x)
            return y.reshape(count, length, self.heads, -1)

        q, k, v = project("query"), project("key"), project("value")
        rows = (2 * c.window_size - 1) ** 2
        table = self.param("relative_position_bias_table", nn.initializers.normal(0.02), (rows, self.heads))
        bias = table[relative_positions(c.window_size)].transpose(2, 0, 1)[None]
        logits = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32) * (width // self.heads) ** -0.5
        logits = logits + bias
        if mask is not None:
            logits = logits.reshape(-1, len(mask), *logits.shape[1:]) + mask[None, :, None]
            logits = logits.reshape(count, self.heads, length, length)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        return jnp.einsum("bhnm,bmhd->bnhd", weights, v).reshape(count, length, width)


class Output(nn.Module):
    """A linear layer, one level below its name in the published keys."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(self.features, dtype=self.dtype, name="dense")(x)


class WindowAttention(nn.Module):
    config: SwinConfig
    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: np.ndarray | None) -> jax.Array:
        y = WindowSelfAttention(self.config, self.heads, self.dtype, name="self")(x, mask)
        return Output(x.shape[-1], self.dtype, name="output")(y)


class SwinBlock(nn.Module):
    """x + attention in windows, then x + MLP, each after a layer norm; x: [B, H, W, C]."""

    config: SwinConfig
    heads: int
    shift: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, (_, height, width, channels) = self.config, x.shape
        window, shift = c.window_size, self.shift
        y = layer_norm(self.dtype, "layernorm_before", c.layer_norm_eps)(x)
        # Windows at the right and the bottom are filled up with zeros, to which the others attend.
        y = jnp.pad(y, ((0, 0), (0, -height % window), (0, -width % window), (0, 0)))
        padded_height, padded_width = y.shape[1:3]
        mask = shift_mask(padded_height, padded_width, window, shift) if shift else None
        y = split_windows(jnp.roll(y, (-shift, -shift), (1, 2)), window)
        y = WindowAttention(c, self.heads, self.dtype, name="attention")(y, mask)
        y = jnp.roll(join_windows(y, window, padded_height, padded_width), (shift, shift), (1, 2))
        x = x + y[:, :height, :width]
        y = layer_norm(self.dtype, "layernorm_after", c.layer_norm_eps)(x)
        y = activation(c.hidden_act)(Output(int(channels * c.mlp_ratio), self.dtype, name="intermediate")(y))
        return x + Output(channels, self.dtype, name="output")(y)


class PatchMerging(nn.Module):
    """Half the size, twice the channels: a linear layer over each square of four positions; x: [B, H, W, C]."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        _, height, width, channels = x.shape
        x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
        x = jnp.concatenate([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], axis=-1)
        x = layer_norm(self.dtype, "norm")(x)
        return nn.Dense(2 * channels, use_bias=False, dtype=self.dtype, name="reduction")(x)


class Stage(nn.Module):
    """Return (features of the stage, input of the next one); the last stage has no next one."""

    config: SwinConfig
    index: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        c = self.config
        for i in range(c.depths[self.index]):
            shift = c.window_size // 2 if i % 2 else 0
            x = SwinBlock(c, c.num_heads[self.index], shift, self.dtype, name=f"blocks_{i}")(x)
        if self.index == len(c.depths) - 1:
            return x, x
        return x, PatchMerging(self.dtype, name="downsample")(x)


class Encoder(nn.Module):
    config: SwinConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        features = []
        for i in range(len(self.config.depths)):
            feature, x = Stage(self.config, i, self.dtype, name=f"layers_{i}")(x)
            features.append(feature)
        return features


class PatchEmbeddings(nn.Module):
    features: int
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        size = (PATCH, PATCH)
        return nn.Conv(self.features, size, size, padding="VALID", dtype=self.dtype, name="projection")(images)


class Embeddings(nn.Module):
    config: SwinConfig
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = PatchEmbeddings(self.config.embed_dim, self.dtype, name="patch_embeddings")(images)
        return layer_norm(self.dtype, "norm")(x)


class StageNorms(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, features: list[jax.Array]) -> list[jax.Array]:
        return [layer_norm(self.dtype, f"stage{i}")(x) for i, x in enumerate(features, 1)]


class SwinBackbone(nn.Module):
    """Swin Transformer: images [B, H, W, 3] -> the normed features of all stages, [B, H / s, W / s, C].

    The strides s are 4, 8, 16 and 32; H and W are multiples of PATCH. Parameters, softmax and norm statistics are
    float32; the rest is computed in `dtype`.
    """

    config: SwinConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> list[jax.Array]:
        x = Embeddings(self.config, self.dtype, name="embeddings")(images)
        return StageNorms(self.dtype, name="hidden_states_norms")(Encoder(self.config, self.dtype, name="encoder")(x))
