"""Inception v3 (arXiv 1512.00567) with the graph and the weights of TensorFlow's inception-2015-12-05, by which FID is
defined (arXiv 1706.08500).

It differs from later Inception networks: average pooling leaves the padding out, the last block pools by the maximum,
and there are 1008 classes. Submodule names follow the keys of the published `pt_inception-2015-12-05-6726825d.pth`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lcm_jax.models.layers import abstract_network

INPUT_SIZE = 299  # pixels
FEATURES = 2048

Size = tuple[int, int]


class BatchNorm(nn.Module):
    """Batch normalization with fixed statistics: x: [..., C] -> one multiply-add per element."""

    epsilon: float = 1e-3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape, ones, zeros = (x.shape[-1],), nn.initializers.ones, nn.initializers.zeros
        a = self.param("scale", ones, shape) / jnp.sqrt(self.param("running_var", ones, shape) + self.epsilon)
        b = self.param("bias", zeros, shape) - self.param("running_mean", zeros, shape) * a
        along_channels = (1,) * (x.ndim - 1) + shape
        return x * a.reshape(along_channels) + b.reshape(along_channels)


class Unit(nn.Module):
    """Convolution of x: [B, H, W, C] without bias, batch normalization, ReLU."""

    features: int
    size: Size = (1, 1)
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        strides = (self.stride, self.stride)
        x = nn.Conv(self.features, self.size, strides, self.padding, use_bias=False, name="conv")(x)
        return nn.relu(BatchNorm(name="bn")(x))


def chain(x: jax.Array, name: str, *units: tuple[int, Size], stride: int = 1) -> jax.Array:
    """Apply units (features, size) in a row, `name`_1, `name`_2, ..., or `name` alone; the last one has the stride."""
    for i, (features, size) in enumerate(units, start=1):
        last = stride if i == len(units) else 1
        named = f"{name}_{i}" if len(units) > 1 else name
        x = Unit(features, size, last, "VALID" if last > 1 else "SAME", name=named)(x)
    return x


def fork(x: jax.Array, name: str) -> jax.Array:
    """Concatenate a row and a column of three pixels: 2 * 384 channels."""
    return jnp.concatenate([Unit(384, (1, 3), name=f"{name}a")(x), Unit(384, (3, 1), name=f"{name}b")(x)], -1)


def average(x: jax.Array) -> jax.Array:
    """Return the mean of 3 x 3 pixels of x: [B, H, W, C], at the border of those inside."""
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def maximum(x: jax.Array, stride: int) -> jax.Array:
    return nn.max_pool(x, (3, 3), (stride, stride), "SAME" if stride == 1 else "VALID")


class MixedA(nn.Module):
    """35 x 35 pixels."""

    pool: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        one = chain(x, "branch1x1", (64, (1, 1)))
        five = chain(x, "branch5x5", (48, (1, 1)), (64, (5, 5)))
        double = chain(x, "branch3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3)))
        return jnp.concatenate([one, five, double, chain(average(x), "branch_pool", (self.pool, (1, 1)))], -1)


class MixedB(nn.Module):
    """35 x 35 -> 17 x 17 pixels."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        three = chain(x, "branch3x3", (384, (3, 3)), stride=2)
        double = chain(x, "branch3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3)), stride=2)
        return jnp.concatenate([three, double, maximum(x, 2)], -1)


class MixedC(nn.Module):
    """17 x 17 pixels."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, row, column = self.width, (1, 7), (7, 1)
        one = chain(x, "branch1x1", (192, (1, 1)))
        seven = chain(x, "branch7x7", (c, (1, 1)), (c, row), (192, column))
        double = chain(x, "branch7x7dbl", (c, (1, 1)), (c, column), (c, row), (c, column), (192, row))
        return jnp.concatenate([one, seven, double, chain(average(x), "branch_pool", (192, (1, 1)))], -1)


class MixedD(nn.Module):
    """17 x 17 -> 8 x 8 pixels."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        three = chain(x, "branch3x3", (192, (1, 1)), (320, (3, 3)), stride=2)
        seven = chain(x, "branch7x7x3", (192, (1, 1)), (192, (1, 7)), (192, (7, 1)), (192, (3, 3)), stride=2)
        return jnp.concatenate([three, seven, maximum(x, 2)], -1)


class MixedE(nn.Module):
    """8 x 8 pixels. by_maximum: pool by the maximum, as the graph of 2015 does in its last block."""

    by_maximum: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        one = chain(x, "branch1x1", (320, (1, 1)))
        three = fork(Unit(384, name="branch3x3_1")(x), "branch3x3_2")
        double = Unit(384, (3, 3), name="branch3x3dbl_2")(Unit(448, name="branch3x3dbl_1")(x))
        pooled = maximum(x, 1) if self.by_maximum else average(x)
        pooled = chain(pooled, "branch_pool", (192, (1, 1)))
        return jnp.concatenate([one, three, fork(double, "branch3x3dbl_3"), pooled], -1)


class InceptionV3(nn.Module):
    """float32[B, 299, 299, 3], in [-1, 1] -> float32[B, 2048], the last features, averaged over positions."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = Unit(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x)
        x = Unit(32, (3, 3), padding="VALID", name="Conv2d_2a_3x3")(x)
        x = maximum(Unit(64, (3, 3), name="Conv2d_2b_3x3")(x), 2)
        x = Unit(80, name="Conv2d_3b_1x1")(x)
        x = maximum(Unit(192, (3, 3), padding="VALID", name="Conv2d_4a_3x3")(x), 2)
        for name, pool in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = MixedA(pool, name=name)(x)
        x = MixedB(name="Mixed_6a")(x)
        for name, width in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            x = MixedC(width, name=name)(x)
        x = MixedD(name="Mixed_7a")(x)
        x = MixedE(by_maximum=False, name="Mixed_7b")(x)
        return MixedE(by_maximum=True, name="Mixed_7c")(x).mean((1, 2))


def abstract_inception(network: nn.Module) -> Any:
    """Return the parameters of an InceptionV3 as ShapeDtypeStructs."""
    return abstract_network(network, jax.ShapeDtypeStruct((1, INPUT_SIZE, INPUT_SIZE, 3), jnp.float32))
