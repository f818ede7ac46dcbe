"""This project's side of the training suite: steps of LCD and of LCM-LoRA, from moments and tokens."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lcm_jax import cost
from lcm_jax.benchmarks import cases
from lcm_jax.benchmarks.cases import Case
from lcm_jax.benchmarks.worker import write_draws
from lcm_jax.compiler import compiler_options
from lcm_jax.data import tokenizer as tokenizers
from lcm_jax.models import lora
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.objectives.lcd import LCD
from lcm_jax.recipes.distillation import bind_networks, make_prepare
from lcm_jax.recipes.models import encode_prompts, frozen_dtype, latent_shape, open_complete
from lcm_jax.recipes.trained import Adapted, add_guidance_input, bind_unet
from lcm_jax.training.state import create_state
from lcm_jax.training.step import make_train_step
from lcm_jax.weights.lora_files import write_adapters
from lcm_jax.weights.model import check_complete, read_params

ADAPTERS = "adapters"  # folder of the adapters that both sides begin with


def prepare_train(case: Case, folder: Path, facts: dict[str, Any]):
    """Prepare a step, whose first run has the draws that the other side reads."""
    stored = open_complete(cases.model_folder(case, False, folder))
    if stored.configs["unet"].get("time_cond_proj_dim") is not None:
        raise ValueError(f"--model {case.model!r} is a latent consistency model; pass its teacher to time training")
    teacher = StableDiffusion.from_configs(stored.configs, jnp.dtype(case.dtype))
    abstract = teacher.abstract_params()

    def read(name: str, dtype=None):
        dtype = frozen_dtype(teacher.dtype_of(name)) if dtype is None else dtype
        return read_params(stored, name, abstract[name], dtype, put=partial(jnp.array, copy=True))

    frozen: dict[str, Any] = {name: read(name) for name in teacher.networks if name != "vae"}
    tokenize = partial(tokenizers.encode_for, tokenizers.open_tokenizers(check_complete(stored), stored.configs))
    encoded = jax.jit(partial(encode_prompts, teacher))(frozen, jnp.asarray(tokenize([""])))
    frozen["empty_prompt"] = jax.tree.map(lambda each: each[0], encoded)
    remat = "save_convs_and_attention" if case.remat else "none"
    if case.part == "lora":
        model = StableDiffusion.from_configs(stored.configs, jnp.dtype(case.dtype), remat)
        settings = lora_settings(model, abstract["unet"])
        params = {"lora": jax.jit(partial(lora.init, params=abstract["unet"], settings=settings))(jax.random.key(0))}
        write_adapters(folder / ADAPTERS, params["lora"], settings.alpha, overwrite=True)
        student = lambda params, frozen: Adapted(model, frozen["unet"], params["lora"], settings)  # noqa: E731
    else:
        guided = {**stored.configs["unet"], "time_cond_proj_dim": 256}
        model = StableDiffusion.from_configs({**stored.configs, "unet": guided}, jnp.dtype(case.dtype), remat)
        unet = read("unet", lambda leaf: np.dtype(np.float32))
        params = {"unet": add_guidance_input(unet, model, "zero", seed=0)}
        student = lambda params, frozen: bind_unet(model, params["unet"])  # noqa: E731
    optimizer = optax.chain(
        optax.clip_by_global_norm(cases.CLIP_NORM), optax.adamw(cases.LEARNING_RATE, weight_decay=cases.WEIGHT_DECAY)
    )
    objective = LCD(num_ddim_steps=cases.DDIM_STEPS, w_min=cases.W[0], w_max=cases.W[1], huber_c=cases.HUBER_C)
    step = make_train_step(
        objective,
        bind_networks(student, teacher, model.schedule),
        make_prepare(model),
        optimizer,
        latents=partial(latent_shape, model),
        seed=0,
        ema_rate=cases.EMA_RATE,
    )
    average = case.part != "lora"  # published: LCM-LoRA has no moving average
    state = jax.jit(partial(create_state, optimizer=optimizer, average=average), donate_argnums=0)(params)
    del params
    side = case.size // model.downscale if case.size else stored.configs["unet"].get("sample_size") or 64
    shape = (case.batch, side, side, 2 * model.vae.config["latent_channels"])
    batch: dict[str, Any] = {
        "moments": jax.random.normal(jax.random.key(1), shape, jnp.float32),
        "token_ids": jnp.asarray(tokenize([cases.PROMPT] * case.batch)),
        "time_ids": jnp.zeros((case.batch, 6), jnp.float32),
    }
    draws = objective.draw(jax.random.fold_in(jax.random.key(0), 0), latent_shape(model, batch))
    write_draws(folder, moments=batch["moments"], **draws._asdict())
    # The parameters and the optimizer's state are read and written once at least, frozen weights are read.
    facts["bytes"] = sum(2 * leaf.nbytes for leaf in jax.tree.leaves(state))
    facts["bytes"] += sum(leaf.nbytes for leaf in jax.tree.leaves(frozen))
    facts["size"] = side * model.downscale
    jitted, compiled = jax.jit(step, donate_argnums=0), None

    def run() -> dict[str, Any]:
        nonlocal state
        assert compiled is not None
        state, metrics = compiled(state, frozen, batch)
        if not np.isfinite(loss := float(metrics["loss"])):
            raise FloatingPointError(f"the loss is {loss}")
        return metrics

    def outputs() -> dict[str, Any]:
        nonlocal compiled
        traced = jitted.trace(state, frozen, batch)
        facts["flops"] = cost.count_flops(traced.jaxpr.jaxpr, recomputed=False)
        compiled = traced.lower().compile(compiler_options=compiler_options())
        metrics = run()
        return {name: metrics[name] for name in ("loss", "gradient_norm")} | {
            "parameter_norm": optax.tree.norm(state.params)
        }

    return run, outputs


def lora_settings(model: StableDiffusion, unet: Any) -> lora.LoRASettings:
    """Return the published settings of LCM-LoRA as far as a UNet has the modules and the widths for them."""
    names = [lora.module_name(path) for path in lora.kernels(unet)]
    targets = tuple(t for t in lora.DEFAULT_TARGETS if any(f".{name}".endswith(f".{t}") for name in names))
    rank = min(cases.LORA_RANK, min(model.unet.config["block_out_channels"]) // 2)
    return lora.LoRASettings(rank=rank, alpha=float(rank), targets=targets)
