"""Tiles of an autoencoder against diffusers' tiling on the same random weights, and the memory that they take."""

from functools import cache

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from lcm_jax.models.tiling import map_tiles, tile_size
from lcm_jax.models.vae import AutoencoderKL
from lcm_jax.weights import naming

CONFIG = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
    "sample_size": 16,
}
TILE = 16


@cache
def networks():
    """diffusers' autoencoder, and ours with its weights as (encode, decode)."""
    torch = pytest.importorskip("torch")
    from diffusers import AutoencoderKL as Reference

    torch.manual_seed(0)
    reference = Reference(**CONFIG).eval()
    reference.enable_tiling()
    tensors = {key: value.numpy() for key, value in reference.state_dict().items()}
    paths = {naming.to_path(key, value.ndim): value for key, value in tensors.items()}
    params = unflatten_dict({path: naming.to_array(path, value) for path, value in paths.items()})
    vae = AutoencoderKL.from_config(CONFIG)
    return reference, *(
        lambda x, m=method: vae.apply({"params": params}, x, method=m) for method in ("encode", "decode")
    )


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_equals_diffusers():
    torch = pytest.importorskip("torch")
    reference, encode, decode = networks()
    # A tile has 8 latents, and the next one begins 6 later: two whole tiles, and a border at each of two sides.
    height, width = 14, 8
    assert height - 2 * 6 == width - 6 == 2
    latents, images = normal(2, height, width, 4), normal(2, 2 * height, 2 * width, 3)
    to_torch = lambda x: torch.from_numpy(x).permute(0, 3, 1, 2)  # noqa: E731
    with torch.no_grad():
        decoded = reference.decode(to_torch(latents)).sample.permute(0, 2, 3, 1).numpy()
        encoded = reference.encode(to_torch(images)).latent_dist.parameters.permute(0, 2, 3, 1).numpy()
    ours = jax.jit(lambda z: map_tiles(decode, z, TILE // 2, (2, 1)))(latents)
    moments = jax.jit(lambda x: map_tiles(encode, x, TILE, (1, 2)))(images)
    np.testing.assert_allclose(ours, decoded, atol=1e-4 * np.abs(decoded).max())
    np.testing.assert_allclose(moments, encoded, atol=1e-4 * np.abs(encoded).max())
    whole = jax.jit(decode)(latents)
    assert np.abs(whole - decoded).max() > 0.01, "tiles see less of the image"


def test_a_small_image_is_one_piece():
    _, encode, _ = networks()
    images = normal(1, TILE, TILE, 3)
    np.testing.assert_array_equal(map_tiles(encode, images, TILE, (1, 2)), encode(images))


def test_a_network_that_sees_single_pixels_is_unchanged_by_tiles():
    x = normal(1, 45, 23, 2)
    double = lambda x: np.float32(2) * x.repeat(2, 1).repeat(2, 2)  # noqa: E731
    np.testing.assert_allclose(map_tiles(double, x, 8, (2, 1)), double(x), rtol=1e-6)


def test_the_peak_of_memory_is_that_of_a_tile():
    _, _, decode = networks()
    size, sides = 16, (28, 76)  # of a tile, and of two images, in latents

    def temporary(side: int, network) -> int:
        compiled = jax.jit(network).lower(jax.ShapeDtypeStruct((1, side, side, 4), np.float32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = (temporary(side, lambda z: map_tiles(decode, z, size, (2, 1))) for side in sides)
    pixels = [4 * 3 * (2 * side) ** 2 for side in sides]
    assert large - small < 3 * (pixels[1] - pixels[0]), "tiles are held until they are joined, and nothing else"
    assert temporary(sides[1], decode) > 5 * large


@pytest.mark.parametrize(
    ("config", "side", "message"),
    [
        ({"sample_size": 20}, None, "sample_size 20 is not supported for tiles; use a tile_sample_min_size that is a"),
        ({"sample_size": "512"}, None, "sample_size '512' is not supported for tiles"),
        ({"sample_size": []}, None, r"sample_size \[\] is not supported"),
        ({}, 12, "tile_sample_min_size 12 is not supported for tiles; .* multiple of 8$"),
        ({}, True, "tile_sample_min_size True is not supported"),
    ],
)
def test_a_size_that_tiles_cannot_have_is_named(config, side, message):
    with pytest.raises(ValueError, match=message):
        tile_size(CONFIG | config, side)


def test_the_size_of_a_tile_is_the_autoencoder_s():
    assert tile_size(CONFIG) == 16 and tile_size(CONFIG | {"sample_size": [64, 32]}) == 64
    assert tile_size({"block_out_channels": [8]}) == 32, "diffusers' default"
    assert tile_size(CONFIG, 24) == 24
