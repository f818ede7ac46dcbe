"""The same update on one device and on eight: by data, fully sharded, both, and with layers split."""

import re
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from lcm_jax import dry_run
from lcm_jax.diffusion.consistency import guidance_embedding
from lcm_jax.diffusion.schedule import make_schedule
from lcm_jax.models import lora
from lcm_jax.models.attention import Attention
from lcm_jax.models.conditioning import Conditioning
from lcm_jax.models.layers import Conv, ResnetBlock, apply
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.models.unet_blocks import FeedForward, TimestepEmbedding
from lcm_jax.objectives import autoencoder
from lcm_jax.objectives.adapter_dropout import AdapterDropout
from lcm_jax.objectives.backward_simulation import BackwardSimulation
from lcm_jax.objectives.diffusion import Diffusion
from lcm_jax.objectives.lcd import LCD
from lcm_jax.objectives.lcf import LCF
from lcm_jax.objectives.networks import Networks
from lcm_jax.recipes import OBJECTIVES
from lcm_jax.recipes.distillation import make_prepare
from lcm_jax.recipes.trained import Adapted
from lcm_jax.training import sharded_step, sharding
from lcm_jax.training.state import create_state, make_optimizer
from lcm_jax.weights.model import published

B, WIDTH = 8, 16
LATENTS = jax.ShapeDtypeStruct((B, 4, 4, 2), jnp.float32)
MESHES = {"data": (8, 1), "fsdp": (1, 8), "data and fsdp": (2, 4), "data and tensor": (4, 1, 2)}
SCHEDULE = make_schedule(
    {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
)
ADAPTERS = lora.LoRASettings(4, 8.0, ("to_q", "to_out.0", "conv1"))
CONFIG = {
    "name": "adamw",
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "schedule": "constant",
    "b1": 0.9,
    "b2": 0.999,
    "weight_decay": 1e-2,
    "clip_norm": 1.0,
}
ENCODERS: Any = SimpleNamespace(
    inpaints=False,
    encode_prompt=lambda params, ids, _: Conditioning(params["text_encoder"]["table"][ids]),
    to_latents=lambda moments, noise: moments[..., :2] + jnp.exp(0.5 * moments[..., 2:]) * noise,
)
PREPARE = make_prepare(ENCODERS)


class Denoiser(nn.Module):
    """Layers of every kind that the rules split, with the names that they have in a UNet."""

    @nn.compact
    def __call__(self, z, t, context, w=None):
        b, height, width, c = z.shape
        time = TimestepEmbedding(WIDTH, 256, "silu", jnp.float32, name="time_embedding")(t[:, None] / 1000.0, w)
        x = ResnetBlock(WIDTH, 4, 1e-5, name="resnets_0")(Conv(WIDTH, name="conv_in")(z), time)
        x = x.reshape(b, height * width, WIDTH)
        x = x + Attention(2, WIDTH // 2, name="attn2")(x, context)
        x = x + FeedForward(jnp.float32, name="ff")(x)
        return Conv(c, name="conv_out")(x.reshape(b, height, width, WIDTH))


class Coder(nn.Module):
    """The encoder or the decoder of an autoencoder that leaves the size as it is."""

    features: int

    @nn.compact
    def __call__(self, x):
        x = ResnetBlock(WIDTH, 4, 1e-6, name="resnets_0")(Conv(WIDTH, name="conv_in")(x))
        return Conv(self.features, name="conv_out")(x)


def draw(network, seed, *inputs):
    """Random parameters on the host, drawn without compiling an initialiser."""
    rng = np.random.default_rng(seed)
    normal = lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32) * (leaf.size / leaf.shape[-1]) ** -0.5  # noqa: E731
    return jax.tree.map(normal, jax.eval_shape(network, jax.random.key(0), *map(np.zeros, inputs)))


def autoencoder_in_small():
    """(objective, bind, prepare, params, frozen, batch)."""
    encoder, decoder = Coder(4), Coder(3)
    params = {
        "encoder": draw(encoder.init, 1, (1, 4, 4, 3))["params"],
        "decoder": draw(decoder.init, 2, (1, 4, 4, 2))["params"],
    }

    def bind(params, target, frozen):
        return autoencoder.Networks(
            partial(apply, encoder, params["encoder"]), partial(apply, decoder, params["decoder"])
        )

    image = np.random.default_rng(0).standard_normal((B, 4, 4, 3)).astype(np.float32)
    return (
        autoencoder.Autoencoder(),
        bind,
        lambda params, frozen, batch, _: batch["image"],
        params,
        {},
        {"image": image},
    )


def denoise(params, z, t, told):
    w = None if told.guidance is None else guidance_embedding(told.guidance)
    return apply(Denoiser(), params, z, t, told.context, w)


def task_in_small(name: str):
    """(objective, bind, prepare, params, frozen, batch) of an objective, or of LCD by adapters."""
    if name == "autoencoder":
        return autoencoder_in_small()
    objective = {
        "lcd": BackwardSimulation(LCD(prompt_dropout=0.2), 0.5),
        "lcf": LCF(),
        "diffusion": Diffusion(),
        "adapters": AdapterDropout(LCD()),
    }[name]
    unet = lambda seed: draw(Denoiser().init, seed, (1, 4, 4, 2), 1, (1, 3, 8))["params"]  # noqa: E731
    rng = np.random.default_rng(0)
    frozen = {
        "unet": unet(1),
        "empty_ids": np.zeros(3, np.int32),
        "text_encoder": {"table": rng.standard_normal((10, 8)).astype(np.float32)},
    }
    params = {"unet": unet(2)}
    if name == "adapters":
        params = {"lora": draw(lambda rng: lora.init(rng, frozen["unet"], ADAPTERS), 2)}

    def student(params, frozen):
        if name == "adapters":
            model = SimpleNamespace(guidance_embedding_dim=None, denoise=denoise)
            return Adapted(model, frozen["unet"], params["lora"], replace(ADAPTERS, dropout=0.25))  # pyright: ignore
        return partial(denoise, params["unet"])

    def bind(params, target, frozen):
        return Networks(student(params, frozen), student(target, frozen), partial(denoise, frozen["unet"]), SCHEDULE)

    batch = {
        "moments": rng.standard_normal((B, 4, 4, 4)).astype(np.float32),
        "token_ids": rng.integers(0, 10, (B, 3)).astype(np.int32),
        "time_ids": np.zeros((B, 6), np.float32),
    }
    return objective, bind, PREPARE, params, frozen, batch


@cache
def update(name: str, *sizes: int, accumulate: int = 1):
    """(loss, state before, state after) of one update on a mesh."""
    mesh, tensor = sharding.make_mesh(*sizes), (*sizes, 1)[2]
    objective, bind, prepare, params, frozen, batch = task_in_small(name)
    task = SimpleNamespace(objective=objective, bind=bind, prepare=prepare, params=params, frozen=frozen)
    task.latents = lambda batch: LATENTS
    config = ConfigDict({"optimizer": CONFIG, "mesh": {"frozen": "replicated" if tensor > 1 else "sharded"}})
    config.train = {"steps": 10, "dtype": "float32", "seed": 5, "ema_rate": 0.9, "accumulate": accumulate}
    # Adam divides by the gradient's own size, which makes noise of gradients that are zero: epsilon keeps them zero.
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, eps=1e-2))
    with patch.object(sharded_step, "make_optimizer", lambda *_: optimizer):
        step = sharded_step.make_sharded_step(task, config, mesh)
    before = step.create(params)
    state, frozen = (
        jax.device_put(x, sharded_step.placement(like)) for x, like in ((before, step.state), (frozen, step.frozen))
    )
    arguments = (jax.tree.map(jnp.copy, state), frozen, sharding.put_batch(mesh, batch))
    # One update is not worth an optimised program.
    program = step.jitted.lower(*arguments).compile({"xla_backend_optimization_level": 0})
    after, metrics = program(*arguments)
    return float(metrics["loss"]), before, after


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", [*OBJECTIVES, "adapters"])
def test_eight_devices_equal_one(name, mesh, monkeypatch):
    """The loss, and the parameters, the target and the moments after an update."""
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
    expected, before, alone = update(name, 1, 1)
    loss, _, state = update(name, *MESHES[mesh])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)

    def same(path, a, b):
        a, b = np.asarray(a), np.asarray(b)
        key = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-4 * max(np.abs(a).max(), 1e-3), err_msg=key)

    jax.tree_util.tree_map_with_path(same, alone, state)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), jax.device_get(alone.params), jax.device_get(before.params))
    assert min(jax.tree.leaves(moved)) > 0, "every parameter was trained"

    _, fsdp, tensor = (*MESHES[mesh], 1)[:3]
    pieces = [leaf.size // leaf.addressable_data(0).size for leaf in jax.tree.leaves(state.params)]
    assert set(pieces) <= {1, fsdp * tensor}
    if fsdp > 1 or (tensor > 1 and name != "adapters"):  # which no rule splits
        assert pieces.count(fsdp * tensor) >= 4
    for part in (state.ema, optax.tree.get(state.opt_state, "mu"), optax.tree.get(state.opt_state, "nu")):
        jax.tree.map(lambda a, b: np.testing.assert_equal(a.sharding, b.sharding), state.params, part)


@cache
def specs(family: str, data: int, fsdp: int, tensor: int):
    """{path: (shape, spec)} of every parameter of a published family."""
    params = StableDiffusion.from_configs(published(family).configs).abstract_params()
    shardings = sharding.tree_shardings(dry_run.abstract_mesh(data, fsdp, tensor), params)
    leaves = zip(jax.tree.leaves_with_path(params), jax.tree.leaves(shardings), strict=True)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): (x.shape, s.spec) for (p, x), s in leaves}


def test_the_rules_on_the_published_models():
    found = specs("sdxl", 4, 8, 2)
    block = "unet/mid_block/attentions_0/transformer_blocks_0"
    for path, spec in {
        f"{block}/attn1/to_q/kernel": ("fsdp", "tensor"),
        f"{block}/attn2/to_out_0/kernel": ("tensor", "fsdp"),
        f"{block}/ff/net_0/proj/kernel": ("fsdp", "tensor"),
        f"{block}/ff/net_0/proj/bias": ("tensor",),
        f"{block}/ff/net_2/kernel": ("tensor", "fsdp"),
        "unet/mid_block/resnets_0/conv1/kernel": (None, None, "fsdp", "tensor"),
        "unet/mid_block/resnets_0/conv2/kernel": (None, None, "tensor", "fsdp"),
        "unet/mid_block/resnets_0/norm2/scale": ("tensor",),
        "unet/mid_block/resnets_0/norm1/scale": (),
        "unet/conv_in/kernel": (),  # too small
        "unet/add_embedding/linear_1/kernel": ("fsdp", "tensor"),
        "text_encoder_2/text_model/embeddings/token_embedding/embedding": ("fsdp", "tensor"),
        "text_encoder/text_model/encoder/layers_3/mlp/fc2/kernel": ("tensor", "fsdp"),
        "text_encoder/text_model/encoder/layers_3/self_attn/v_proj/bias": ("tensor",),
        "vae/decoder/up_blocks_0/resnets_0/conv1/kernel": (None, None, "fsdp", "tensor"),
        "vae/decoder/mid_block/attentions_0/to_q/kernel": ("fsdp", None),  # one head
    }.items():
        assert found[path][1] == PartitionSpec(*spec), path
    used = {pattern: any(re.search(pattern, path) for path in found) for pattern, _ in sharding.RULES}
    assert all(used.values()), "a rule that matches nothing"
    for path, (shape, spec) in specs("sdxl", 1, 64, 1).items():
        assert "fsdp" in spec or np.prod(shape) < 2**14 or max(shape) < 64, f"{path} is whole on 64 devices"


def test_axes_that_do_not_divide_stay_whole():
    sizes = {"data": 1, "fsdp": 4, "tensor": 2}
    for path, shape, spec in [
        ("conv_in/kernel", (128, 256), (None, "fsdp")),
        ("conv_in/kernel", (256, 128), ("fsdp", None)),
        ("conv_in/kernel", (3, 3, 64, 64), (None, None, "fsdp", None)),
        ("conv_in/kernel", (127, 254), ()),
        ("conv_in/kernel", (127, 128), ()),  # too small
        ("attn1/to_q/kernel", (256, 255), ("fsdp", None)),
        ("attn1/to_q/kernel", (254, 256), (None, "tensor")),  # the axis that is left does not divide
        ("attn1/to_q/kernel", (256,), ()),  # of another rank, such as a factored moment
        ("attn1/to_q/kernel", (2**15,), ("fsdp",)),
    ]:
        assert sharding.partition(path, shape, sizes) == PartitionSpec(*spec), (path, shape)
    assert sharding.partition("attn1/to_q/kernel", (256, 256), {"data": 8, "fsdp": 1, "tensor": 1}) == PartitionSpec()


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_moments_are_split_like_their_parameters(name):
    config = SimpleNamespace(**CONFIG | {"name": name})
    shape = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    params = {"attn1": {"to_q": {"kernel": shape}, "to_out_0": {"kernel": shape, "bias": jnp.zeros(256)}}}
    state = jax.eval_shape(lambda p: create_state(p, make_optimizer(config, 10)), params)
    mesh = dry_run.abstract_mesh(1, 4, 2)
    placed = [
        (x.shape, s.spec)
        for x, s in zip(*map(jax.tree.leaves, (state, sharding.tree_shardings(mesh, state))), strict=True)
    ]
    copies = {"adamw": 4, "muon": 3, "adafactor": 3}[name]  # parameters, target, moments
    for spec in (("fsdp", "tensor"), ("tensor", "fsdp")):
        assert placed.count(((256, 256), PartitionSpec(*spec))) == copies
    assert all(spec == PartitionSpec() for shape, spec in placed if shape != (256, 256)), (
        "bias, factored moments, counts"
    )
    frozen = sharding.tree_shardings(mesh, params, over_fsdp=False)
    assert frozen["attn1"]["to_q"]["kernel"].spec == PartitionSpec(None, "tensor")


def test_a_mesh_that_does_not_fit_is_an_error():
    assert dict(sharding.make_mesh(-1, 2).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert dict(sharding.make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert sharding.make_mesh(2, 2).size == 4, "fewer devices than there are"
    product = "mesh.data x mesh.fsdp x mesh.tensor"
    for sizes, message in [
        ((-1, 9), f"{product} is 0 x 9 x 1 and there are 8 devices; set mesh.fsdp x mesh.tensor to a divisor of that"),
        ((-1, 3), "is 2 x 3 x 1 and there are 8 devices"),
        ((-1, 2, 3), "is 1 x 2 x 3 and there are 8 devices"),
        ((-1, 0), "is 8 x 0 x 1 and there are 8 devices"),
        ((0, 1), "is 0 x 1 x 1 and there are 8 devices"),
        ((8, 1, 2), "is 8 x 1 x 2 and there are 8 devices"),
    ]:
        with pytest.raises(ValueError, match=message):
            sharding.make_mesh(*sizes)


def test_a_batch_lies_on_every_device():
    batch = sharding.put_batch(sharding.make_mesh(2, 2, 2), {"x": np.arange(16)})
    rows = {shard.device.id: shard.data.tolist() for shard in batch["x"].addressable_shards}
    assert sorted(rows.values()) == sorted(2 * [list(range(i, i + 4)) for i in range(0, 16, 4)])
