"""The peer's side of the benchmark: diffusers and PyTorch with their usual optimizations.

    python -m lcm_jax.benchmarks.diffusers_peer '{"suite": "sample", "model": "shapes-lcm", "batch": 1, ...}'

On a GPU: scaled-dot-product attention, channels_last, torch.compile for sampling, autocast, fused AdamW and a foreach
average for training. On a CPU: eager, since channels_last and torch.compile do not save time there.
"""

# diffusers declares its classes by lazy imports, and both libraries are optional.
# pyright: reportPrivateImportUsage=false, reportMissingImports=false

import copy
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, LatentConsistencyModelPipeline, LCMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lcm_jax.benchmarks import cases
from lcm_jax.benchmarks.cases import Case
from lcm_jax.benchmarks.worker import Prepared, host_peak_bytes, serve
from lcm_jax.data import tokenizer as tokenizers
from lcm_jax.models.families import FAMILIES
from lcm_jax.weights import layout

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def prepare(case: Case) -> Prepared:
    """Build the model, the inputs and the function of a case; its first run compiles."""
    build = {"matmul": prepare_matmul, "sample": prepare_sample, "train": prepare_train}[case.suite]
    run, mode = build(case)

    def finished() -> None:
        run()
        if CUDA:
            torch.cuda.synchronize()

    facts = {
        "device": torch.cuda.get_device_name() if CUDA else "cpu",
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "mode": mode,
    }
    return Prepared(finished, facts, lambda: torch.cuda.max_memory_allocated() if CUDA else host_peak_bytes())


def without_notes(config: dict[str, Any]) -> dict[str, Any]:
    """Return a published config without the keys that begin with an underscore."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def open_pipeline(case: Case, student: bool) -> Any:
    """Return diffusers' pipeline of the case's model, on the device and in the case's dtype."""
    dtype = getattr(torch, case.dtype)
    if case.model not in cases.RANDOM:
        name = case.model if student else cases.SHIPPED.get(case.model, case.model)
        return diffusers.DiffusionPipeline.from_pretrained(
            layout.locate(name), torch_dtype=dtype, safety_checker=None
        ).to(DEVICE)
    configs = {name: without_notes(c) for name, c in FAMILIES["lcm-dreamshaper" if student else case.model].items()}
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        tokenizers.build(cases.PROMPT.split(), Path(folder), model_max_length=77)
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    components: dict[str, Any] = {
        "unet": UNet2DConditionModel(**configs["unet"]),
        "vae": AutoencoderKL(**configs["vae"]),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
        "tokenizer": tokenizer,
        "scheduler": LCMScheduler(**FAMILIES["lcm-dreamshaper"]["scheduler"]),
        "safety_checker": None,
        "feature_extractor": None,
    }
    return LatentConsistencyModelPipeline(**components, requires_safety_checker=False).to(DEVICE, dtype)


def prepare_matmul(case: Case):
    x = torch.randn(case.size, case.size, dtype=getattr(torch, case.dtype), device=DEVICE)
    return lambda: x @ x, "eager"


def prepare_sample(case: Case):
    """Prepare a call of the pipeline, from prompts to pixels on the host."""
    pipe = open_pipeline(case, student=True)
    pipe.set_progress_bar_config(disable=True)
    if CUDA:
        pipe.unet, pipe.vae = (each.to(memory_format=torch.channels_last) for each in (pipe.unet, pipe.vae))
        pipe.unet.forward = torch.compile(pipe.unet.forward)
        pipe.vae.decode = torch.compile(pipe.vae.decode)
    arguments = {"num_inference_steps": case.steps, "guidance_scale": 8.0, "output_type": "np"}
    if case.size:
        arguments |= {"height": case.size, "width": case.size}
    generator = torch.Generator().manual_seed(0)

    def run() -> None:
        with torch.inference_mode():
            pipe([cases.PROMPT] * case.batch, generator=generator, **arguments)

    return run, "torch.compile" if CUDA else "eager"


def prepare_train(case: Case):
    """Prepare a step of latent consistency distillation, from moments and tokens to the updated target network."""
    pipe = open_pipeline(case, student=False)
    teacher, text_encoder = pipe.unet.requires_grad_(False), pipe.text_encoder.requires_grad_(False)
    config = without_notes(dict(teacher.config, time_cond_proj_dim=256))
    student = UNet2DConditionModel(**config)
    student.load_state_dict(teacher.state_dict(), strict=False)
    student.to(DEVICE, torch.float32)  # pyright: ignore[reportArgumentType]  (diffusers' decorator hides self)
    target = copy.deepcopy(student).requires_grad_(False)
    if case.remat:
        student.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=cases.LEARNING_RATE, weight_decay=cases.WEIGHT_DECAY, fused=CUDA
    )
    abar = pipe.scheduler.alphas_cumprod.to(DEVICE, torch.float32)
    prediction_type = pipe.scheduler.config.prediction_type
    autocast = torch.autocast(DEVICE, getattr(torch, case.dtype), enabled=case.dtype != "float32")
    side = case.size // pipe.vae_scale_factor if case.size else config["sample_size"]
    moments = torch.randn(case.batch, 8, side, side, device=DEVICE)
    tokenize = lambda text: pipe.tokenizer(  # noqa: E731
        [text] * case.batch,
        padding="max_length",
        truncation=True,
        return_tensors="pt",
        max_length=pipe.tokenizer.model_max_length,
    ).input_ids.to(DEVICE)
    ids, empty_ids = tokenize(cases.PROMPT), tokenize("")
    frequencies = torch.exp(-torch.arange(128, device=DEVICE) * torch.log(torch.tensor(10000.0)) / 127)
    stride = len(abar) // cases.DDIM_STEPS

    def broadcast(x):
        return x.reshape(-1, 1, 1, 1)

    def origin_and_noise(output, z, t):
        """Return x0 and the noise implied by the network's output at z_t."""
        alpha, sigma = broadcast(abar[t].sqrt()), broadcast((1 - abar[t]).sqrt())
        if prediction_type == "epsilon":
            return (z - sigma * output) / alpha, output
        if prediction_type == "sample":
            return output, (z - alpha * output) / sigma
        return alpha * z - sigma * output, alpha * output + sigma * z

    def consistency(network, z, t, context, w):
        with autocast:
            output = network(z, t, context, timestep_cond=w).sample.float()
        u = broadcast(10.0 * t)
        return 0.25 / (u**2 + 0.25) * z + u / (u**2 + 0.25).sqrt() * origin_and_noise(output, z, t)[0]

    def run() -> None:
        mean, logvar = moments.chunk(2, dim=1)
        z = (mean + (0.5 * logvar.clamp(-30, 20)).exp() * torch.randn_like(mean)) * pipe.vae.config.scaling_factor
        noise = torch.randn_like(z)
        s = (torch.randint(0, cases.DDIM_STEPS, (case.batch,), device=DEVICE) + 1) * stride - 1
        t = (s - stride).clamp(min=0)
        w = torch.empty(case.batch, device=DEVICE).uniform_(*cases.W)
        angles = 1000.0 * w[:, None] * frequencies
        embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
        z_s = broadcast(abar[s].sqrt()) * z + broadcast((1 - abar[s]).sqrt()) * noise
        with torch.no_grad(), autocast:
            context, empty = text_encoder(ids).last_hidden_state, text_encoder(empty_ids).last_hidden_state
            output = teacher(torch.cat([z_s, z_s]), torch.cat([s, s]), torch.cat([context, empty])).sample.float()
        with torch.no_grad():
            x0, e = origin_and_noise(output, torch.cat([z_s, z_s]), torch.cat([s, s]))
            x0, e = (part[: case.batch] + broadcast(w) * (part[: case.batch] - part[case.batch :]) for part in (x0, e))
            z_t = broadcast(abar[t].sqrt()) * x0 + broadcast((1 - abar[t]).sqrt()) * e
            goal = consistency(target, z_t, t, context, embedding)
        difference = consistency(student, z_s, s, context, embedding) - goal
        loss = ((difference**2 + cases.HUBER_C**2).sqrt() - cases.HUBER_C).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), cases.CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(list(target.parameters()), list(student.parameters()), 1 - cases.EMA_RATE)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()}")

    return run, "eager"


if __name__ == "__main__":
    serve(prepare)
