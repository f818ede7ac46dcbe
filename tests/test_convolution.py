"""Convolutions that are computed in another way than by XLA's operation equal it, with their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.models import winograd
from lcm_jax.models.layers import Conv, GroupNorm, convolve_upsampled


def direct(x, kernel):
    same = ((1, 1), (1, 1))
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), same, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def arrays(batch, height, width, channels, features):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, height, width, channels), np.float32)
    return x, rng.standard_normal((3, 3, channels, features), np.float32) / (9 * channels) ** 0.5


def value_and_gradients(convolution, x, kernel):
    value, transpose = jax.vjp(convolution, x, kernel)
    return value, *transpose(jnp.cos(jnp.arange(value.size, dtype=jnp.float32)).reshape(value.shape))


def assert_close(mine, theirs):
    for one, other in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * float(jnp.abs(other).max()))


@pytest.mark.parametrize("limit", [2**24, 2**15, 1])  # one piece, strips of several rows, strips of two rows
@pytest.mark.parametrize("shape", [(2, 16, 12, 64, 48), (1, 20, 4, 48, 64)])
def test_winograd_equals_the_direct_convolution(shape, limit, monkeypatch):
    monkeypatch.setattr(winograd, "MAX_VALUES", limit)
    x, kernel = arrays(*shape)
    assert winograd.pays(*arrays(8, 16, 12, *shape[3:]))
    winograd._winograd.clear_cache()
    assert_close(jax.jit(winograd._winograd)(x, kernel)[None], direct(x, kernel)[None])
    winograd._winograd.clear_cache()


def test_gradients_of_winograd():
    x, kernel = arrays(8, 12, 16, 64, 48)
    assert_close(
        jax.jit(lambda x, k: value_and_gradients(winograd.convolve, x, k))(x, kernel),
        value_and_gradients(direct, x, kernel),
    )


def test_winograd_is_for_wide_convolutions_of_even_sizes():
    x, kernel = arrays(1, 32, 32, 64, 64)
    assert winograd.pays(x, kernel)
    assert not winograd.pays(x[:, :31], kernel)
    assert not winograd.pays(x[..., :16], kernel[:, :, :16])
    assert not winograd.pays(x[:, :8, :8], kernel)  # the kernel's transform would take longest


def test_other_platforms_have_one_convolution():
    x, kernel = arrays(1, 32, 32, 64, 64)
    program = jax.jit(lambda x, k: winograd.convolve(x, k)).trace(x, kernel)
    texts = {name: program.lower(lowering_platforms=(name,)).as_text() for name in ("cuda", "tpu", "cpu")}
    convolutions = {name: text.count("stablehlo.convolution") for name, text in texts.items()}
    products = {name: text.count("stablehlo.dot_general") for name, text in texts.items()}
    assert convolutions == {"cuda": 1, "tpu": 1, "cpu": 0}
    assert products["cuda"] == products["tpu"] == 0 and products["cpu"] >= 16


@pytest.mark.parametrize("shape", [(2, 5, 4, 3, 2), (1, 8, 8, 16, 16)])
def test_upsampling_in_the_convolution(shape):
    x, kernel = arrays(*shape)
    repeat = lambda x: x.repeat(2, axis=1).repeat(2, axis=2)  # noqa: E731
    assert_close(
        value_and_gradients(convolve_upsampled, x, kernel),
        value_and_gradients(lambda x, k: direct(repeat(jnp.asarray(x)), k), x, kernel),
    )
    layer = Conv(shape[-1], upsample=True)
    out, variables = layer.init_with_output(jax.random.key(0), x)
    assert out.shape == (shape[0], 2 * shape[1], 2 * shape[2], shape[-1])
    assert variables["params"]["kernel"].shape == kernel.shape


@pytest.mark.parametrize("shape", [(2, 6, 5, 24), (3, 7, 24), (1, 2, 3, 4, 24)])
def test_group_norm_equals_its_definition(shape):
    x = 3 + 2 * np.random.default_rng(0).standard_normal(shape, np.float32)
    found = GroupNorm(8, 1e-5).apply({"params": {"scale": jnp.full(24, 1.5), "bias": jnp.full(24, 0.5)}}, x)
    groups = x.reshape(shape[0], -1, 8, 3).astype(np.float64)
    mean, variance = (f(groups, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
    expected = 1.5 * ((groups - mean) / np.sqrt(variance + 1e-5)).reshape(shape) + 0.5
    np.testing.assert_allclose(found, expected, atol=5e-6)
