"""Blocks shared by the autoencoders and the UNet. NHWC; submodule names follow the keys of diffusers' weights."""

import reprlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

from lcm_jax.models.remat import CONVOLUTION, mark

Dtype = Any
ACTIVATIONS = {
    "silu": nn.silu,
    "swish": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "mish": jax.nn.mish,
    "relu": nn.relu,
}


class Between(NamedTuple):
    """Any number in [low, high], in a table of supported values."""

    low: float
    high: float


# Such tables hold single values, a range for any of its integers, and [kinds] for a list of values of these kinds.
SIZE = range(1, 2**16 + 1)  # channels, tokens, pixels
COUNT = range(1, 65)  # of layers, levels, heads
MAX_LIST_LENGTH = 64
SHORT = reprlib.Repr()
SHORT.maxlevel, SHORT.maxlist, SHORT.maxtuple, SHORT.maxstring, SHORT.maxother, SHORT.maxlong = 3, 12, 12, 60, 60, 30


def supports(kind: Any, value: Any) -> bool:
    """Return True if a config.json value is of `kind`: a value, a range, Between, or [kinds]. true does not equal 1."""
    if isinstance(kind, list):
        return (
            isinstance(value, list | tuple)
            and len(value) <= MAX_LIST_LENGTH
            and all(any(supports(one, each) for one in kind) for each in value)
        )
    if isinstance(kind, range):
        return type(value) is int and value in kind
    if isinstance(kind, Between):
        return type(value) in (int, float) and kind.low <= value <= kind.high
    return isinstance(value, bool) == isinstance(kind, bool) and value == kind


def describe(kind: Any) -> str:
    if isinstance(kind, list):
        return "a list of " + " or ".join(map(describe, kind))
    if isinstance(kind, range):
        return f"an integer in {kind.start}..{kind.stop - 1}"
    return f"a number in [{kind.low:g}, {kind.high:g}]" if isinstance(kind, Between) else repr(kind)


def check_config(network: str, config: Mapping[str, Any], supported: Mapping[str, tuple | None]) -> None:
    """Check a published config.json against the implemented options.

    supported: option -> tuple of supported values and kinds of values (see `supports`), or None for an option that has
    no effect here. Keys that begin with an underscore are ignored. Raises ValueError that names every option that is
    unknown or has an unsupported value.
    """
    wrong = []
    for option, value in config.items():
        if option.startswith("_"):
            continue
        shown = f"{option if option.isidentifier() else SHORT.repr(option)}={SHORT.repr(value)}"
        kinds = supported.get(option)
        if option not in supported:
            wrong.append(f"{shown} (unknown option)")
        elif kinds is not None and not any(supports(kind, value) for kind in kinds):
            wrong.append(f"{shown} (supported: {', '.join(map(describe, kinds))})")
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(f"{network} config has options that are not supported: {'; '.join(wrong[:8])}{more}")


def check_groups(network: str, config: Mapping[str, Any]) -> None:
    """Raise ValueError unless each width in `block_out_channels`, at least one, is a multiple of `norm_num_groups`."""
    widths, groups = config["block_out_channels"], config["norm_num_groups"]
    if not widths or any(width % groups for width in widths):
        raise ValueError(
            f"{network} config: block_out_channels={list(widths)!r} is not supported; it needs at least one width, "
            f"each a multiple of norm_num_groups={groups}"
        )


def apply(network: nn.Module, params: Any, *inputs, **options) -> Any:
    """Return the output of a network, which Flax annotates as a possible tuple of output and mutable variables."""
    return network.apply({"params": params}, *inputs, **options)


@lru_cache(maxsize=32)
def abstract_network(network: nn.Module, *inputs: jax.ShapeDtypeStruct | None) -> Any:
    """Return the parameters of a network as ShapeDtypeStructs; equal networks are traced once, which takes seconds."""
    rng = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(network.init, rng, *inputs)["params"]


def freeze(value: Any) -> Any:
    """Convert lists to tuples and dicts to frozen dicts, so that a config is a hashable attribute of a module."""
    if isinstance(value, Mapping):
        return FrozenDict({name: freeze(v) for name, v in value.items()})
    return tuple(freeze(v) for v in value) if isinstance(value, list | tuple) else value


def activation(name: str):
    """Return the function of a name in ACTIVATIONS. Raises ValueError for any other name."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not supported; choose one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class GroupNorm(nn.Module):
    """Group normalization of x: [B, ..., C]; the statistics are in float32 for any compute dtype."""

    groups: int
    epsilon: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        grouped = x.astype(jnp.float32).reshape(x.shape[0], -1, self.groups, channels // self.groups)
        mean = grouped.mean((1, 3), keepdims=True)
        variance = jnp.square(grouped - mean).mean((1, 3), keepdims=True)
        # Folded into one multiply-add per element: y = x a + b, with a and b per example and channel.
        a = jax.lax.rsqrt(variance + self.epsilon) * scale.reshape(1, 1, self.groups, -1)
        b = bias.reshape(1, 1, self.groups, -1) - mean * a
        return (grouped * a + b).reshape(x.shape).astype(self.dtype)


Padding = tuple[tuple[int, int], tuple[int, int]]


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: Padding | None = None) -> jax.Array:
    """Return the convolution of x: [B, H, W, C] with kernel: [k, k, C, features]; by default padded by k // 2."""
    size = len(kernel)
    if size == 1:  # the gradient of a matrix product is several times faster than a convolution's on a CPU
        return jnp.tensordot(x, kernel[0, 0], 1)
    half = size // 2
    padding = padding or ((half, half), (half, half))
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=dimensions)


class Conv(nn.Module):
    """Convolution of x: [B, H, W, C] with PyTorch's symmetric padding, or `padding` per side."""

    features: int
    size: int = 3
    stride: int = 1
    padding: Padding | None = None
    dtype: Dtype = jnp.float32
    zero: bool = False
    bias: bool = True

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.zeros if self.zero else nn.initializers.lecun_normal()
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", init, shape).astype(self.dtype)
        y = convolve(x.astype(self.dtype), kernel, self.stride, self.padding)
        if self.bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype).reshape(1, 1, 1, -1)
        return mark(y, CONVOLUTION)


class ResnetBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x))) + time))), with a 1x1 shortcut if the number of channels changes.

    x: [B, H, W, C]; time: [B, D] or None.
    """

    features: int
    groups: int
    epsilon: float
    act: str = "silu"
    output_scale: float = 1.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x, time=None):
        act = activation(self.act)
        norm = lambda name: GroupNorm(self.groups, self.epsilon, self.dtype, name=name)  # noqa: E731
        h = Conv(self.features, dtype=self.dtype, name="conv1")(act(norm("norm1")(x)))
        if time is not None:
            h = h + nn.Dense(self.features, dtype=self.dtype, name="time_emb_proj")(act(time))[:, None, None, :]
        # A block that starts as the identity trains well from scratch at any depth.
        h = Conv(self.features, dtype=self.dtype, zero=True, name="conv2")(act(norm("norm2")(h)))
        if x.shape[-1] != self.features:
            x = Conv(self.features, size=1, dtype=self.dtype, name="conv_shortcut")(x)
        return (x + h) / self.output_scale if self.output_scale != 1.0 else x + h


class Downsample(nn.Module):
    """3x3 convolution with stride 2. padding: 1 on every side (UNet), or 0 to pad right and bottom (autoencoder)."""

    features: int
    padding: int = 1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        side = (self.padding, self.padding) if self.padding else (0, 1)
        return Conv(self.features, stride=2, padding=(side, side), dtype=self.dtype, name="conv")(x)


def upsample_nearest(x: jax.Array) -> jax.Array:
    """Repeat each pixel of x: [B, H, W, C] twice along both axes, [B, 2H, 2W, C]."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


class Upsample(nn.Module):
    """Nearest-neighbor upsampling to twice the size, or to `size` (height, width), then a 3x3 convolution."""

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x, size: tuple[int, int] | None = None):
        h, w = x.shape[1:3]
        if size is None or size == (2 * h, 2 * w):
            x = upsample_nearest(x)
        else:
            # PyTorch's rule, floor(i h / H); jax.image.resize uses pixel centers, which differ at odd sizes.
            rows, columns = (np.arange(new) * old // new for new, old in zip(size, (h, w), strict=True))
            x = x[:, rows[:, None], columns[None, :], :]
        return Conv(self.features, dtype=self.dtype, name="conv")(x)
