"""This project's side of the benchmark: complete calls, as users make them.

python -m lcm_jax.benchmarks.ours '{"suite": "sample", "model": "shapes-lcm", "batch": 1, ...}'
"""

import os
import tempfile
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from lcm_jax import command, cost
from lcm_jax.benchmarks import cases
from lcm_jax.benchmarks.cases import Case
from lcm_jax.benchmarks.inputs import prepare_data
from lcm_jax.benchmarks.worker import Prepared, host_peak_bytes, serve
from lcm_jax.data import tokenizer as tokenizers
from lcm_jax.models.families import FAMILIES
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.objectives.lcd import LCD
from lcm_jax.pipeline import Pipeline
from lcm_jax.recipes.distillation import bind_networks, make_prepare
from lcm_jax.recipes.models import encode_prompts, latent_shape
from lcm_jax.recipes.trained import add_guidance_input, bind_unet
from lcm_jax.training.state import create_state
from lcm_jax.training.step import make_train_step
from lcm_jax.weights import naming
from lcm_jax.weights.model import StoredModel, infer_family
from lcm_jax.weights.stored import Tensors, placeholder
from lcm_jax.weights.trees import from_params


def prepare(case: Case) -> Prepared:
    """Build the model, the inputs and the function of a case; its first run compiles."""
    command.configure_jax()
    device = jax.devices()[0]
    facts = {"device": device.device_kind, "versions": {"jax": jax.__version__}, "mode": "jit", "saved_s": 0.0}

    def add_saved(event: str, duration_secs: float, **_) -> None:
        if event == "/jax/compilation_cache/compile_time_saved_sec":
            facts["saved_s"] = round(facts["saved_s"] + duration_secs, 2)

    jax.monitoring.register_event_duration_secs_listener(add_saved)
    if case.suite == "data":
        run, more, taken = prepare_data(case)
        return Prepared(run, {"device": f"{os.cpu_count()} cores", "mode": "threads"} | more, host_peak_bytes, taken)
    build = {"matmul": prepare_matmul, "sample": prepare_sample, "train": prepare_train}[case.suite]
    run, facts["flops"] = build(case)

    def peak_bytes() -> int | None:
        return host_peak_bytes() if device.platform == "cpu" else (device.memory_stats() or {}).get("peak_bytes_in_use")

    return Prepared(run, facts, peak_bytes)


def flops_of(function, *arguments) -> int:
    """Return the FLOPs of a function of arrays or shapes."""
    return cost.count_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def random_model(configs: Mapping[str, Mapping[str, Any]], dtype: str, tokenizer: Path) -> StoredModel:
    """Return a model with random weights of unit gain in the compute dtype.

    A pool of random numbers is repeated, since a billion distinct ones would take longer than the benchmark.
    """
    pool = np.random.default_rng(0).standard_normal(2**22, np.float32)
    scaled = cache(lambda fan_in: (pool * fan_in**-0.5).astype(dtype))

    def open_random(params) -> Tensors:
        paths = {naming.to_key(path): path for path in flatten_dict(params)}
        specs = {key: placeholder(jnp.dtype(dtype), spec.shape) for key, spec in from_params(params).specs.items()}

        def draw(key: str) -> np.ndarray:
            shape, name = specs[key].shape, paths[key][-1]
            if name in ("scale", "bias"):
                return np.full(shape, name == "scale", dtype)
            return np.resize(scaled(specs[key].size // shape[0] if name == "kernel" else 1), shape)

        return Tensors(specs, draw)

    abstract = StableDiffusion.from_configs(configs).abstract_params()
    tensors = {name: open_random(params) for name, params in abstract.items()}
    return StoredModel("random weights", infer_family(configs), configs, tensors, tokenizer)


def latent_side(case: Case, pipe: Pipeline) -> int:
    """Return the side of the latents of the case's images."""
    return case.size // pipe.model.downscale if case.size else pipe.configs["unet"]["sample_size"]


def open_pipeline(case: Case, student: bool) -> Pipeline:
    """Return the pipeline of the case's model, or of its teacher."""
    if case.model in cases.SHIPPED:
        return Pipeline.from_pretrained(case.model if student else cases.SHIPPED[case.model], case.dtype)
    if case.model not in cases.RANDOM:
        return Pipeline.from_pretrained(case.model, case.dtype)
    configs = FAMILIES["lcm-dreamshaper" if student else case.model]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tokenizer"
        tokenizers.build(cases.PROMPT.split(), tokenizer, model_max_length=77)
        return Pipeline(random_model(configs, case.dtype, tokenizer), case.dtype)


def prepare_matmul(case: Case):
    """Prepare the square matrix product that measures the device's peak."""
    x = jax.random.normal(jax.random.key(0), (case.size, case.size), case.dtype)
    product = jax.jit(lambda x: x @ x)
    return lambda: jax.block_until_ready(product(x)), 2 * case.size**3


def prepare_sample(case: Case):
    """Prepare a call of the pipeline, from prompts to pixels on the host."""
    pipe = open_pipeline(case, student=True)
    model, params = pipe.model, pipe.params
    size = case.size or None
    side = latent_side(case, pipe)
    guided = 1 if model.guidance_embedding_dim is not None else 2
    z = jax.ShapeDtypeStruct((case.batch, side, side, model.vae.config["latent_channels"]), jnp.float32)
    ids = pipe.tokenize([cases.PROMPT] * case.batch)
    told = jax.eval_shape(model.encode_prompt, params, ids)
    if guided == 1:
        told = told._replace(guidance=jax.ShapeDtypeStruct((case.batch,), jnp.float32))
    t = jax.ShapeDtypeStruct((case.batch,), jnp.int32)
    flops = (
        guided * flops_of(model.encode_prompt, params, ids)
        + guided * case.steps * flops_of(model.denoise, params["unet"], z, t, told)
        + flops_of(model.decode, params["vae"], z)
    )
    call = partial(pipe, [cases.PROMPT] * case.batch, case.steps, 8.0, height=size, width=size, output_type="np")
    return call, flops


def prepare_train(case: Case):
    """Prepare a step of latent consistency distillation, from moments and tokens to the updated target network."""
    pipe = open_pipeline(case, student=False)
    if pipe.model.guidance_embedding_dim is not None:
        raise ValueError(f"--model {case.model!r} is a latent consistency model; pass its teacher to time training")
    teacher, frozen = pipe.model, {name: tree for name, tree in pipe.params.items() if name != "vae"}
    guided = {**pipe.configs["unet"], "time_cond_proj_dim": 256}
    configs, remat = {**pipe.configs, "unet": guided}, "save_convs_and_attention" if case.remat else "none"
    model = StableDiffusion.from_configs(configs, jnp.dtype(case.dtype), remat)
    unet = jax.tree.map(lambda p: p.astype(jnp.float32), pipe.params["unet"])
    student = {"unet": add_guidance_input(unet, model, "zero", seed=0)}
    encoded = jax.jit(partial(encode_prompts, teacher))(frozen, pipe.tokenize([""]))
    frozen["empty_prompt"] = jax.tree.map(lambda each: each[0], encoded)
    side = latent_side(case, pipe)
    optimizer = optax.chain(
        optax.clip_by_global_norm(cases.CLIP_NORM), optax.adamw(cases.LEARNING_RATE, weight_decay=cases.WEIGHT_DECAY)
    )

    step = make_train_step(
        LCD(num_ddim_steps=cases.DDIM_STEPS, w_min=cases.W[0], w_max=cases.W[1], huber_c=cases.HUBER_C),
        bind_networks(lambda params, frozen: bind_unet(model, params["unet"]), teacher, model.schedule),
        make_prepare(model),
        optimizer,
        latents=partial(latent_shape, model),
        seed=0,
        ema_rate=cases.EMA_RATE,
    )
    state = jax.jit(lambda params: create_state(params, optimizer))(student)
    rng = np.random.default_rng(0)
    batch = jax.device_put(
        {
            "moments": rng.standard_normal(
                (case.batch, side, side, 2 * model.vae.config["latent_channels"]), np.float32
            ),
            "token_ids": pipe.tokenize([cases.PROMPT] * case.batch),
            "time_ids": np.zeros((case.batch, 6), np.float32),
        }
    )
    flops = flops_of(step, state, frozen, batch)
    jitted = jax.jit(step, donate_argnums=0)

    def run():
        nonlocal state
        state, metrics = jitted(state, frozen, batch)
        loss = float(metrics["loss"])
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}")

    return run, flops


if __name__ == "__main__":
    serve(prepare)
