"""The programs that a GPU gets: dtypes of the work, read from their StableHLO, which is lowered without one."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
import tiny_model

from lcm_jax.models.attention import Device, compiling_for
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.recipes.diffusion import SCHEDULE
from lcm_jax.sampling.generate import generate, sampler_table
from lcm_jax.sampling.inputs import Inputs

H100 = Device("cuda", (9, 0))
B = 2
# A product of one row of the guidance weight's embedding per image with `cond_proj`, which stays in float32.
W_EMBEDDING = f"tensor<{B}x256xf32>, tensor<256x16xf32>"

abstract = jax.ShapeDtypeStruct


def lower(function, *inputs) -> str:
    """Return the StableHLO of a function for an H100."""
    with compiling_for(H100):
        return jax.jit(function).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()


def inputs_of(text: str, operation: str) -> list[str]:
    """Return the types of the inputs of every operation of that kind, as one text each."""
    return re.findall(rf"stablehlo\.{operation}\b.* : \(([^)]*)\) ->", text)


def in_float32(types: list[str]) -> list[str]:
    """Return the inputs of which at least one is float32."""
    return [each for each in types if "xf32" in each]


def casts(text: str, params) -> Counter:
    """Return the number of casts of arrays with the shape of a matrix or a kernel in `params`, by their dtypes."""
    shapes = {"x".join(map(str, leaf.shape)) for leaf in jax.tree.leaves(params) if leaf.ndim >= 2}
    found = re.findall(r"stablehlo\.convert .* : \(tensor<([\dx]+)x(\w+)>\) -> tensor<[\dx]+x(\w+)>", text)
    return Counter((source, to) for shape, source, to in found if shape in shapes)


@pytest.fixture(scope="module")
def student() -> StableDiffusion:
    """A latent consistency model that computes in bfloat16."""
    text = tiny_model.TEXT | {"vocab_size": 40, "eos_token_id": 39}
    scheduler = SCHEDULE | {"_class_name": "LCMScheduler", "prediction_type": "v_prediction"}
    unet = tiny_model.UNET | {"time_cond_proj_dim": 256}
    configs = {"unet": unet, "vae": tiny_model.VAE, "text_encoder": text, "scheduler": scheduler}
    return StableDiffusion.from_configs(configs, jnp.bfloat16)


def lower_sampling(model: StableDiffusion, dtype) -> tuple[str, dict]:
    """Return the StableHLO of sampling with parameters of a dtype, and the parameters."""
    params = jax.tree.map(lambda leaf: abstract(leaf.shape, dtype), model.abstract_params())
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), B))
    inputs = Inputs(
        abstract((B, 20), jnp.int32), None, abstract((B, 16, 16, 4), jnp.float32), keys, abstract((), jnp.float32)
    )
    table = sampler_table(model, "lcm", 4)
    return lower(lambda params, inputs: generate(model, params, inputs, "lcm", table), params, inputs), params


def test_sampling_in_bfloat16(student):
    """All convolutions and products of the networks are in bfloat16, except the guidance weight's embedding."""
    text, params = lower_sampling(student, jnp.bfloat16)
    convolutions, products = inputs_of(text, "convolution"), inputs_of(text, "dot_general")
    assert len(convolutions) >= 20 and len(products) >= 20
    assert not in_float32(convolutions) and in_float32(products) == [W_EMBEDDING]
    assert not casts(text, params)["f32", "bf16"], "weights in the compute dtype are used as they are"


def test_weights_in_float32_are_cast_in_every_program(student):
    """What the test above would find: the cost of parameters that are not cast when they are loaded."""
    text, params = lower_sampling(student, jnp.float32)
    matrices = sum(leaf.ndim >= 2 for name in ("unet", "vae", "text_encoder") for leaf in jax.tree.leaves(params[name]))
    assert casts(text, params)["f32", "bf16"] > matrices / 2


def test_a_rematerialized_gradient_in_bfloat16(student):
    """Both directions multiply in bfloat16, except for the guidance weight's embedding and its gradient."""
    unet = student.unet.clone(remat="block")
    params = jax.tree.map(lambda leaf: abstract(leaf.shape, jnp.float32), student.abstract_params()["unet"])

    def loss(params, z, t, context, embedding):
        return unet.apply({"params": params}, z, t, context, embedding).sum()

    like = lambda *shape: abstract(shape, jnp.float32)  # noqa: E731
    inputs = (like(B, 16, 16, 4), abstract((B,), jnp.int32), like(B, 20, 16), like(B, 256))
    text = lower(jax.grad(loss), params, *inputs)
    convolutions, products = inputs_of(text, "convolution"), inputs_of(text, "dot_general")
    assert len(convolutions) >= 40 and len(products) >= 40
    assert not in_float32(convolutions)
    assert set(in_float32(products)) == {W_EMBEDDING, f"tensor<{B}x16xf32>, tensor<{B}x256xf32>"}
