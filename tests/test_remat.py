"""Rematerialization by name: the same numbers, and less work or less memory by each policy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn
from whole_runs import load_config

from lcm_jax import cost
from lcm_jax.models import attention as attentions
from lcm_jax.models.attention import Device
from lcm_jax.models.layers import apply
from lcm_jax.models.remat import POLICIES
from lcm_jax.models.unet import UNet2DCondition
from lcm_jax.recipes.settings import check

SMALL = {
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "attention_head_dim": 1,
    "cross_attention_dim": 8,
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}


def abstract(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def gradient(remat: str, dtype=jnp.float32):
    """Return (params, z) -> the loss and its gradient, and shapes for both."""
    network = UNet2DCondition.from_config(SMALL, dtype, remat)
    t, context = jnp.array([7, 600]), jnp.ones((2, 6, 8))
    loss = lambda params, z: jnp.square(apply(network, params, z, t, context)).mean()  # noqa: E731
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(network.init, key, abstract(2, 32, 32, 4), t, context)["params"]
    return jax.value_and_grad(loss), params, abstract(2, 32, 32, 4)


def trace(remat: str, dtype=jnp.float32):
    function, *shapes = gradient(remat, dtype)
    return jax.jit(function).trace(*shapes)


def test_all_policies_have_the_same_loss_and_gradient():
    rng = np.random.default_rng(0)
    draw = lambda x: np.float32(rng.standard_normal(x.shape) * 0.2)  # noqa: E731
    function, *shapes = gradient("none")
    values = jax.tree.map(draw, shapes)
    expected, plain = jax.jit(function)(*values)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(plain))
    for remat in POLICIES.keys() - {"none"}:
        loss, grads = jax.jit(gradient(remat)[0])(*values)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), grads, plain)


def test_work_and_memory_of_each_policy():
    """Saved convolutions and attentions are not computed again; the work that counts is the same for all."""
    jaxprs = {remat: trace(remat).jaxpr.jaxpr for remat in POLICIES}
    flops = {remat: cost.count_flops(jaxpr) for remat, jaxpr in jaxprs.items()}
    assert flops["none"] < flops["save_convs_and_attention"] < flops["block"]
    assert {cost.count_flops(jaxpr, recomputed=False) for jaxpr in jaxprs.values()} == {flops["none"]}
    memory = {remat: cost.peak_bytes(jaxpr) for remat, jaxpr in jaxprs.items()}
    assert memory["block"] < memory["save_convs_and_attention"] < memory["none"]


def test_fused_attention_and_convolutions_run_forward_once(monkeypatch):
    """In the program for an H100: the fused kernel's statistics are stored with its output."""
    monkeypatch.setattr(attentions, "current_device", lambda: Device("cuda", (9, 0)))
    monkeypatch.setattr(jax_cudnn, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(jax_cudnn, "check_compute_capability", lambda least: True)
    count = {}
    for remat in POLICIES:
        text = trace(remat, jnp.bfloat16).lower(lowering_platforms=("cuda",)).as_text()
        count[remat] = [len(re.findall(name, text)) for name in (r"fmhaSoftmax\(", r"stablehlo\.convolution\(")]
    assert count["save_convs_and_attention"] == count["none"]
    assert count["block"][0] == 2 * count["none"][0] > 0 and count["block"][1] > count["none"][1]


@pytest.mark.parametrize("value", [True, False, "all"])
def test_a_policy_without_a_name_is_an_error_with_the_names(value):
    config = load_config("shapes")
    with config.ignore_type():
        config.train.remat = value
    with pytest.raises(ValueError, match=rf"^train.remat {value!r} is not supported; use none or block or save_convs"):
        check(config)
    with pytest.raises(ValueError, match=rf"^remat {value!r} is not supported; use none, block, save_convs_and_att"):
        trace(value)
