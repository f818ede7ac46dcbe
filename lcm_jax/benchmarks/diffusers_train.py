"""The peer's side of the training suite: steps of LCD and of LCM-LoRA in PyTorch, from moments and tokens.

Autocast, fused AdamW, a foreach average, gradient checkpointing if our side recomputes blocks, the empty prompt encoded
once, and the fastest of the modes of `diffusers_peer`. On a GPU torch.compile compiles the transformer blocks: three
whole UNets, one of them with its gradient, would take minutes.
"""

# pyright: reportPrivateImportUsage=false, reportMissingImports=false

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from lcm_jax.benchmarks import cases
from lcm_jax.benchmarks.cases import Case
from lcm_jax.benchmarks.diffusers_peer import CUDA, DEVICE, choose_mode, open_pipeline, to_tensor
from lcm_jax.benchmarks.worker import read_draws


class Adapted(torch.nn.Module):
    """A linear layer or a convolution plus a low-rank update (alpha / rank is 1)."""

    def __init__(self, base: Any, down: torch.Tensor, up: torch.Tensor):
        super().__init__()
        self.base = base
        self.down, self.up = torch.nn.Parameter(down), torch.nn.Parameter(up)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.base, torch.nn.Conv2d):
            low = F.conv2d(x, self.down, stride=self.base.stride, padding=self.base.padding)  # pyright: ignore
            return self.base(x) + F.conv2d(low, self.up)
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)


def add_adapters(unet: Any, file: Path) -> None:
    """Adapt the modules that a LoRA file names."""
    tensors = {key.removeprefix("unet."): tensor.to(DEVICE) for key, tensor in load_file(file).items()}
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        name = key.removesuffix(".lora_A.weight")
        parent, _, child = name.rpartition(".")
        adapted = Adapted(unet.get_submodule(name), tensors[key], tensors[f"{name}.lora_B.weight"])
        setattr(unet.get_submodule(parent), child, adapted)


def make_student(case: Case, teacher: Any, folder: Path) -> Any:
    """Return the network that is trained: a copy of the teacher with a guidance input, or with adapters."""
    if case.part == "lora":
        student = copy.deepcopy(teacher)
        add_adapters(student, folder / "adapters" / "pytorch_lora_weights.safetensors")
    else:
        config = {name: value for name, value in teacher.config.items() if not name.startswith("_")}
        student: Any = UNet2DConditionModel.from_config(config | {"time_cond_proj_dim": 256})
        student.load_state_dict(teacher.state_dict(), strict=False)
        torch.nn.init.zeros_(student.time_embedding.cond_proj.weight)
        student.to(DEVICE, torch.float32)
    if case.remat:
        student.enable_gradient_checkpointing()
    return student.train()


def encode(pipe: Any, texts: list[str]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return (states of the prompts, the pooled state and sizes that SDXL's UNet takes as well)."""
    states: list[torch.Tensor] = []
    pooled: Any = None
    encoders = [(pipe.tokenizer, pipe.text_encoder)]
    xl = hasattr(pipe, "text_encoder_2")
    encoders += [(pipe.tokenizer_2, pipe.text_encoder_2)] if xl else []
    for tokenizer, encoder in encoders:
        length = tokenizer.model_max_length
        ids = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
        output = encoder(ids.to(DEVICE), output_hidden_states=xl)
        states.append(output.hidden_states[-2] if xl else output.last_hidden_state)
        pooled = output[0]
    context = torch.cat(states, dim=-1)
    if not xl:
        return context, {}
    if pipe.config.force_zeros_for_empty_prompt and not any(texts):
        context, pooled = torch.zeros_like(context), torch.zeros_like(pooled)
    return context, {"text_embeds": pooled, "time_ids": torch.zeros(len(texts), 6, device=DEVICE, dtype=context.dtype)}


def per_example(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, 1, 1, 1)


def origin_and_noise(kind: str, output, z, alpha, sigma):
    """Return x0 and the noise implied by the network's output at z = alpha x0 + sigma noise."""
    if kind == "epsilon":
        return (z - sigma * output) / alpha, output
    if kind == "sample":
        return output, (z - alpha * output) / sigma
    return alpha * z - sigma * output, alpha * output + sigma * z


def prepare_train(case: Case, folder: Path, facts: dict[str, Any]):
    """Prepare a step, whose first run has the draws of the other side."""
    pipe = open_pipeline(cases.model_folder(case, False, folder), case.dtype, None)
    scaling = pipe.vae.config.scaling_factor
    teacher = pipe.unet.requires_grad_(False)
    encoders = [pipe.text_encoder, *([pipe.text_encoder_2] if hasattr(pipe, "text_encoder_2") else [])]
    for encoder in encoders:
        encoder.requires_grad_(False)
    student = make_student(case, teacher, folder)
    target = student if case.part == "lora" else copy.deepcopy(student).requires_grad_(False)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cases.LEARNING_RATE, weight_decay=cases.WEIGHT_DECAY, fused=True)
    draws = read_draws(folder)
    moments = to_tensor(draws["moments"])
    abar = pipe.scheduler.alphas_cumprod.to(DEVICE, torch.float32)
    kind = pipe.scheduler.config.prediction_type
    autocast = torch.autocast(DEVICE, getattr(torch, case.dtype), enabled=case.dtype != "float32")
    frequencies = torch.exp(-torch.arange(128, device=DEVICE) * torch.log(torch.tensor(10000.0)) / 127)
    stride = len(abar) // cases.DDIM_STEPS
    with torch.no_grad(), autocast:
        empty, empty_more = encode(pipe, [""] * case.batch)

    def rates(t):
        return per_example(abar[t].sqrt()), per_example((1 - abar[t]).sqrt())

    def consistency(network, z, t, context, more, embedding):
        with autocast:
            output = network(z, t, context, timestep_cond=embedding, added_cond_kwargs=more).sample.float()
        u = per_example(10.0 * t)
        return 0.25 / (u**2 + 0.25) * z + u / (u**2 + 0.25).sqrt() * origin_and_noise(kind, output, z, *rates(t))[0]

    def draw() -> tuple[torch.Tensor, ...]:
        z = moments[:, : moments.shape[1] // 2]
        index = torch.randint(0, cases.DDIM_STEPS, (case.batch,), device=DEVICE)
        w = torch.empty(case.batch, device=DEVICE).uniform_(*cases.W)
        return torch.randn_like(z), torch.randn_like(z), index, w

    def step(posterior, noise, index, w) -> dict[str, Any]:
        mean, logvar = moments.chunk(2, dim=1)
        z = (mean + (0.5 * logvar.clamp(-30, 20)).exp() * posterior) * scaling
        s = (index + 1) * stride - 1
        t = (s - stride).clamp(min=0)
        angles = 1000.0 * w[:, None] * frequencies
        embedding = torch.cat([angles.sin(), angles.cos()], dim=1) if case.part == "lcd" else None
        alpha, sigma = rates(s)
        z_s = alpha * z + sigma * noise
        with torch.no_grad():
            with autocast:
                context, more = encode(pipe, [cases.PROMPT] * case.batch)
                both = {name: torch.cat([more[name], empty_more[name]]) for name in more}
                z_2, s_2 = torch.cat([z_s, z_s]), torch.cat([s, s])
                output = teacher(z_2, s_2, torch.cat([context, empty]), added_cond_kwargs=both).sample.float()
            x0, e = origin_and_noise(kind, output, z_2, *rates(s_2))
            x0, e = (c + per_example(w) * (c - u) for c, u in (part.chunk(2) for part in (x0, e)))
            alpha, sigma = rates(t)
            goal = consistency(target, alpha * x0 + sigma * e, t, context, more, embedding)
        difference = consistency(student, z_s, s, context, more, embedding) - goal
        loss = ((difference**2 + cases.HUBER_C**2).sqrt() - cases.HUBER_C).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, cases.CLIP_NORM)
        return {"loss": loss.detach(), "gradient_norm": norm}

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if target is not student:
            with torch.no_grad():
                torch._foreach_lerp_(list(target.parameters()), list(student.parameters()), 1 - cases.EMA_RATE)

    def run(made: tuple[torch.Tensor, ...] | None = None) -> dict[str, Any]:
        metrics = step(*(draw() if made is None else made))
        update()
        if not torch.isfinite(metrics["loss"]):
            raise FloatingPointError(f"the loss is {metrics['loss'].item()}")
        return metrics

    def outputs() -> dict[str, Any]:
        index, w = (torch.from_numpy(draws[name]).to(DEVICE) for name in ("index", "w"))
        metrics = run((to_tensor(draws["posterior"]), to_tensor(draws["noise"]), index.long(), w))
        norm = torch.nn.utils.get_total_norm(trained)
        return {name: value.item() for name, value in (metrics | {"parameter_norm": norm}).items()}

    def trial() -> None:
        step(*draw())
        optimizer.zero_grad(set_to_none=True)

    networks = list({id(each): each for each in (student, target, teacher)}.values())
    if not CUDA:
        choose_mode(networks, trial, facts)
        return run, outputs
    for network in networks:
        network.to(memory_format=torch.channels_last)
    blocks = [m for network in networks for m in network.modules() if type(m).__name__ == "BasicTransformerBlock"]
    choose_mode(blocks, trial, facts)
    facts["mode"] = facts["mode"].replace("torch.compile", "torch.compile of the transformer blocks")
    return run, outputs
