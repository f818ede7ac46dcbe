"""One optimizer update; what accumulation, clipping and the moving average do is in test_lcd.py (pitfall 8)."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lcm_jax.objectives.lcd import LCD
from lcm_jax.training import sharding
from lcm_jax.training.state import create_state, make_optimizer
from lcm_jax.training.step import make_train_step

OPTIMIZER = SimpleNamespace(
    name="adamw",
    learning_rate=1.0,
    warmup_steps=2,
    schedule="constant",
    b1=0.9,
    b2=0.999,
    weight_decay=0.1,
    clip_norm=1.0,
)


def linear(accumulate=1, seed=0):
    """A step of plain gradient descent whose gradient is the mean of the draws."""

    def loss(networks, x, draws):
        student, target = networks
        total = jnp.mean(student * draws) + 0 * target + 0 * jnp.sum(x)
        return total, {"loss": total}

    return make_train_step(
        SimpleNamespace(draw=lambda rng, latents: jax.random.normal(rng, latents.shape), loss=loss),
        lambda params, target, frozen: (params["a"], target["a"]),
        lambda params, frozen, batch, draws: batch["x"],
        optax.sgd(1.0),
        latents=lambda batch: jax.ShapeDtypeStruct((8,), jnp.float32),
        seed=seed,
        ema_rate=0.5,
        accumulate=accumulate,
    )


def test_a_batch_that_does_not_divide_is_an_error():
    state = create_state({"a": jnp.float32(1)}, optax.sgd(1.0))
    with pytest.raises(ValueError, match="batch size 8 is not a multiple of accumulate 3"):
        jax.eval_shape(linear(accumulate=3), state, {}, {"x": jnp.zeros(8)})


def test_seed_and_step_alone_decide_the_draws():
    state = create_state({"a": jnp.float32(1)}, optax.sgd(1.0))
    batch = {"x": jnp.zeros(8)}
    first, _ = jax.jit(linear())(state, {}, batch)
    again, _ = jax.jit(linear())(state, {}, batch)
    other, _ = jax.jit(linear(seed=1))(state, {}, batch)
    later, _ = jax.jit(linear())(state.replace(step=jnp.int32(1)), {}, batch)
    assert first.params["a"] == again.params["a"]
    assert len({float(s.params["a"]) for s in (first, other, later)}) == 3
    assert first.step == 1 and later.step == 2
    assert first.ema["a"] == 0.5 * (1 + first.params["a"])


def test_pitfall_7_every_example_has_draws_of_its_own_wherever_it_lies():
    """On eight devices each row differs from each other row, and the draws are those of one device."""
    latents = jax.ShapeDtypeStruct((16, 2, 2, 2), jnp.float32)
    draw = partial(LCD(prompt_dropout=0.5).draw, latents=latents)
    alone = jax.jit(draw)(jax.random.key(0))
    for data, fsdp in [(8, 1), (2, 4)]:
        mesh = sharding.make_mesh(data, fsdp)
        spread = jax.jit(draw, out_shardings=sharding.by_batch(mesh))(jax.random.key(0))
        assert len(spread.noise.sharding.device_set) == 8 and spread.noise.addressable_data(0).shape[0] == 2
        jax.tree.map(np.testing.assert_array_equal, alone, spread)
    for values in (alone.noise, alone.posterior, alone.w):
        assert len({row.tobytes() for row in np.asarray(values)}) == 16
    assert len(set(alone.index.tolist())) > 8 and len(set(alone.keep_prompt.tolist())) == 2


def test_the_optimizers_schedules():
    gradient = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
    params = jax.tree.map(jnp.ones_like, gradient)

    def decays(**more):
        optimizer = make_optimizer(SimpleNamespace(**(vars(OPTIMIZER) | more)), steps=6)
        state, sizes = optimizer.init(params), []
        for _ in range(6):
            updates, state = optimizer.update(gradient, state, params)
            assert not updates["bias"].any(), "biases and scales do not decay"
            sizes.append(float(-updates["kernel"][0, 0]) / 0.1)  # the learning rate, seen through the weight decay
        return sizes

    np.testing.assert_allclose(decays(), [0, 0.5, 1, 1, 1, 1], atol=1e-6)
    cosine = [0.5 * (1 + np.cos(np.pi * i / 4)) for i in range(4)]
    np.testing.assert_allclose(decays(schedule="cosine"), [0, 0.5, *cosine], atol=1e-6)
    np.testing.assert_allclose(decays(warmup_steps=0), [1] * 6, atol=1e-6)
    with pytest.raises(ValueError, match="optimizer.schedule is 'linear'; choose constant or cosine"):
        decays(schedule="linear")


def test_muon_orthogonalises_kernels_and_leaves_the_rest_to_adamw():
    """Its update of a kernel has all singular values alike, at 0.2 of Adam's size per element; biases get AdamW's."""
    rng = np.random.default_rng(0)
    params = {
        "conv": {"kernel": jnp.zeros((3, 3, 8, 32)), "bias": jnp.zeros(32)},
        "table": {"embedding": jnp.zeros((50, 8))},
    }
    gradient = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), jnp.float32), params)
    config = vars(OPTIMIZER) | {"warmup_steps": 0, "weight_decay": 0.0}
    updates = {}
    for name in ("muon", "adamw"):
        optimizer = make_optimizer(SimpleNamespace(**(config | {"name": name})), steps=6)
        updates[name], _ = optimizer.update(gradient, optimizer.init(params), params)
    kernel = np.asarray(updates["muon"]["conv"]["kernel"]).reshape(72, 32)
    values = np.linalg.svd(kernel, compute_uv=False)
    assert (
        values.max() / values.min()
        < 2.0
        < np.divide(*np.linalg.svd(gradient["conv"]["kernel"].reshape(72, 32))[1][[0, -1]])
    )
    np.testing.assert_allclose(np.sqrt(np.mean(kernel**2)), 0.2, rtol=0.2)
    assert np.sum(kernel * np.asarray(gradient["conv"]["kernel"]).reshape(72, 32)) < 0, "it goes down"
    adam = optax.nadamw(1.0, b1=config["b1"], b2=config["b2"], weight_decay=0.0)  # Muon's Adam has Nesterov's momentum
    expected, _ = adam.update(gradient, adam.init(params), params)
    np.testing.assert_allclose(updates["muon"]["conv"]["bias"], expected["conv"]["bias"], rtol=1e-3)
    np.testing.assert_allclose(updates["muon"]["table"]["embedding"], expected["table"]["embedding"], rtol=1e-3)
    with pytest.raises(ValueError, match="optimizer.name is 'sgd'; choose adamw, muon or adafactor"):
        make_optimizer(SimpleNamespace(**(config | {"name": "sgd"})), steps=6)


def test_the_target_begins_as_the_parameters_in_buffers_of_its_own():
    params = {"a": np.ones(3, np.float16)}
    state = create_state(params, optax.sgd(1.0))
    assert state.params["a"].dtype == state.ema["a"].dtype == jnp.float32
    state.params["a"].delete()  # as donation does
    np.testing.assert_array_equal(state.ema["a"], np.ones(3))
