"""Adapters as trees: initialized, counted, merged, and applied while a network is computed."""

from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.models import lora
from lcm_jax.models.families import FAMILIES
from lcm_jax.models.layers import Conv, Downsample, apply
from lcm_jax.models.lora import LoRASettings
from lcm_jax.models.unet import UNet2DCondition
from lcm_jax.weights import naming

UNET = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "time_cond_proj_dim": 16,
}
INPUTS = ((3, 7, 6, 4), (3,), (3, 5, 12), (3, 16))  # images that are not square, and of an odd height
KEYS = jax.random.split(jax.random.key(0), 3)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@cache
def abstract(family=None):
    """Return the parameters of a UNet as ShapeDtypeStructs."""
    config = UNET if family is None else FAMILIES[family]["unet"]
    width = config["cross_attention_dim"]
    inputs = [jnp.zeros((1, 8, 8, 4)), jnp.zeros(1), jnp.zeros((1, 1, width))]
    if "addition_embed_type" in config:
        inputs += [None, jnp.zeros((1, 1280)), jnp.zeros((1, 6))]
    unet = UNet2DCondition.from_config(config)
    return jax.eval_shape(lambda: unet.init(jax.random.key(0), *inputs)["params"])


def random(tree, size=0.3):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * size, jnp.float32), tree)


def adapters_of(params, **settings):
    """Return adapters that change something: `up` is zero at first."""
    return random(jax.eval_shape(lambda: lora.init(jax.random.key(1), params, LoRASettings(**settings))))


@pytest.mark.parametrize("family, number", [("sd15", 67_252_224), ("sdxl", 196_751_360)])
def test_published_numbers_of_parameters(family, number):
    params = abstract(family)
    adapters = jax.eval_shape(lambda: lora.init(jax.random.key(0), params, LoRASettings()))
    assert lora.count(adapters) == number
    assert list(lora.modules(adapters)) == lora.target_paths(params, LoRASettings())
    for path in lora.kernels(params):
        assert lora.module_name(path) == naming.to_key((*path, "kernel")).removesuffix(".weight")


def test_adapters_begin_as_in_peft():
    params, targets = abstract(), ("attn2.to_q", "conv2", "downsamplers.0.conv")
    init = lambda key, targets: lora.modules(lora.init(jax.random.key(key), params, LoRASettings(4, targets=targets)))  # noqa: E731
    each, kernels = init(0, targets), lora.kernels(params)
    assert {path[-1] for path in each} == {"to_q", "conv2", "conv"}
    for path, module in each.items():
        *inner, out = kernels[path].shape
        assert module["down"].shape == (*inner, 4) and module["up"].shape == (4, out) and not module["up"].any()
        bound = np.prod(inner) ** -0.5
        assert 0.7 * bound < np.abs(module["down"]).max() <= bound
    for path, module in init(0, targets[:1]).items():
        assert (module["down"] == each[path]["down"]).all(), "the numbers depend on other targets"
    for path, module in init(1, targets[:1]).items():
        assert (module["down"] != each[path]["down"]).any()


def test_applied_equals_merged_beside_a_teacher_without_adapters():
    """Every linear layer and every convolution of a UNet, with remat; test_lora_clients.py has one without."""
    unet, inputs = UNet2DCondition.from_config(UNET, remat="block"), [normal(i, *s) for i, s in enumerate(INPUTS)]
    params = jax.tree.map(lambda leaf: leaf + (leaf.ndim == 1), random(abstract()))
    everything = tuple(lora.module_name(path) for path in lora.kernels(params))
    adapters = adapters_of(params, rank=1, targets=everything)
    assert lora.modules(adapters).keys() == lora.kernels(params).keys()

    @jax.jit
    def run(params, adapters):
        with lora.applied(adapters, 1.5):
            student = apply(unet, params, *inputs)
        return student, apply(unet, params, *inputs)

    plain = jax.jit(lambda params: apply(unet, params, *inputs))
    student, teacher = run(params, adapters)
    expected = plain(lora.merge(params, adapters, 1.5))
    assert np.abs(expected - plain(params)).max() > 0.1, "the adapters are seen"
    tolerance = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(student, expected, rtol=1e-4, atol=tolerance)
    np.testing.assert_allclose(teacher, plain(params), rtol=1e-4, atol=tolerance)


# ---- small networks -------------------------------------------------------------------------------------------------


class Block(nn.Module):
    dtype: type

    @nn.compact
    def __call__(self, x):
        x = Conv(6, size=1, dtype=self.dtype, name="proj_in")(Downsample(6, 0, self.dtype, name="downsamplers_0")(x))
        return nn.Dense(3, dtype=self.dtype, name="to_out_0")(x)


class Network(nn.Module):
    """A strided convolution with padding on two sides, one of 1 x 1 and a linear layer, in a block with remat."""

    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, x):
        return nn.remat(Block)(self.dtype, name="blocks_0")(x)


X = normal(0, 3, 5, 6, 2)
PARAMS = random(jax.eval_shape(lambda: Network().init(jax.random.key(0), X)["params"]), 1.0)
TARGETS = ("downsamplers.0.conv", "proj_in", "to_out.0")
ADAPTERS = adapters_of(PARAMS, rank=2, targets=TARGETS)


def forward(adapters, params=PARAMS, x=X, network=Network(), **options):  # noqa: B008
    with lora.applied(adapters, 1.5, **options):
        return apply(network, params, x)


def test_gradients_equal_those_through_merged_kernels_and_others_get_none():
    merged = lambda adapters: apply(Network(), lora.merge(PARAMS, adapters, 1.5), X)  # noqa: E731
    loss = lambda function: jax.jit(jax.value_and_grad(lambda a: jnp.square(function(a)).mean()))  # noqa: E731
    (value, found), (wanted_value, wanted) = loss(forward)(ADAPTERS), loss(merged)(ADAPTERS)
    np.testing.assert_allclose(value, wanted_value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, wanted)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(found))


def test_small_updates_of_a_base_in_bfloat16_are_kept():
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    # Of the last module alone, since a change before it may be rounded away on its way.
    small = {"blocks_0": {"to_out_0": random(ADAPTERS["blocks_0"]["to_out_0"], 0.02)}}
    before, merged = (each["blocks_0"]["to_out_0"]["kernel"] for each in (half, lora.merge(half, small, 1.5)))
    assert merged.dtype == jnp.bfloat16 and (merged == before).mean() > 0.8, "merged, it is rounded away"
    bare = {"blocks_0": half["blocks_0"] | {"to_out_0": jax.tree.map(jnp.zeros_like, half["blocks_0"]["to_out_0"])}}
    outputs = [
        forward(small, params, X, Network(dtype)) for params, dtype in ((bare, jnp.bfloat16), (bare, jnp.float32))
    ]
    assert outputs[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(outputs[0]), outputs[1], rtol=0.05, atol=0.05 * np.abs(outputs[1]).max())
    assert np.abs(outputs[1]).max() > 0


def test_merging_rounds_once_and_leaves_the_rest():
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), PARAMS)
    chosen = adapters_of(PARAMS, rank=2, targets=TARGETS[1:])
    kernels, merged = lora.kernels(half), lora.merge(half, chosen, 0.5)
    assert (
        merged["blocks_0"]["downsamplers_0"]["conv"]["kernel"] is half["blocks_0"]["downsamplers_0"]["conv"]["kernel"]
    )
    assert merged["blocks_0"]["to_out_0"]["bias"] is half["blocks_0"]["to_out_0"]["bias"]
    for path, each in lora.modules(chosen).items():
        product = np.tensordot(np.float64(each["down"]), np.float64(each["up"]), 1)
        exact, found = np.float64(kernels[path]) + 0.5 * product, lora.kernels(merged)[path]
        assert found.dtype == jnp.float16 and np.abs(product).max() > 0.1
        np.testing.assert_allclose(np.float64(found), exact, rtol=2.0**-11 * 1.01, atol=1e-6)


def test_dropout_depends_on_the_example_and_the_module_alone():
    run = jax.jit(lambda keys, x: forward(ADAPTERS, x=x, dropout=0.5, keys=keys))
    once = run(KEYS, X)
    np.testing.assert_array_equal(once, run(KEYS, X))
    np.testing.assert_allclose(run(KEYS[1:2], X[1:2]), once[1:2], rtol=1e-5, atol=1e-5)
    assert np.abs(run(KEYS[::-1], X) - once).max() > 1e-2
    x = normal(0, 1, 64)
    many = jax.vmap(lambda key: lora.drop(x, 0.25, key[None], ("a",)))(jax.random.split(jax.random.key(0), 4000))
    np.testing.assert_allclose(many.mean(0), x, atol=0.1)
    assert abs((many == 0).mean() - 0.25) < 0.01
    assert (many[0] != lora.drop(x, 0.25, jax.random.split(jax.random.key(0), 4000)[:1], ("b",))).any()


# ---- what cannot be done --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rank": 0}, "lora.rank 0 is not supported; use a whole number of at least 1"),
        ({"rank": 2.0}, "lora.rank 2.0 is not supported"),
        ({"alpha": 0.0}, "lora.alpha 0.0 is not supported; use a number above 0"),
        ({"alpha": float("nan")}, "lora.alpha nan is not supported"),
        ({"dropout": 1.0}, "lora.dropout 1.0 is not supported; use a number of at least 0 and below 1"),
        ({"targets": "to_q"}, "lora.targets 'to_q' is not supported; use module names"),
        ({"targets": ()}, r"lora.targets \(\) is not supported"),
        ({"targets": (1,)}, r"lora.targets \(1,\) is not supported"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        LoRASettings(**settings)


def test_targets_that_match_nothing_and_ranks_above_a_width():
    paths = lambda *targets, rank=4: lora.target_paths(abstract(), LoRASettings(rank, targets=targets))  # noqa: E731
    with pytest.raises(
        ValueError, match=r"lora.targets 'o_q' matches no module; use some of cond_proj, conv, conv1"
    ) as e:
        paths("to_q", "o_q")
    assert "linear_1, linear_2, net.2, proj, " in str(e.value) and "to_out.0, " in str(e.value)
    assert len(str(e.value)) < 300 and "\n" not in str(e.value)
    with pytest.raises(ValueError, match=r"lora.rank 5 is above the width of conv_out; use at most 4, or other lora.t"):
        paths("to_q", "conv_out", rank=5)
    assert {path[-2:] for path in paths("ff.net.2")} == {("ff", "net_2")}
    assert paths("conv_in") == [("conv_in",)]


def test_adapters_that_are_not_called_and_keys_that_do_not_fit():
    elsewhere = {"elsewhere": {"to_q": ADAPTERS["blocks_0"]["to_out_0"]}}
    with pytest.raises(ValueError, match="1 of 4 adapters are of modules that were not called: elsewhere.to_q"):
        jax.eval_shape(lambda: forward(ADAPTERS | elsewhere))
    with pytest.raises(ValueError, match="lora.dropout 0.1 needs random keys"):
        jax.eval_shape(lambda: forward(ADAPTERS, dropout=0.1))
    with pytest.raises(ValueError, match="dropout has 2 keys for a batch of 3; pass one for each example"):
        jax.eval_shape(lambda: forward(ADAPTERS, dropout=0.1, keys=KEYS[:2]))
