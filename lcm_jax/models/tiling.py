"""An autoencoder on large images, tile by tile, so that the memory it takes is that of a tile (diffusers' VAE tiling).

Tiles overlap by a quarter, and each is blended with the one above it and the one left of it. Groups and attention of
a tile see that tile alone, so that the result differs a little from that of the whole image.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

OVERLAP = 4  # one part in four
DEFAULT_SIZE = 32  # sample_size of an AutoencoderKL whose config has none


def tile_size(config: Mapping[str, Any], side: int | None = None) -> int:
    """Return the side of a tile in pixels: `side`, or the sample_size in the config of an AutoencoderKL.

    Raises ValueError unless it is a multiple of four latents.
    """
    name, value = "tile_sample_min_size", side
    if side is None:
        name, value = "sample_size", config.get("sample_size", DEFAULT_SIZE)
        value = value[0] if isinstance(value, list | tuple) and value else value
    multiple = OVERLAP * 2 ** (len(config["block_out_channels"]) - 1)
    if type(value) is not int or value < multiple or value % multiple:
        raise ValueError(
            f"{name} {value!r} is not supported for tiles; use a tile_sample_min_size that is a multiple of {multiple}"
        )
    return value


def map_tiles(
    network: Callable[[jax.Array], jax.Array], x: jax.Array, size: int, ratio: tuple[int, int] = (1, 1)
) -> jax.Array:
    """Return network(x) made of tiles, or in one piece if x is at most `size` high and wide.

    network: [B, h, w, c] -> [B, h * p / q, w * p / q, d] for the ratio (p, q). x: [B, H, W, c]. size: side of a tile of
    x, a multiple of 4 q. Tiles of one shape run one after another; those at the lower and right border are smaller.
    """
    if max(x.shape[1:3]) <= size:
        return network(x)
    scaled = lambda n: n * ratio[0] // ratio[1]  # noqa: E731
    stride = size - size // OVERLAP
    rows, columns = (range(0, length, stride) for length in x.shape[1:3])
    places: dict[tuple[int, int], list[tuple[int, int]]] = {}  # by (height, width)
    for i in rows:
        for j in columns:
            places.setdefault((min(size, x.shape[1] - i), min(size, x.shape[2] - j)), []).append((i, j))
    tiles = {}
    for (height, width), corners in places.items():
        shape = (x.shape[0], height, width, x.shape[3])

        def run(corner: jax.Array, shape=shape) -> jax.Array:
            return network(jax.lax.dynamic_slice(x, (0, corner[0], corner[1], 0), shape))

        tiles |= dict(zip(corners, jax.lax.map(run, np.array(corners, np.int32)), strict=True))
    for i in rows:
        for j in columns:
            if i:
                tiles[i, j] = _blend(tiles[i - stride, j], tiles[i, j], scaled(size // OVERLAP), axis=1)
            if j:
                tiles[i, j] = _blend(tiles[i, j - stride], tiles[i, j], scaled(size // OVERLAP), axis=2)
    kept = scaled(stride)
    lines = [jnp.concatenate([tiles[i, j][:, :kept, :kept] for j in columns], axis=2) for i in rows]
    return jnp.concatenate(lines, axis=1)


def _blend(before: jax.Array, tile: jax.Array, extent: int, axis: int) -> jax.Array:
    """Return `tile` whose first rows (axis 1) or columns (axis 2), up to `extent`, begin as the last ones of `before`.

    Both: [B, h, w, c].
    """
    extent = min(before.shape[axis], tile.shape[axis], extent)
    share = jnp.expand_dims(jnp.arange(extent, dtype=jnp.float32) / extent, [each for each in range(4) if each != axis])
    last = jax.lax.slice_in_dim(before, before.shape[axis] - extent, before.shape[axis], axis=axis)
    first = jax.lax.slice_in_dim(tile, 0, extent, axis=axis)
    rest = jax.lax.slice_in_dim(tile, extent, tile.shape[axis], axis=axis)
    return jnp.concatenate([last * (1.0 - share) + first * share, rest], axis=axis)
