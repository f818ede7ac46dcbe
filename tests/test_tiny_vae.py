"""The tiny autoencoder against diffusers' AutoencoderTiny on the same random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from lcm_jax.models.tiny_vae import AutoencoderTiny
from lcm_jax.models.vae import sample_latents
from lcm_jax.weights import naming

SMALL = {
    "as TAESD": {
        "encoder_block_out_channels": [8, 8, 8, 8],
        "decoder_block_out_channels": [8, 8, 8, 8],
        "num_encoder_blocks": [1, 2, 1, 1],
        "num_decoder_blocks": [1, 1, 2, 1],
    },
    "other": {
        "encoder_block_out_channels": [6, 6],
        "decoder_block_out_channels": [10, 10],
        "num_encoder_blocks": [1, 1],
        "num_decoder_blocks": [2, 1],
        "latent_channels": 3,
        "in_channels": 1,
        "out_channels": 2,
        "act_fn": "gelu",
    },
}


@pytest.mark.parametrize("name", SMALL)
def test_equals_diffusers(name):
    torch = pytest.importorskip("torch")
    from diffusers import AutoencoderTiny as Reference

    torch.manual_seed(0)
    config, reference = SMALL[name], Reference(**SMALL[name]).eval()
    tensors = {key: value.numpy() for key, value in reference.state_dict().items()}
    paths = {naming.to_path(key, value.ndim): value for key, value in tensors.items()}
    params = unflatten_dict({path: naming.to_array(path, value) for path, value in paths.items()})
    vae = AutoencoderTiny.from_config(dict(reference.config))
    channels, down = config.get("latent_channels", 4), 2 ** (len(config["num_encoder_blocks"]) - 1)
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, 3 * down, 4 * down, config.get("in_channels", 3))).astype(np.float32)
    latents = rng.standard_normal((2, 3, 4, channels)).astype(np.float32) * 3
    own = jax.eval_shape(vae.init, jax.random.key(0), images, latents)["params"]
    shapes = lambda tree: {path: value.shape for path, value in flatten_dict(tree).items()}  # noqa: E731
    assert shapes(own) == shapes(params)
    with torch.no_grad():
        encoded = reference.encode(torch.from_numpy(images).permute(0, 3, 1, 2)).latents.permute(0, 2, 3, 1).numpy()
        decoded = reference.decode(torch.from_numpy(latents).permute(0, 3, 1, 2)).sample.permute(0, 2, 3, 1).numpy()
    moments = jax.jit(lambda x: vae.apply({"params": params}, x, method="encode"))(images)
    ours = jax.jit(lambda z: vae.apply({"params": params}, z, method="decode"))(latents)
    np.testing.assert_allclose(sample_latents(moments, latents, 1.0), encoded, atol=1e-4 * np.abs(encoded).max())
    np.testing.assert_allclose(ours, decoded, atol=1e-4 * np.abs(decoded).max())
    assert vae.apply({"params": params}, images, method="features").shape[:3] == (2, 3, 4)


@pytest.mark.parametrize(
    ("option", "value"),
    [("upsample_fn", "bilinear"), ("act_fn", "tanh"), ("stride", 3), ("num_encoder_blocks", [1, 2])],
)
def test_an_unsupported_option_is_named_with_its_value(option, value):
    with pytest.raises(ValueError) as error:
        AutoencoderTiny.from_config({option: value})
    assert option in str(error.value) and repr(value) in str(error.value)


def test_half_precision_comes_out_in_float32():
    vae = AutoencoderTiny.from_config(SMALL["as TAESD"], jnp.bfloat16)
    images, noise = jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 1, 1, 4))
    params = vae.init(jax.random.key(0), images, noise)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert {out.dtype for out in vae.apply(params, images, noise)} == {jnp.dtype("float32")}
