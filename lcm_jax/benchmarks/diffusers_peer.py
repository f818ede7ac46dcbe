"""The peer's side of the benchmark: diffusers and PyTorch with their usual optimizations.

python -m lcm_jax.benchmarks.diffusers_peer FOLDER, see `worker`

Attention is PyTorch's scaled_dot_product_attention, diffusers' default. The other optimizations are tried before each
case, and the fastest is timed: eager and channels_last on a CPU, channels_last without and with torch.compile on a GPU.
"""

# diffusers declares its classes by lazy imports, and both libraries are optional.
# pyright: reportPrivateImportUsage=false, reportMissingImports=false

import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch

from lcm_jax.benchmarks import cases
from lcm_jax.benchmarks.cases import Case
from lcm_jax.benchmarks.worker import Prepared, host_peak_bytes, read_draws, serve
from lcm_jax.weights import layout

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
MODES = ("channels_last", "channels_last, torch.compile") if CUDA else ("eager", "channels_last")
SLOW = 5.0  # seconds of a run from which on one is enough to compare modes


def prepare(case: Case, folder: Path) -> Prepared:
    """Build the model and the inputs of a case, and choose the fastest mode."""
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if CUDA else "cpu",
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "mode": "eager",
    }
    if case.suite == "train":
        from lcm_jax.benchmarks.diffusers_train import prepare_train

        run, outputs = prepare_train(case, folder, facts)
    else:
        build = {"peak": prepare_peak, "sample": prepare_sample, "decode": prepare_decode}
        run, outputs = build[case.suite](case, folder, facts)
    run = partial(finished, run)
    return Prepared(run, outputs, facts, lambda: torch.cuda.max_memory_allocated() if CUDA else host_peak_bytes())


def finished(run: Callable[[], Any]) -> Any:
    """Run, and wait for the GPU."""
    result = run()
    if CUDA:
        torch.cuda.synchronize()
    return result


def choose_mode(
    modules: Sequence[Any], trial: Callable[[], Any], facts: dict[str, Any], modes: Sequence[str] = MODES
) -> None:
    """Bring the modules into the fastest of the modes: channels_last, torch.compile, both or none.

    trial: a run of the modules. Sets facts["mode"] and ["first_s"], the seconds of the first run in that mode, and
    ["note"] if a mode failed. Raises RuntimeError if all have failed.
    """
    seconds, firsts, failures = {}, {}, []
    for mode in modes:
        set_mode(modules, mode)
        runs = []
        try:
            while len(runs) < 3 and not (runs and runs[0] > SLOW and "compile" not in mode):
                began = time.perf_counter()
                finished(trial)
                runs.append(time.perf_counter() - began)
        except Exception as error:  # of any of the compilers below; the row says so
            failures.append(f"{mode} failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:100]}")
        else:
            seconds[mode], firsts[mode] = min(runs[1:] or runs), runs[0]
    if failures:
        facts["note"] = "; ".join(failures)
    if not seconds:
        raise RuntimeError(facts["note"])
    facts["mode"] = min(seconds, key=seconds.__getitem__)
    facts["first_s"] = round(firsts[facts["mode"]], 2)
    set_mode(modules, facts["mode"])


def set_mode(modules: Sequence[Any], mode: str) -> None:
    for module in modules:
        module.to(memory_format=torch.channels_last if "channels_last" in mode else torch.contiguous_format)
        module._compiled_call_impl = None  # undoes compile()
        if "torch.compile" in mode:
            module.compile()


def to_tensor(array: np.ndarray, dtype: str = "float32") -> torch.Tensor:
    """Return latents [..., h, w, c] as [..., c, h, w] on the device."""
    return torch.from_numpy(array).movedim(-1, -3).contiguous().to(DEVICE, getattr(torch, dtype))


@cache
def open_pipeline(name: str, dtype: str, vae: str | None) -> Any:
    """Return diffusers' pipeline of a model on the device, with the autoencoder of the folder `vae` if there is one."""
    kind = getattr(torch, dtype)
    own = {} if vae is None else {"vae": diffusers.AutoencoderTiny.from_pretrained(vae, torch_dtype=kind)}
    folder = layout.locate(name)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=kind, safety_checker=None, **own)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(DEVICE)


def case_pipeline(case: Case, folder: Path) -> Any:
    vae = str(cases.tiny_vae_folder(folder)) if case.vae == "tiny" else None
    return open_pipeline(cases.model_folder(case, True, folder), case.dtype, vae)


def prepare_peak(case: Case, folder: Path, facts: dict[str, Any]):
    if case.part == "matmul":
        x = torch.randn(case.size, case.size, dtype=getattr(torch, case.dtype), device=DEVICE)
        run = lambda: x @ x  # noqa: E731
    else:
        source = torch.ones(case.size * 10**6 // 4, device=DEVICE)
        target = torch.empty_like(source)
        run = lambda: target.copy_(source)  # noqa: E731
    return run, lambda: {} if finished(run) is None else {}


def prepare_sample(case: Case, folder: Path, facts: dict[str, Any]):
    """Prepare a call of the pipeline, from prompts to pixels on the host."""
    pipe, draws = case_pipeline(case, folder), read_draws(folder)
    side = case.size or draws["latents"].shape[1] * pipe.vae_scale_factor
    latents = to_tensor(draws["latents"], case.dtype)
    noise = [to_tensor(each, case.dtype) for each in draws["noise"]]

    def call() -> np.ndarray:
        return pipe(
            [cases.PROMPT] * case.batch,
            num_inference_steps=case.steps,
            guidance_scale=float(draws["guidance_scale"]),
            height=side,
            width=side,
            latents=latents.clone(),
            output_type="np",
        ).images

    def outputs() -> dict[str, Any]:
        made = iter(noise)
        with mock.patch("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: next(made)):
            return {"images": np.round(call() * 255.0) / 255.0}  # as the other side's are rounded

    with torch.inference_mode():  # also of what is compiled
        choose_mode([pipe.unet, pipe.vae.decoder], call, facts)
    return torch.inference_mode()(call), torch.inference_mode()(outputs)


def prepare_decode(case: Case, folder: Path, facts: dict[str, Any]):
    """Prepare the decoding of latents on the device to pixels on the device."""
    vae = case_pipeline(case, folder).vae
    z = to_tensor(read_draws(folder)["latents"], case.dtype)

    def run() -> torch.Tensor:
        return vae.decode(z / vae.config.scaling_factor).sample

    def outputs() -> dict[str, Any]:
        return {"images": run().movedim(-3, -1).float().cpu().numpy()}

    with torch.inference_mode():
        choose_mode([vae.decoder], run, facts)
    return torch.inference_mode()(run), torch.inference_mode()(outputs)


if __name__ == "__main__":
    serve(prepare)
