"""The autoencoder against diffusers' AutoencoderKL on the same random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from lcm_jax.models.vae import AutoencoderKL, sample_latents, unscale_latents
from lcm_jax.weights import naming


def blocks(*widths):
    count = len(widths)
    return {
        "block_out_channels": list(widths),
        "down_block_types": ["DownEncoderBlock2D"] * count,
        "up_block_types": ["UpDecoderBlock2D"] * count,
    }


BASE = blocks(8, 16) | {"norm_num_groups": 4, "layers_per_block": 1, "sample_size": 16}
SMALL = {
    "as SD1": blocks(8, 16, 16) | {"norm_num_groups": 4, "layers_per_block": 2, "latent_channels": 4},
    "no quantisation layers": BASE | {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 3},
    "no attention": BASE | {"mid_block_add_attention": False, "act_fn": "gelu", "norm_num_groups": 2},
    "one level, other channels": blocks(12)
    | {
        "norm_num_groups": 3,
        "layers_per_block": 1,
        "in_channels": 1,
        "out_channels": 2,
        "act_fn": "mish",
        "scaling_factor": 1.5,
        "shift_factor": 0.1,
        "force_upcast": False,
    },
}

# The vae/config.json of Stable Diffusion 1.5, as published.
SD15 = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
} | blocks(128, 256, 512, 512)


def reference_model(config, seed=0):
    """diffusers' autoencoder with every weight random, norms and biases included."""
    torch = pytest.importorskip("torch")
    from diffusers import AutoencoderKL as Reference

    torch.manual_seed(seed)
    model = Reference(**{k: v for k, v in config.items() if not k.startswith("_")}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def reference_params(model):
    flat = {}
    for key, tensor in model.state_dict().items():
        path = naming.to_path(key, tensor.ndim)
        flat[path] = naming.to_array(path, tensor.numpy())
    return unflatten_dict(flat)


def assert_equal_output(config, size):
    torch = pytest.importorskip("torch")

    reference, vae = reference_model(config), AutoencoderKL.from_config(config)
    params = {"params": reference_params(reference)}
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, *size, config.get("in_channels", 3))).astype(np.float32)
    with torch.no_grad():
        posterior = reference.encode(torch.from_numpy(images).permute(0, 3, 1, 2)).latent_dist
        latents = posterior.mean
        decoded = reference.decode(latents).sample.permute(0, 2, 3, 1).numpy()
    moments = jax.jit(lambda p, x: vae.apply(p, x, method="encode"))(params, images)
    images = jax.jit(lambda p, z: vae.apply(p, z, method="decode"))(params, latents.permute(0, 2, 3, 1).numpy())
    expected = posterior.parameters.permute(0, 2, 3, 1).numpy()
    for own, other in [(moments, expected), (images, decoded)]:
        assert own.shape == other.shape and own.dtype == jnp.float32
        assert np.abs(own - other).max() <= 1e-4 * np.abs(other).max()


@pytest.mark.parametrize("name", SMALL)
def test_equals_diffusers(name):
    assert_equal_output(SMALL[name], (16, 8))


@pytest.mark.parametrize("name", SMALL)
def test_keys_and_shapes_equal_diffusers(name):
    config = SMALL[name]
    reference = flatten_dict(reference_params(reference_model(config)))
    vae, scale = AutoencoderKL.from_config(config), 2 ** (len(config["block_out_channels"]) - 1)
    image = jnp.zeros((1, scale, scale, config.get("in_channels", 3)))
    noise = jnp.zeros((1, 1, 1, config.get("latent_channels", 4)))
    own = jax.eval_shape(lambda: vae.init(jax.random.key(0), image, noise))["params"]
    assert {k: v.shape for k, v in flatten_dict(own).items()} == {k: v.shape for k, v in reference.items()}


def test_the_posterior_sample_is_diffusers_formula_and_its_scaling_is_undone():
    rng = np.random.default_rng(0)
    moments = rng.normal(0, 40, (2, 3, 3, 8)).astype(np.float32)  # log variances beyond both clips
    noise = rng.standard_normal((2, 3, 3, 4)).astype(np.float32)
    torch = pytest.importorskip("torch")
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    posterior = DiagonalGaussianDistribution(torch.from_numpy(moments).permute(0, 3, 1, 2))
    z = posterior.mean.permute(0, 2, 3, 1).numpy() + posterior.std.permute(0, 2, 3, 1).numpy() * noise
    scaled = sample_latents(moments, noise, 0.5, 0.25)
    np.testing.assert_allclose(scaled, (z - 0.25) * 0.5, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(unscale_latents(scaled, 0.5, 0.25), z, rtol=1e-5, atol=1e-5)


def test_half_precision_comes_out_in_float32():
    params = {"params": reference_params(reference_model(BASE))}
    images = np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 3)).astype(np.float32)
    vae, half = AutoencoderKL.from_config(BASE), AutoencoderKL.from_config(BASE, jnp.bfloat16)
    full, out = (jax.jit(lambda p, x, v=v: v.apply(p, x, method="encode"))(params, images) for v in (vae, half))
    assert out.dtype == jnp.float32
    assert 0 < np.abs(out - full).max() < 0.1 * np.abs(full).max()


@pytest.mark.parametrize(
    "option, value",
    [
        ("act_fn", "tanh"),
        ("latents_mean", [0.0]),
        ("number_of_heads", 2),
        ("down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]),
        ("up_block_types", ["UpDecoderBlock2D"]),
    ],
)
def test_an_unsupported_option_is_named_with_its_value(option, value):
    with pytest.raises(ValueError) as error:
        AutoencoderKL.from_config(BASE | {option: value})
    assert option in str(error.value) and repr(value) in str(error.value)


@pytest.mark.slow
def test_full_size_stable_diffusion_equals_diffusers():
    assert_equal_output(SD15, (64, 64))
