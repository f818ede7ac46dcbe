"""A world small enough to write down: UNets of a few channels, a text encoder that is a table, an autoencoder that only
scales, and a batch with its draws."""

import re
from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.diffusion.consistency import guidance_embedding
from lcm_jax.diffusion.schedule import make_schedule
from lcm_jax.models.conditioning import Conditioning
from lcm_jax.models.unet import UNet2DCondition
from lcm_jax.objectives.consistency import Draws
from lcm_jax.objectives.networks import Networks
from lcm_jax.recipes.distillation import make_prepare

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
SCHEDULER = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
UNET = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
STUDENT = UNET | {"time_cond_proj_dim": 256}
B, H, W, C, L, VOCABULARY = 4, 8, 4, 3, 5, 11


def schedule(prediction_type="epsilon"):
    return make_schedule(SCHEDULER | {"prediction_type": prediction_type})


def encode_prompt(params, token_ids, time_ids=None):
    return Conditioning(params["text_encoder"]["table"][token_ids])


def to_latents(moments, noise):
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return 0.5 * (mean + jnp.exp(0.5 * logvar) * noise)


PREPARE = make_prepare(SimpleNamespace(inpaints=False, encode_prompt=encode_prompt, to_latents=to_latents))


def bind_to(student, teacher, schedule):
    """bind(params, target, frozen) of networks(params, z, t, conditioning)."""
    return lambda params, target, frozen: Networks(
        partial(student, params["unet"]), partial(student, target["unet"]), partial(teacher, frozen["unet"]), schedule
    )


def example(seed=0, batch=B):
    """(frozen without a teacher, batch, draws): both ends of the table, and one empty prompt."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    frozen = {"text_encoder": {"table": normal(VOCABULARY, 12)}, "empty_ids": np.array([0, 1, 1, 1, 1], np.int32)}
    data = {
        "moments": np.concatenate([normal(batch, H, W, C), 0.1 * normal(batch, H, W, C) - 4], axis=-1),
        "token_ids": rng.integers(2, VOCABULARY, (batch, L)).astype(np.int32),
        "time_ids": np.zeros((batch, 6), np.float32),
    }
    draws = Draws(
        posterior=normal(batch, H, W, C),
        noise=normal(batch, H, W, C),
        index=np.resize(np.array([0, 49, 7, 25], np.int32), batch),
        w=np.resize(np.array([7.5, 2.0, 13.25, 4.0], np.float32), batch),
        keep_prompt=np.resize(np.array([True, True, True, False]), batch),
    )
    return frozen, data, draws


def tree_from_torch(tensors) -> dict:
    """diffusers' names and layouts -> this project's: `.N` is `_N`, kernels HWIO or (in, out), norms have a scale."""
    tree: dict = {}
    for key, array in tensors.items():
        *parents, leaf = re.sub(r"\.(\d+)", r"_\1", key).split(".")
        if leaf == "weight":
            leaf = "scale" if array.ndim == 1 else "kernel"
            array = array.transpose({1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}[array.ndim])
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = array.astype(np.float32)
    return tree


def assert_gradients_equal(ours, theirs) -> None:
    """Assert that a tree of gradients equals {name: gradient} of torch, to 1e-4 of the largest of each."""
    theirs = tree_from_torch(theirs)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for path, mine in jax.tree.leaves_with_path(ours):
        reference = theirs
        for key in path:
            reference = reference[key.key]
        assert np.abs(reference).max() > 0
        error = np.abs(mine - reference).max() / np.abs(reference).max()
        assert error < 1e-4, (jax.tree_util.keystr(path), error)


@cache
def torch_unets():
    """student, target, teacher in float64, each with every weight random and its own."""
    torch = pytest.importorskip("torch")
    from diffusers import UNet2DConditionModel

    torch.set_num_threads(1)  # its threads wait for each other for seconds over networks as small as these
    unets = []
    for seed, config in enumerate([STUDENT, STUDENT, UNET]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(**config)
        with torch.no_grad():
            for weight in unet.parameters():
                weight.add_(0.05 * torch.randn_like(weight))
        unets.append(unet.double())  # float32 values, computed in float64
    return unets


@cache
def unet_networks():
    """The networks are compiled, the objective around them is not: six variants of it share their compilations."""
    student, teacher = UNet2DCondition.from_config(STUDENT), UNet2DCondition.from_config(UNET)

    def apply(network):
        def denoise(params, z, t, conditioning):
            w = conditioning.guidance
            embedding = None if w is None else guidance_embedding(w)
            return network.apply({"params": params}, z, t, conditioning.context, embedding)

        return jax.jit(denoise)

    return apply(student), apply(teacher)
