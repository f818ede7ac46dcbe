"""I3D, Inception v1 inflated to video (arXiv 1705.07750), by whose Kinetics-400 logits FVD is defined (arXiv
1812.01717).

Submodule names follow the keys of pytorch-i3d, which the published `i3d_pretrained_400.pt` has.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lcm_jax.models.inception import BatchNorm
from lcm_jax.models.layers import abstract_network

INPUT_SIZE = 224  # pixels
CLASSES = 400

Size = tuple[int, int, int]  # time, height, width
# Channels of a block's four branches: 1x1x1; 1x1x1, 3x3x3; 1x1x1, 3x3x3; pooled, 1x1x1.
MIXED = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}


class Unit(nn.Module):
    """Convolution of x: [B, T, H, W, C] without bias, batch normalization, ReLU."""

    features: int
    size: Size = (1, 1, 1)
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(self.features, self.size, (self.stride,) * 3, use_bias=False, name="conv3d")(x)
        return nn.relu(BatchNorm(name="bn")(x))


def maximum(x: jax.Array, size: Size, stride: Size) -> jax.Array:
    return nn.max_pool(x, size, stride, "SAME")


class Mixed(nn.Module):
    """Four branches side by side. channels: see `MIXED`."""

    channels: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        one, reduced, three, small_reduced, small, pooled = self.channels
        cube = (3, 3, 3)
        branches = (
            Unit(one, name="b0")(x),
            Unit(three, cube, name="b1b")(Unit(reduced, name="b1a")(x)),
            Unit(small, cube, name="b2b")(Unit(small_reduced, name="b2a")(x)),
            Unit(pooled, name="b3b")(maximum(x, cube, (1, 1, 1))),
        )
        return jnp.concatenate(branches, -1)


class Logits(nn.Module):
    """A layer of x: [..., C] that is stored as a convolution."""

    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(self.classes, (1, 1, 1), name="conv3d")(x[:, :, None, None])
        return x[:, :, 0, 0]


class I3D(nn.Module):
    """float32[B, T, 224, 224, 3], in [-1, 1], T >= 9 -> float32[B, 400], the logits, averaged over time.

    divisor: of the channels, for a small network.
    """

    divisor: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d = self.divisor
        x = Unit(64 // d, (7, 7, 7), 2, name="Conv3d_1a_7x7")(x)
        x = maximum(x, (1, 3, 3), (1, 2, 2))
        x = Unit(192 // d, (3, 3, 3), name="Conv3d_2c_3x3")(Unit(64 // d, name="Conv3d_2b_1x1")(x))
        x = maximum(x, (1, 3, 3), (1, 2, 2))
        for name, channels in MIXED.items():
            if name == "Mixed_4b":
                x = maximum(x, (3, 3, 3), (2, 2, 2))
            elif name == "Mixed_5b":
                x = maximum(x, (2, 2, 2), (2, 2, 2))
            x = Mixed(tuple(each // d for each in channels), name=name)(x)
        x = x.mean((2, 3))
        x = (x[:, :-1] + x[:, 1:]) / 2  # the average pooling's window is two steps long
        return Logits(CLASSES // d, name="logits")(x).mean(1)


def abstract_i3d(network: nn.Module) -> Any:
    """Return the parameters of an I3D as ShapeDtypeStructs."""
    return abstract_network(network, jax.ShapeDtypeStruct((1, 16, 64, 64, 3), jnp.float32))
