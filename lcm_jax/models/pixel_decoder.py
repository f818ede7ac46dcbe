"""Mask2Former's pixel decoder (arXiv 2112.01527, section 3.2.1): features of a backbone -> features of masks.

Its encoder attends to a few sampled points in all scales at once: multi-scale deformable attention (arXiv 2010.04159).
NHWC; submodule names follow the keys of transformers' weights.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.models.layers import GroupNorm
from lcm_jax.models.swin import layer_norm

LEVELS, POINTS = 3, 4  # scales of features, and points that a query samples in each, for each head
GROUPS, EPSILON = 32, 1e-5  # of the group norms
TEMPERATURE = 10000


def sine_positions(height: int, width: int, channels: int) -> np.ndarray:
    """Return float32[height, width, channels]: sines and cosines of the row, then of the column, from 0 to 2 pi.

    channels is a multiple of 4.
    """

    def encode(length: int) -> np.ndarray:
        position = np.arange(1, length + 1, dtype=np.float32)
        position = position / (position[-1] + np.float32(1e-6)) * np.float32(2 * np.pi)
        exponent = 2 * (np.arange(channels // 2) // 2) / (channels // 2)
        angle = position[:, None] / np.float32(TEMPERATURE) ** exponent.astype(np.float32)
        return np.stack([np.sin(angle[:, 0::2]), np.cos(angle[:, 1::2])], axis=2).reshape(length, -1)

    rows = np.broadcast_to(encode(height)[:, None], (height, width, channels // 2))
    columns = np.broadcast_to(encode(width)[None, :], (height, width, channels // 2))
    return np.concatenate([rows, columns], axis=-1)


def reference_points(sizes: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return float32[N, 2]: the centers (x, y) of all positions of all levels, in [0, 1]."""
    points = []
    for height, width in sizes:
        y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
        points.append(np.stack([x, y], axis=-1).reshape(-1, 2))
    return np.concatenate(points).astype(np.float32)


def resize(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Resize x: [B, H, W, C] bilinearly between pixel centers, without antialiasing, as PyTorch's interpolate does."""
    shape = (x.shape[0], *size, x.shape[-1])
    return jax.image.resize(x, shape, "bilinear", antialias=False, precision=jax.lax.Precision.HIGHEST)


def sample_bilinear(values: jax.Array, points: jax.Array) -> jax.Array:
    """values: [B, H, W, C]; points: float32[B, N, 2], (x, y), where [0, 1] spans the image. Return [B, N, C].

    Outside of the image the values are 0: PyTorch's grid_sample with zero padding and align_corners=False.
    """
    b, height, width, channels = values.shape
    flat = values.reshape(b, height * width, channels)
    x, y = points[..., 0] * width - 0.5, points[..., 1] * height - 0.5
    left, top = jnp.floor(x), jnp.floor(y)
    output = jnp.zeros((*points.shape[:-1], channels), values.dtype)
    for column, row in ((left, top), (left + 1, top), (left, top + 1), (left + 1, top + 1)):
        weight = (1 - jnp.abs(x - column)) * (1 - jnp.abs(y - row))
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        index = jnp.clip(row, 0, height - 1).astype(int) * width + jnp.clip(column, 0, width - 1).astype(int)
        corner = jnp.take_along_axis(flat, index[..., None], axis=1)
        output = output + corner * jnp.where(inside, weight, 0)[..., None].astype(values.dtype)
    return output


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention: each query x: [B, N, C] samples POINTS points of each level, for each head.

    positions: [1, N, C], added to the queries. sizes: (height, width) of each level, N positions in all.
    """

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array, sizes: Sequence[tuple[int, int]]) -> jax.Array:
        batch, length, width = x.shape
        queries = x + positions

        def dense(y, features, name):
            return nn.Dense(features, dtype=self.dtype, name=name)(y)

        shape = (batch, length, self.heads, len(sizes), POINTS)
        offsets = dense(queries, self.heads * len(sizes) * POINTS * 2, "sampling_offsets").reshape(*shape, 2)
        logits = dense(queries, self.heads * len(sizes) * POINTS, "attention_weights").astype(jnp.float32)
        weights = jax.nn.softmax(logits.reshape(batch, length, self.heads, -1)).reshape(shape).astype(self.dtype)
        values = dense(x, width, "value_proj").reshape(batch, length, self.heads, -1).swapaxes(1, 2)
        centers, start, output = jnp.asarray(reference_points(sizes)), 0, jnp.zeros((), self.dtype)
        for level, (rows, columns) in enumerate(sizes):
            value = values[:, :, start : start + rows * columns].reshape(batch * self.heads, rows, columns, -1)
            start += rows * columns
            extent = jnp.array([columns, rows], jnp.float32).reshape(1, 1, 1, 1, 2)
            shift = offsets[:, :, :, level].astype(jnp.float32) / extent
            points = (centers[None, :, None, None] + shift).swapaxes(1, 2).reshape(batch * self.heads, -1, 2)
            sampled = sample_bilinear(value, points).reshape(batch, self.heads, length, POINTS, -1)
            output = output + jnp.einsum("bhnpd,bnhp->bnhd", sampled, weights[:, :, :, level])
        return dense(jnp.reshape(output, (batch, length, width)), width, "output_proj")


class EncoderLayer(nn.Module):
    heads: int
    feedforward: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array, sizes: Sequence[tuple[int, int]]) -> jax.Array:
        y = DeformableAttention(self.heads, self.dtype, name="self_attn")(x, positions, sizes)
        x = layer_norm(self.dtype, "self_attn_layer_norm")(x + y)
        y = nn.relu(nn.Dense(self.feedforward, dtype=self.dtype, name="fc1")(x))
        y = nn.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(y)
        return layer_norm(self.dtype, "final_layer_norm")(x + y)


class Encoder(nn.Module):
    layers: int
    heads: int
    feedforward: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array, sizes: Sequence[tuple[int, int]]) -> jax.Array:
        for i in range(self.layers):
            x = EncoderLayer(self.heads, self.feedforward, self.dtype, name=f"layers_{i}")(x, positions, sizes)
        return x


class PixelDecoder(nn.Module):
    """Backbone features of strides 4, 8, 16, 32 -> (features of stride 4 for masks, features of strides 32, 16, 8).

    features: [B, H / s, W / s, C_s] from the highest resolution to the lowest. Returns ([B, H / 4, W / 4, mask_size],
    [B, H / s, W / s, size] from the lowest resolution to the highest).
    """

    size: int
    mask_size: int
    layers: int
    heads: int
    feedforward: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: Sequence[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
        def conv(x, features, size, name, bias=False):
            pad = size // 2
            return nn.Conv(
                features, (size, size), padding=((pad, pad), (pad, pad)), use_bias=bias, dtype=self.dtype, name=name
            )(x)

        def norm(x, name):
            return GroupNorm(GROUPS, EPSILON, self.dtype, name=name)(x)

        level_embed = self.param("level_embed", nn.initializers.normal(1.0), (LEVELS, self.size))
        inputs, positions, sizes = [], [], []
        for i, feature in enumerate(reversed(features[-LEVELS:])):
            x = norm(conv(feature, self.size, 1, f"input_projections_{i}_0", bias=True), f"input_projections_{i}_1")
            height, width = x.shape[1:3]
            inputs.append(x.reshape(x.shape[0], height * width, self.size))
            positions.append(sine_positions(height, width, self.size).reshape(-1, self.size) + level_embed[i : i + 1])
            sizes.append((height, width))
        encoder = Encoder(self.layers, self.heads, self.feedforward, self.dtype, name="encoder")
        encoded = encoder(jnp.concatenate(inputs, 1), jnp.concatenate(positions)[None].astype(self.dtype), sizes)
        starts = np.cumsum([height * width for height, width in sizes])[:-1]
        scales = [
            part.reshape(part.shape[0], *size, self.size)
            for part, size in zip(jnp.split(encoded, starts, axis=1), sizes, strict=True)
        ]
        x = norm(conv(features[0], self.size, 1, "adapter_1_0"), "adapter_1_1")
        x = x + resize(scales[-1], (x.shape[1], x.shape[2]))
        x = nn.relu(norm(conv(x, self.size, 3, "layer_1_0"), "layer_1_1"))
        return conv(x, self.mask_size, 1, "mask_projection", bias=True), scales
