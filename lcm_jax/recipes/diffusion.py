"""A teacher: text encoder and UNet, trained together on the latents of a trained autoencoder."""

import tempfile
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.data import shapes
from lcm_jax.data import tokenizer as tokenizers
from lcm_jax.data.captioned import CaptionedDataset
from lcm_jax.data.sources import load_dataset
from lcm_jax.evaluation import verifier
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.objectives.diffusion import Diffusion
from lcm_jax.objectives.networks import Networks
from lcm_jax.ranges import from_settings
from lcm_jax.recipes.autoencoder import open_autoencoder
from lcm_jax.recipes.curve import finish_previews
from lcm_jax.recipes.distillation import batch_shapes, latent_batches, make_prepare
from lcm_jax.recipes.latents import RunCache
from lcm_jax.recipes.models import OpenModel, latent_shape
from lcm_jax.sampling.preview import PreviewSampler, save_grid
from lcm_jax.training.loop import TrainTask
from lcm_jax.training.state import Params
from lcm_jax.weights import diffusers_folder as folders
from lcm_jax.weights.model import compute_digests, open_model, read_params
from lcm_jax.weights.preset import run_preset

TRAINED = ("unet", "text_encoder")
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 0,
    "timestep_spacing": "trailing",
    "clip_sample": False,
}


def make_configs(config, objective: Diffusion, vae: Mapping[str, Any], tokenizer: Any) -> dict[str, dict[str, Any]]:
    """Return the configs of a teacher by component. vae: config.json of its autoencoder."""
    return {
        "unet": config.unet.to_dict()
        | {
            "_class_name": "UNet2DConditionModel",
            "in_channels": vae["latent_channels"],
            "out_channels": vae["latent_channels"],
            "cross_attention_dim": config.text_encoder.hidden_size,
            "sample_size": config.data.size // 2 ** (len(vae["block_out_channels"]) - 1),
        },
        "vae": dict(vae),
        "text_encoder": config.text_encoder.to_dict()
        | {
            "model_type": "clip_text_model",
            "architectures": ["CLIPTextModel"],
            "vocab_size": tokenizer.vocab_size,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        "scheduler": SCHEDULE
        | {
            "_class_name": "DDIMScheduler",
            "prediction_type": objective.prediction_type,
            "rescale_betas_zero_snr": objective.zero_terminal_snr,
        },
    }


def init_params(model: StableDiffusion, seed: int, side: int) -> dict[str, Params]:
    """Return random parameters of the trained networks, to be jitted. side: latents along one axis."""
    unet, text = jax.random.split(jax.random.key(seed))
    z = jnp.zeros((1, side, side, model.unet.config["in_channels"]))
    context = jnp.zeros((1, 1, model.unet.config["cross_attention_dim"]))
    return {
        "unet": model.unet.init(unet, z, jnp.zeros(1, jnp.int32), context)["params"],
        "text_encoder": model.text_encoder.init(text, jnp.zeros((1, 2), jnp.int32))["params"],
    }


def diffusion_task(config, workdir: Path, open_model: OpenModel = open_model) -> TrainTask:
    """Train a teacher from scratch, or from the model that `config.init` names. Raises ValueError."""
    objective = from_settings(Diffusion, "objective", config.objective.to_dict())
    if config.data.source != "shapes":
        raise ValueError(
            f"data.source {config.data.source!r} is not supported: its tokenizer has the words of `shapes`"
        )
    autoencoder = open_autoencoder(config.autoencoder, open_model)
    length = config.text_encoder.max_position_embeddings
    build_tokenizer = partial(tokenizers.build, shapes.words(), model_max_length=length)
    with tempfile.TemporaryDirectory() as temporary:  # nothing is written to the workdir before the step is compiled
        build_tokenizer(folder=temporary)
        tokenizer = tokenizers.load(Path(temporary))
    tokenize = partial(tokenizers.encode, tokenizer)
    configs = make_configs(config, objective, autoencoder.configs["vae"], tokenizer)
    model = StableDiffusion.from_configs(configs, jnp.dtype(config.train.dtype))
    abstract = model.abstract_params()
    start = open_model(config.init) if config.init else None
    preset = run_preset(config.to_dict(), False, None)

    def load_params() -> Params:
        if start is None:
            return jax.jit(partial(init_params, model, config.train.seed, configs["unet"]["sample_size"]))()
        return {name: read_params(start, name, abstract[name]) for name in TRAINED}

    def bind(params: Params, target: Params, frozen: Params) -> Networks:
        return Networks(partial(model.denoise, params["unet"]), None, None, model.schedule)

    @cache
    def previews() -> PreviewSampler:
        prompts = shapes.evaluation_prompts("val", config.sample.prompts)
        return PreviewSampler(model, tokenize, prompts, config.data.size, config.sample.batch_size)

    def write_preview(ema: Params, frozen: Params, path: Path) -> dict[str, float]:
        sampler = previews()
        images, _ = sampler({**frozen, **ema}, "ddim", steps, config.sample.guidance_scale)
        rows = np.array_split(images, min(len(shapes.TASKS), len(images)))  # a task in each
        save_grid([row[: min(10, len(rows[-1]))] for row in rows], path)
        path.with_suffix(".txt").write_text("\n".join(sampler.prompts) + "\n", encoding="utf-8")
        score = verifier.score(images, sampler.prompts)
        tasks = {f"verifier/{task}@{steps}": value for task, value in score["tasks"].items()}
        return {f"verifier@{steps}": score["overall"]} | tasks

    def on_complete(ema: Params, frozen: Params, seconds: float) -> None:
        params = {**jax.device_get(ema), "vae": read_params(autoencoder, "vae", abstract["vae"])}
        build_tokenizer(folder=workdir / "tokenizer")
        with folders.new_folder(workdir / "export", overwrite=True) as folder:
            tokens, dtype = workdir / "tokenizer", config.export.dtype
            folders.write_pipeline(folder, configs, params, tokens, configs["scheduler"], preset=preset, dtype=dtype)
        print(f"teacher in {workdir / 'export'} after {seconds:.0f} s")
        finish_previews(config, workdir)

    def weight_digests() -> dict[str, str]:
        models = {"autoencoder": autoencoder} | ({} if start is None else {"init": start})
        return {
            f"{name}'s {part}": digest
            for name, stored in models.items()
            for part, digest in compute_digests(stored).items()
        }

    @cache
    def dataset() -> CaptionedDataset:
        return load_dataset(config, workdir)

    latents = RunCache(
        folder=Path(config.data.cache or workdir / "latents"),
        model=model,
        load=lambda name: read_params(autoencoder, name, abstract[name], put=np.array),
        digests=partial(compute_digests, autoencoder),
        dataset=dataset,
        tokenizers=lambda: [tokenizer],
        prompts=False,  # the text encoder is trained
        batch_size=config.train.batch_size,
    )
    empty, steps = np.asarray(tokenize([""])[0], np.int32), config.sample.steps
    return TrainTask(
        title="diffusion",
        objective=objective,
        bind=bind,
        prepare=make_prepare(model),
        params={name: abstract[name] for name in TRAINED},
        frozen={"vae": abstract["vae"], "empty_ids": jax.ShapeDtypeStruct(empty.shape, jnp.int32)},
        load_params=load_params,
        load_frozen=lambda: {
            "vae": read_params(autoencoder, "vae", abstract["vae"], lambda leaf: np.dtype(np.float32), put=np.array),
            "empty_ids": empty,
        },
        latents=partial(latent_shape, model),
        batch=batch_shapes(model, config.data, config.train.batch_size),
        encode_data=latents.write if config.data.encode == "cache" else None,
        make_batches=latent_batches(config, dataset, tokenize, latents),
        write_preview=write_preview,
        on_complete=on_complete,
        weight_digests=weight_digests,
        figures={f"verifier@{steps}": False},
    )
