"""Winograd's convolution F(2x2, 3x3): 4 multiplications per pixel instead of 9 (arXiv 1509.09308).

A 3x3 convolution computes tiles of 2x2 pixels from tiles d of 4x4 pixels as A^T [(G k G^T) * (B^T d B)] A, where the
product * over the channels is 16 matrix products. In float32 its rounding errors are about those of the plain sum. GPU
libraries choose it by themselves; XLA's convolution on a CPU does not.
"""

from functools import partial

import jax
import jax.numpy as jnp

KERNEL = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))  # G
# Values of the tiles that are in memory at once; more images or rows are computed in turn, mostly in the cache.
MAX_VALUES = 2**24
MIN_CHANNELS, MIN_PIXELS = 20, 8  # see `pays`


def pays(x: jax.Array, kernel: jax.Array) -> bool:
    """Return True if this is the faster way on a CPU for x: float32[B, H, W, C] and kernel: float32[3, 3, C, F].

    With few channels, transforming the tiles takes longer than the products; with few pixels, transforming the kernel
    does. The bounds are those of measurements on two cores of an AMD EPYC with AVX-512.
    """
    batch, height, width, channels = x.shape
    features = kernel.shape[-1]
    return (
        height % 2 == width % 2 == 0
        and channels * features >= MIN_CHANNELS * (channels + features)
        and batch * height * width >= MIN_PIXELS * (channels * features) ** 0.5
    )


def _differences(parts):
    """Return B^T of four arrays."""
    a, b, c, d = parts
    return a - c, b + c, c - b, b - d


def _sums(parts):
    """Return A^T of four arrays."""
    a, b, c, d = parts
    return a + b + c, b - c - d


def _twice(transform, grid):
    """Apply a transform to the columns and then to the rows of a nested tuple of arrays."""
    columns = list(zip(*(transform(column) for column in zip(*grid, strict=True)), strict=True))
    return tuple(transform(row) for row in columns)


def _tiles(x: jax.Array) -> list[list[jax.Array]]:
    """Return pixel (i, j) of every tile of 4x4 pixels with stride 2 of x: [B, H, W, C], each [tiles, C]."""
    batch, height, width, channels = x.shape

    def pixel(i, j):
        picked = jax.lax.slice(x, (0, i, j, 0), (batch, height - 3 + i, width - 3 + j, channels), (1, 2, 2, 1))
        return picked.reshape(-1, channels)

    return [[pixel(i, j) for j in range(4)] for i in range(4)]


def _convolve_padded(x: jax.Array, transformed: jax.Array) -> jax.Array:
    """Return [B, H - 2, W - 2, F] for x: [B, H, W, C] and the transformed kernel: [4, 4, C, F]."""
    batch, height, width, _ = x.shape
    tiles = _twice(_differences, _tiles(x))
    products = [[tiles[i][j] @ transformed[i, j] for j in range(4)] for i in range(4)]
    pixels = jnp.stack([jnp.stack(row, axis=1) for row in _twice(_sums, products)], axis=1)  # [tiles, 2, 2, F]
    rows, columns = height // 2 - 1, width // 2 - 1
    image = pixels.reshape(batch, rows, columns, 2, 2, -1).transpose(0, 1, 3, 2, 4, 5)
    return image.reshape(batch, 2 * rows, 2 * columns, -1)


def _direct(x: jax.Array, kernel: jax.Array) -> jax.Array:
    same = ((1, 1), (1, 1))
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), same, dimension_numbers=("NHWC", "HWIO", "NHWC"))


@jax.jit  # so that convolutions of the same shapes are traced once
def _winograd(x: jax.Array, kernel: jax.Array) -> jax.Array:
    batch, height, width, channels = x.shape
    features = kernel.shape[-1]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    transform = jnp.array(KERNEL)
    transformed = jnp.einsum("ai,bj,ijcf->abcf", transform, transform, kernel)
    per_row = 4 * width * (channels + features)
    if batch * height * per_row <= MAX_VALUES:
        return _convolve_padded(padded, transformed)
    rows = next(n for n in range(height, 0, -2) if height % n == 0 and (n * per_row <= MAX_VALUES or n == 2))
    strips = height // rows  # of each image

    def strip(number):
        start = (number // strips, number % strips * rows, 0, 0)
        part = jax.lax.dynamic_slice(padded, start, (1, rows + 2, width + 2, channels))
        return _convolve_padded(part, transformed)

    return jax.lax.map(strip, jnp.arange(batch * strips)).reshape(batch, height, width, features)


def _same(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return (
        jax.lax.platform_dependent(x, kernel, cpu=_winograd, default=_direct) if pays(x, kernel) else _direct(x, kernel)
    )


@jax.custom_vjp
def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return the convolution of x: float32[B, H, W, C] with kernel: float32[3, 3, C, F], padded by 1.

    On a CPU it is Winograd's where that pays, elsewhere XLA's operation. Only reverse-mode derivatives are supported.
    """
    return _same(x, kernel)


def _forward(x, kernel):
    return _same(x, kernel), (x, kernel)


def gradients(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of x and of the kernel, for that of `convolve`'s result: [B, H, W, F]. Any dtype."""
    if x.dtype == jnp.float32:
        # XLA's own transpose leaves the kernel as it is and convolves along other axes, which takes a CPU up to 1.7
        # times as long as turning it first.
        of_x = _same(gradient, kernel[::-1, ::-1].swapaxes(2, 3))
    else:
        (of_x,) = jax.linear_transpose(lambda x: _direct(x, kernel), x)(gradient)
    (of_kernel,) = jax.linear_transpose(partial(_direct, x), kernel)(gradient)
    return of_x, of_kernel


def _backward(saved, gradient):
    x, kernel = saved
    return gradients(x, kernel, gradient)


convolve.defvjp(_forward, _backward)
