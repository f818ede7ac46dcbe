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

from lcm_jax.models import winograd
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
        scale, bias = (p.reshape(*[1] * (x.ndim - 1), -1) for p in (scale, bias))
        mean = self._mean_of_groups(x)
        variance = self._mean_of_groups(jnp.square(x.astype(jnp.float32) - mean))
        # Folded into one multiply-add per element: y = x a + b, with a and b per example and channel.
        a = jax.lax.rsqrt(variance + self.epsilon) * scale
        return (x.astype(jnp.float32) * a + (bias - mean * a)).astype(self.dtype)

    def _mean_of_groups(self, x):
        """Return the mean of x: [B, ..., C] of each example and group, float32[B, 1, ..., C], equal within a group."""
        means, axes = x, x.ndim - 2
        for _ in range(axes):  # one axis after the other, which XLA vectorizes on a CPU; over all at once it does not
            means = means.mean(axis=-2, dtype=jnp.float32)
        means = means.reshape(len(x), self.groups, -1).mean(axis=-1)
        return jnp.repeat(means, x.shape[-1] // self.groups, axis=-1).reshape(len(x), *[1] * axes, -1)


Padding = tuple[tuple[int, int], tuple[int, int]]


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: Padding | None = None) -> jax.Array:
    """Return the convolution of x: [B, H, W, C] with kernel: [k, k, C, features]; by default padded by k // 2."""
    size = len(kernel)
    if size == 1:  # the gradient of a matrix product is several times faster than a convolution's on a CPU
        return jnp.tensordot(x, kernel[0, 0], 1)
    half = size // 2
    if size == 3 and stride == 1 and padding is None and x.dtype == jnp.float32:
        return winograd.convolve(x, kernel)
    padding = padding or ((half, half), (half, half))
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=dimensions)


class Conv(nn.Module):
    """Convolution of x: [B, H, W, C] with PyTorch's symmetric padding, or `padding` per side.

    upsample: repeat each pixel twice along both axes before the convolution.
    """

    features: int
    size: int = 3
    stride: int = 1
    padding: Padding | None = None
    dtype: Dtype = jnp.float32
    zero: bool = False
    bias: bool = True
    upsample: bool = False

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.zeros if self.zero else nn.initializers.lecun_normal()
        shape = (self.size, self.size, x.shape[-1], self.features)
        y = self.convolve(x.astype(self.dtype), self.param("kernel", init, shape).astype(self.dtype))
        if self.bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype).reshape(1, 1, 1, -1)
        return mark(y, CONVOLUTION)

    @nn.nowrap
    def convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Return x: [B, H, W, C], convolved as this layer does, with another kernel: [k, k, C, features]."""
        if self.upsample:
            return convolve_upsampled(x, kernel)
        return convolve(x, kernel, self.stride, self.padding)


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


@jax.custom_vjp
def convolve_upsampled(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return the convolution of x: [B, H, W, C], each pixel repeated twice along both axes, with kernel: [3, 3, C, F].

    Each of the four pixels that come from one sees only 2x2 different pixels, so that a 2x2 kernel of sums gives the
    same with 4/9 of the multiplications. The sums are in float32. The result is [B, 2H, 2W, F] in the dtype of x.
    """
    batch, height, width, _ = x.shape

    def sums(k, axis):
        """Return the kernel of the first and of the second of two equal pixels along an axis."""
        before, middle, after = jnp.split(k, 3, axis)
        first, second = [before, middle + after], [before + middle, after]
        return [jnp.concatenate(parts, axis) for parts in (first, second)]

    kernels = [each for rows in sums(kernel.astype(jnp.float32), 0) for each in sums(rows, 1)]
    y = convolve(x, jnp.concatenate(kernels, axis=-1).astype(x.dtype), padding=((1, 1), (1, 1)))
    y = y.reshape(batch, height + 1, width + 1, 2, 2, -1)  # the last but one: row and column of the four pixels
    pixels = [[y[:, i : i + height, j : j + width, i, j] for j in range(2)] for i in range(2)]
    return jnp.stack([jnp.stack(row, axis=3) for row in pixels], axis=2).reshape(batch, 2 * height, 2 * width, -1)


def _upsampled_forward(x, kernel):
    return convolve_upsampled(x, kernel), (x, kernel)


def _upsampled_backward(saved, gradient):
    # Of the convolution of repeated pixels: its gradients are faster than those of four kernels of sums.
    x, kernel = saved
    batch, height, width, channels = x.shape
    of_repeated, of_kernel = winograd.gradients(x.repeat(2, axis=1).repeat(2, axis=2), kernel, gradient)
    return of_repeated.reshape(batch, height, 2, width, 2, channels).sum((2, 4)), of_kernel


convolve_upsampled.defvjp(_upsampled_forward, _upsampled_backward)


class Upsample(nn.Module):
    """Nearest-neighbor upsampling to twice the size, or to `size` (height, width), then a 3x3 convolution."""

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x, size: tuple[int, int] | None = None):
        h, w = x.shape[1:3]
        twice = size is None or size == (2 * h, 2 * w)
        if size is not None and not twice:
            # PyTorch's rule, floor(i h / H); jax.image.resize uses pixel centers, which differ at odd sizes.
            rows, columns = (np.arange(new) * old // new for new, old in zip(size, (h, w), strict=True))
            x = x[:, rows[:, None], columns[None, :], :]
        return Conv(self.features, upsample=twice, dtype=self.dtype, name="conv")(x)
