"""The same run on one device and on eight, data-parallel and fully sharded."""

from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from lcm_jax.diffusion.consistency import guidance_embedding
from lcm_jax.diffusion.schedule import make_schedule
from lcm_jax.models.conditioning import Conditioning
from lcm_jax.models.unet import UNet2DCondition
from lcm_jax.objectives.backward_simulation import BackwardSimulation
from lcm_jax.objectives.lcd import LCD
from lcm_jax.objectives.networks import Networks
from lcm_jax.recipes.distillation import make_prepare
from lcm_jax.training import sharding
from lcm_jax.training.state import create_state, make_optimizer
from lcm_jax.training.step import make_train_step

TEACHER = {
    "sample_size": 4,
    "in_channels": 2,
    "out_channels": 2,
    "block_out_channels": (32,),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "attention_head_dim": 4,
    "norm_num_groups": 8,
    "cross_attention_dim": 16,
}
STUDENT = TEACHER | {"time_cond_proj_dim": 256}
SCHEDULE = make_schedule(
    {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
)
OPTIMIZER = SimpleNamespace(
    name="adamw",
    learning_rate=1e-3,
    warmup_steps=0,
    schedule="constant",
    b1=0.9,
    b2=0.999,
    weight_decay=1e-2,
    clip_norm=1.0,
)


def initial(config, seed):
    """Random parameters on the host, drawn without compiling an initialiser."""
    z, t, context = jnp.zeros((1, 4, 4, 2)), jnp.zeros(1, jnp.int32), jnp.zeros((1, 3, 16))
    w = jnp.zeros((1, 256)) if config is STUDENT else None
    shapes = jax.eval_shape(UNet2DCondition.from_config(config).init, jax.random.key(0), z, t, context, w)["params"]
    rng = np.random.default_rng(seed)
    draw = lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32) * (leaf.size / leaf.shape[-1]) ** -0.5  # noqa: E731
    return jax.tree.map(draw, shapes)


@cache
def run(data: int, fsdp: int, steps: int = 3):
    """(losses, final state) of a small distillation on a mesh."""
    mesh = sharding.make_mesh(data, fsdp)
    student, teacher = UNet2DCondition.from_config(STUDENT), UNet2DCondition.from_config(TEACHER)

    def guided(params):
        return lambda z, t, told: student.apply(
            {"params": params}, z, t, told.context, guidance_embedding(told.guidance)
        )

    def bind(params, target, frozen):
        unguided = lambda z, t, told: teacher.apply({"params": frozen["unet"]}, z, t, told.context)  # noqa: E731
        return Networks(guided(params["unet"]), guided(target["unet"]), unguided, SCHEDULE)

    encoders = SimpleNamespace(
        inpaints=False,
        encode_prompt=lambda params, ids, _: Conditioning(params["text_encoder"]["table"][ids]),
        to_latents=lambda moments, noise: moments[..., :2] + jnp.exp(0.5 * moments[..., 2:]) * noise,
    )
    # Adam divides by the gradient's own size, which makes noise of gradients that are zero: epsilon keeps them zero.
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, eps=1e-2))
    rng = np.random.default_rng(0)
    frozen = {
        "unet": initial(TEACHER, 1),
        "empty_ids": np.zeros(3, np.int32),
        "text_encoder": {"table": rng.standard_normal((10, 16)).astype(np.float32)},
    }
    params = {"unet": initial(STUDENT, 2)}
    create = lambda params: create_state(params, optimizer)  # noqa: E731
    shardings = sharding.tree_shardings(mesh, jax.eval_shape(create, params))
    frozen_shardings = sharding.tree_shardings(mesh, frozen)
    step = jax.jit(
        make_train_step(
            BackwardSimulation(LCD(prompt_dropout=0.2), 0.5),
            bind,
            make_prepare(encoders),
            optimizer,
            latents=lambda batch: jax.ShapeDtypeStruct((8, 4, 4, 2), jnp.float32),
            seed=5,
            ema_rate=0.9,
        ),
        in_shardings=(shardings, frozen_shardings, sharding.by_batch(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
        compiler_options={"xla_backend_optimization_level": 0},  # three steps are not worth an optimised program
    )
    state = jax.device_put(create(params), shardings)
    frozen, losses = jax.device_put(frozen, frozen_shardings), []
    for _ in range(steps):
        batch = {
            "moments": rng.standard_normal((8, 4, 4, 4)).astype(np.float32),
            "token_ids": rng.integers(0, 10, (8, 3)).astype(np.int32),
            "time_ids": np.zeros((8, 6), np.float32),
        }
        state, metrics = step(state, frozen, sharding.put_batch(mesh, batch))
        losses.append(float(metrics["loss"]))
    return losses, state


@cache
def on_one_device():
    return run(1, 1)


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (1, 8), (2, 4)], ids=["data parallel", "fsdp", "both"])
def test_eight_devices_equal_one(data, fsdp, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 256)
    expected, alone = on_one_device()
    losses, state = run(data, fsdp)
    assert len(set(losses)) == 3
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    start = initial(STUDENT, 2)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), jax.device_get(alone.params["unet"]), start)
    assert min(jax.tree.leaves(moved)) > 0, "every parameter was trained"

    def same(path, a, b):
        a, b = np.asarray(a), np.asarray(b)
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * max(np.abs(a).max(), 1e-3), err_msg=name)

    jax.tree_util.tree_map_with_path(same, alone, state)

    kernels = [leaf for leaf in jax.tree.leaves(state) if leaf.size >= 4096]
    pieces = {leaf.size // leaf.addressable_data(0).size for leaf in kernels}
    assert pieces == {fsdp}, "parameters, target and moments alike are split over fsdp, and over nothing else"
    assert len(kernels) > 20


def test_the_real_optimizer_is_sharded_like_the_parameters(monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 16)
    mesh = sharding.make_mesh(2, 4)
    params = {"kernel": jnp.zeros((6, 8)), "bias": jnp.zeros(8)}
    state = jax.eval_shape(lambda p: create_state(p, make_optimizer(OPTIMIZER, 10)), params)
    specs = [s.spec for s in jax.tree.leaves(sharding.tree_shardings(mesh, state))]
    assert specs.count(PartitionSpec(None, "fsdp")) == 4  # parameter, target, two moments
    assert all(spec in (PartitionSpec(), PartitionSpec(None, "fsdp")) for spec in specs)


@pytest.mark.parametrize(
    ("shape", "fsdp", "spec"),
    [
        ((128, 256), 4, (None, "fsdp")),
        ((256, 128), 4, ("fsdp", None)),
        ((3, 3, 64, 64), 8, (None, None, "fsdp", None)),
        ((130, 256), 1, ()),
        ((127, 254), 4, ()),  # no axis divides
        ((127, 128), 4, ()),  # too small
        ((129, 252), 4, (None, "fsdp")),
    ],
)
def test_the_sharding_rule(shape, fsdp, spec):
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    found = sharding.tree_shardings(sharding.make_mesh(-1, fsdp), {"a": leaf})["a"].spec
    assert found == PartitionSpec(*spec)


def test_a_mesh_that_does_not_fit_is_an_error():
    assert dict(sharding.make_mesh(-1, 2).shape) == {"data": 4, "fsdp": 2}
    assert sharding.make_mesh(2, 2).size == 4, "fewer devices than there are"
    for data, fsdp, message in [
        (-1, 9, "mesh.data x mesh.fsdp is 0 x 9 and there are 8 devices; set mesh.fsdp to a divisor of that"),
        (-1, 3, "is 2 x 3 and there are 8 devices"),
        (-1, 0, "is 8 x 0 and there are 8 devices"),
        (0, 1, "is 0 x 1 and there are 8 devices"),
        (8, 2, "is 8 x 2 and there are 8 devices"),
    ]:
        with pytest.raises(ValueError, match=message):
            sharding.make_mesh(data, fsdp)


def test_a_batch_lies_on_every_device():
    batch = sharding.put_batch(sharding.make_mesh(2, 4), {"x": np.arange(16)})
    assert [shard.data.tolist() for shard in batch["x"].addressable_shards] == [[i, i + 1] for i in range(0, 16, 2)]
