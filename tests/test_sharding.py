"""The same update on one device and on eight: by data, fully sharded, both, and with layers split."""

from functools import cache, partial
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from lcm_jax import scaling
from lcm_jax.diffusion.consistency import guidance_embedding
from lcm_jax.diffusion.schedule import make_schedule
from lcm_jax.models import lora
from lcm_jax.models.conditioning import Conditioning
from lcm_jax.models.layers import Conv, ResnetBlock
from lcm_jax.models.unet_blocks import TimestepEmbedding, TransformerBlock
from lcm_jax.models.vae import AutoencoderKL
from lcm_jax.objectives import autoencoder
from lcm_jax.objectives.adapter_dropout import AdapterDropout
from lcm_jax.objectives.backward_simulation import BackwardSimulation
from lcm_jax.objectives.diffusion import Diffusion
from lcm_jax.objectives.lcd import LCD
from lcm_jax.objectives.lcf import LCF
from lcm_jax.objectives.networks import Networks
from lcm_jax.recipes import RECIPES
from lcm_jax.recipes.distillation import make_prepare
from lcm_jax.training import sharding
from lcm_jax.training.state import create_state, make_optimizer
from lcm_jax.training.step import make_train_step

B, WIDTH = 8, 32
SCHEDULE = make_schedule(
    {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
)
VAE = {
    "block_out_channels": (16,),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 2,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "mid_block_add_attention": False,
}
ADAPTERS = lora.LoRASettings(4, 8.0, ("attn2.to_q", "to_out.0", "conv1"))
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


class Denoiser(nn.Module):
    """A residual block and a transformer block, with the names that they have in a UNet."""

    @nn.compact
    def __call__(self, z, t, context, w=None):
        b, height, width, c = z.shape
        time = TimestepEmbedding(WIDTH, 256, "silu", jnp.float32, name="time_embedding")(t[:, None] / 1000.0, w)
        x = Conv(WIDTH, name="conv_in")(z)
        x = ResnetBlock(WIDTH, 8, 1e-5, name="resnets_0")(x, time).reshape(b, height * width, WIDTH)
        x = TransformerBlock(4, jnp.float32, name="transformer_blocks_0")(x, context)
        return Conv(c, name="conv_out")(x.reshape(b, height, width, WIDTH))


def draw(abstract, seed):
    """Random parameters on the host, drawn without compiling an initialiser."""
    rng = np.random.default_rng(seed)
    normal = lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32) * (leaf.size / leaf.shape[-1]) ** -0.5  # noqa: E731
    return jax.tree.map(normal, abstract)


def world(name: str):
    """(objective, bind, prepare, params, frozen, batch, latents) of a task in small."""
    rng, z, t = np.random.default_rng(0), jnp.zeros((1, 4, 4, 2)), jnp.zeros(1, jnp.int32)
    latents = jax.ShapeDtypeStruct((B, 4, 4, 2), jnp.float32)
    if name == "autoencoder":
        vae = AutoencoderKL.from_config(VAE)
        abstract = jax.eval_shape(vae.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)), z)["params"]
        batch = {"image": rng.standard_normal((B, 4, 4, 3)).astype(np.float32)}
        method = lambda params, method: lambda x: vae.apply({"params": params}, x, method=method)  # noqa: E731
        bind = lambda params, target, frozen: autoencoder.Networks(method(params, "encode"), method(params, "decode"))  # noqa: E731
        objective = autoencoder.Autoencoder()
        return objective, bind, lambda params, frozen, batch, draws: batch["image"], draw(abstract, 1), {}, batch, latents

    network = Denoiser()
    abstract = jax.eval_shape(network.init, jax.random.key(0), z, t, jnp.zeros((1, 3, 16)))["params"]
    encoders = SimpleNamespace(
        inpaints=False,
        encode_prompt=lambda params, ids, _: Conditioning(params["text_encoder"]["table"][ids]),
        to_latents=lambda moments, noise: moments[..., :2] + jnp.exp(0.5 * moments[..., 2:]) * noise,
    )
    batch = {
        "moments": rng.standard_normal((B, 4, 4, 4)).astype(np.float32),
        "token_ids": rng.integers(0, 10, (B, 3)).astype(np.int32),
        "time_ids": np.zeros((B, 6), np.float32),
    }
    frozen = {
        "unet": draw(abstract, 1),
        "empty_ids": np.zeros(3, np.int32),
        "text_encoder": {"table": rng.standard_normal((10, 16)).astype(np.float32)},
    }

    def apply(params, z, t, told):
        w = None if told.guidance is None else guidance_embedding(told.guidance)
        return network.apply({"params": params}, z, t, told.context, w)

    def adapted(unet, adapters, keys, *inputs):
        with lora.applied(adapters, ADAPTERS.scale, 0.0 if keys is None else 0.25, keys):
            return apply(unet, *inputs)

    class Adapted(partial):
        with_dropout = lambda self, keys: partial(adapted, *self.args[:2], keys)  # noqa: E731

    def bind(params, target, frozen):
        if name == "lora":
            student, other = (Adapted(adapted, frozen["unet"], each["lora"], None) for each in (params, target))
        else:
            student, other = (partial(apply, each["unet"]) for each in (params, target))
        return Networks(student, other, partial(apply, frozen["unet"]), SCHEDULE)

    objective = {
        "lcd": BackwardSimulation(LCD(prompt_dropout=0.2), 0.5),
        "lcf": LCF(),
        "diffusion": Diffusion(),
        "lora": AdapterDropout(LCD()),
    }[name]
    params = {"unet": draw(abstract, 2)}
    if name == "lora":
        shapes = jax.eval_shape(partial(lora.init, params=abstract, settings=ADAPTERS), jax.random.key(0))
        params = {"lora": draw(shapes, 2)}
    return objective, bind, make_prepare(encoders), params, frozen, batch, latents


@cache
def update(name: str, *sizes: int):
    """(loss, state after an update, compiled program) of a task on a mesh."""
    mesh = sharding.make_mesh(*sizes)
    objective, bind, prepare, params, frozen, batch, latents = world(name)
    # Adam divides by the gradient's own size, which makes noise of gradients that are zero: epsilon keeps them zero.
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, eps=1e-2))
    create = lambda params: create_state(params, optimizer)  # noqa: E731
    shardings = sharding.tree_shardings(mesh, jax.eval_shape(create, params))
    frozen_shardings = sharding.tree_shardings(mesh, frozen)
    options = {"latents": lambda batch: latents, "seed": 5, "ema_rate": 0.9}
    step = jax.jit(
        make_train_step(objective, bind, prepare, optimizer, **options),
        in_shardings=(shardings, frozen_shardings, sharding.by_batch(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )
    arguments = (
        jax.device_put(create(params), shardings),
        jax.device_put(frozen, frozen_shardings),
        sharding.put_batch(mesh, batch),
    )
    # One update is not worth an optimised program.
    program = step.lower(*arguments).compile({"xla_backend_optimization_level": 0})
    state, metrics = program(*arguments)
    return float(metrics["loss"]), state, program


MESHES = {"data": (8, 1), "fsdp": (1, 8), "data and fsdp": (2, 4), "data and tensor": (4, 1, 2)}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", [*RECIPES, "lora"])
def test_eight_devices_equal_one(name, mesh, monkeypatch):
    """The loss, parameters, target and moments after an update, of every objective."""
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
    expected, alone, _ = update(name, 1, 1)
    loss, state, _ = update(name, *MESHES[mesh])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    start = world(name)[3]
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), jax.device_get(alone.params), start)
    assert min(jax.tree.leaves(moved)) > 0, "every parameter was trained"

    def same(path, a, b):
        a, b = np.asarray(a), np.asarray(b)
        key = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * max(np.abs(a).max(), 1e-3), err_msg=key)

    jax.tree_util.tree_map_with_path(same, alone, state)

    # Parameters, target and moments alike are split over fsdp and tensor, and over nothing else.
    _, fsdp, tensor = (*MESHES[mesh], 1)[:3]
    pieces = {leaf.size // leaf.addressable_data(0).size for leaf in jax.tree.leaves(state) if leaf.size >= 64}
    assert pieces <= {1, fsdp, tensor} and fsdp * tensor in pieces
    for part in (state.ema, optax.tree.get(state.opt_state, "mu"), optax.tree.get(state.opt_state, "nu")):
        jax.tree.map(lambda a, b: np.testing.assert_equal(a.sharding, b.sharding), state.params, part)
