"""This project's side of the benchmark: complete calls, as users make them.

python -m lcm_jax.benchmarks.ours FOLDER, see `worker`
"""

import os
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax import command, cost
from lcm_jax.benchmarks import cases
from lcm_jax.benchmarks.cases import Case
from lcm_jax.benchmarks.inputs import prepare_data
from lcm_jax.benchmarks.ours_train import prepare_train
from lcm_jax.benchmarks.worker import Prepared, host_peak_bytes, serve, write_draws
from lcm_jax.compiler import compiler_options
from lcm_jax.diffusion.samplers import SAMPLERS
from lcm_jax.pipeline import Pipeline
from lcm_jax.profiling.trace import Tracer
from lcm_jax.sampling.generate import is_classifier_free
from lcm_jax.sampling.inputs import draw_noise, make_time_ids, step_noise

SAVING = "/jax/compilation_cache/compile_time_saved_sec"
SAVED: list[float] = []  # seconds of compilation that the cache has saved, by program


def prepare(case: Case, folder: Path) -> Prepared:
    """Build the model and the inputs of a case; its first run compiles."""
    device = jax.devices()[0]
    facts = {"device": device.device_kind, "versions": {"jax": jax.__version__}, "mode": "jit"}
    if case.suite == "data":
        run, more, taken = prepare_data(case)
        facts = {"device": f"{os.cpu_count()} cores", "mode": "threads"} | more
        return Prepared(run, lambda: run() or {}, facts, host_peak_bytes, taken)
    build = {"peak": prepare_peak, "sample": prepare_sample, "decode": prepare_decode}
    if case.suite == "train":
        run, outputs = prepare_train(case, folder, facts)
    else:
        run, outputs = build[case.suite](case, folder, facts)
    before = sum(SAVED)

    def first() -> Mapping[str, Any]:
        made = outputs()
        facts["saved_s"] = round(sum(SAVED) - before, 2)
        return made

    def peak_bytes() -> int | None:
        return host_peak_bytes() if device.platform == "cpu" else (device.memory_stats() or {}).get("peak_bytes_in_use")

    def profile(folder: Path) -> None:
        tracer = Tracer(folder, case.dtype)
        tracer.start()
        run()
        tracer.stop(runs=1)

    return Prepared(run, first, facts, peak_bytes, profile=profile)


def prepare_peak(case: Case, folder: Path, facts: dict[str, Any]):
    """Prepare the square matrix product, or the copy, that measures the device's peak."""
    if case.part == "matmul":
        x = jax.random.normal(jax.random.key(0), (case.size, case.size), case.dtype)
        function, facts["flops"] = jax.jit(lambda x: x @ x, compiler_options=compiler_options()), 2 * case.size**3
    else:
        x = jnp.ones((case.size * 10**6 // 4,), jnp.float32)
        # In place, since a CPU would spend most of the time on the pages of a new array.
        function, facts["bytes"] = jax.jit(jnp.negative, donate_argnums=0), 2 * x.nbytes

    def run() -> None:
        nonlocal x
        made = jax.block_until_ready(function(x))
        x = made if case.part == "copy" else x

    def outputs() -> dict[str, Any]:
        run()
        return {}

    return run, outputs


@cache
def open_pipeline(name: str, dtype: str, vae: str | None) -> Pipeline:
    return Pipeline.from_pretrained(name, dtype, vae=vae)


def case_pipeline(case: Case, folder: Path) -> tuple[Pipeline, tuple[int, int, int]]:
    """Return the pipeline of a case and (h, w, c) of its latents. Cases that differ in their steps share it."""
    vae = str(cases.tiny_vae_folder(folder)) if case.vae == "tiny" else None
    pipe = open_pipeline(cases.model_folder(case, True, folder), case.dtype, vae)
    side = case.size // pipe.model.downscale if case.size else pipe.configs["unet"].get("sample_size") or 64
    return pipe, (side, side, pipe.model.vae.config["latent_channels"])


def flops_of(function, *arguments) -> int:
    """Return the FLOPs of a function of arrays or shapes."""
    return cost.count_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def nbytes(*trees: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(trees))


def prepare_sample(case: Case, folder: Path, facts: dict[str, Any]):
    """Prepare a call of the pipeline, from prompts to pixels on the host."""
    pipe, shape = case_pipeline(case, folder)
    model, params, preset = pipe.model, pipe.params, pipe.preset
    pixels = shape[0] * model.downscale
    latents, keys = draw_noise(0, np.arange(case.batch, dtype=np.uint32), shape)
    adds_noise = SAMPLERS[pipe.sampler].adds_noise
    noise = [step_noise(keys, jnp.int32(i), shape) for i in range(case.steps * adds_noise)]
    write_draws(folder, latents=latents, noise=noise, guidance_scale=preset.guidance_scale)

    # Classifier-free guidance evaluates the text encoder and the UNet for the negative prompt too.
    passes = 1 + is_classifier_free(model, preset.guidance_scale)
    ids = pipe.tokenize([cases.PROMPT] * case.batch)
    sizes: Any = make_time_ids(case.batch, (pixels, pixels))
    encode = partial(model.encode_prompt, time_ids=sizes)
    prompt = jax.eval_shape(encode, params, ids)
    if model.guidance_embedding_dim is not None:
        prompt = prompt._replace(guidance=jax.ShapeDtypeStruct((case.batch,), jnp.float32))
    t = jax.ShapeDtypeStruct((case.batch,), jnp.int32)
    facts["flops"] = (
        passes * flops_of(encode, params, ids)
        + passes * case.steps * flops_of(model.denoise, params["unet"], latents, t, prompt)
        + flops_of(model.decode, params["vae"], latents)
    )
    # The weights at least are read in each pass; half of the autoencoder is the encoder, which is not used.
    encoders = [tree for name, tree in params.items() if name.startswith("text")]
    width = jnp.dtype(case.dtype).itemsize
    facts["bytes"] = width * sum(
        leaf.size * times
        for tree, times in ((encoders, 1), (params["unet"], case.steps), (params["vae"]["decoder"], 1))
        for leaf in jax.tree.leaves(tree)
    )
    facts["size"] = pixels
    call = partial(
        pipe,
        [cases.PROMPT] * case.batch,
        case.steps,
        preset.guidance_scale,
        height=pixels,
        width=pixels,
        output_type="np",
        progress=False,
    )
    return call, lambda: {"images": call().images}


def prepare_decode(case: Case, folder: Path, facts: dict[str, Any]):
    """Prepare the decoding of latents on the device to pixels on the device."""
    pipe, shape = case_pipeline(case, folder)
    z = jax.random.normal(jax.random.key(0), (case.batch, *shape), jnp.float32)
    write_draws(folder, latents=z)
    params, decode = pipe.params["vae"], jax.jit(pipe.model.decode, compiler_options=compiler_options())
    facts["flops"], facts["bytes"] = flops_of(pipe.model.decode, params, z), nbytes(params["decoder"])
    facts["size"] = shape[0] * pipe.model.downscale
    run = lambda: jax.block_until_ready(decode(params, z))  # noqa: E731
    return run, lambda: {"images": run()}


if __name__ == "__main__":
    command.configure_jax()
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration_secs, **_: SAVED.append(duration_secs) if event == SAVING else None
    )
    serve(prepare)
