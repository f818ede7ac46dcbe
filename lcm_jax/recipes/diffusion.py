"""A teacher: text encoder and UNet, trained together in the latents of a trained autoencoder."""

import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.data import shapes
from lcm_jax.data import tokenizer as tokenizers
from lcm_jax.data.batches import make_batches
from lcm_jax.data.sources import load_dataset
from lcm_jax.evaluation import verifier
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.objectives import diffusion
from lcm_jax.recipes.autoencoder import folder_of
from lcm_jax.recipes.sources import batch_shapes, digest, make_encoder
from lcm_jax.sampling.preview import PreviewSampler, save_grid
from lcm_jax.training.loop import Job
from lcm_jax.weights import diffusers_folder as folders
from lcm_jax.weights import layout

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


def diffusion_job(config, workdir: Path) -> Job:
    """Text encoder and UNet on the latents of a trained autoencoder, from scratch or from the model `config.init`."""
    autoencoder_folder = folder_of(config.autoencoder)
    vae_config = folders.open_component(autoencoder_folder, "vae")[0]
    build_tokenizer = partial(
        tokenizers.build, shapes.words(), model_max_length=config.text_encoder.max_position_embeddings
    )
    with tempfile.TemporaryDirectory() as temporary:  # nothing is written to the workdir before the step is compiled
        build_tokenizer(folder=temporary)
        tokenizer = tokenizers.load(Path(temporary))
    tokenize = partial(tokenizers.encode, tokenizer)
    unet_config = config.unet.to_dict() | {
        "_class_name": "UNet2DConditionModel",
        "in_channels": vae_config["latent_channels"],
        "out_channels": vae_config["latent_channels"],
        "cross_attention_dim": config.text_encoder.hidden_size,
        "sample_size": config.data.size // 2 ** (len(vae_config["block_out_channels"]) - 1),
    }
    text_config = config.text_encoder.to_dict() | {
        "model_type": "clip_text_model",
        "architectures": ["CLIPTextModel"],
        "vocab_size": tokenizer.vocab_size,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    scheduler = SCHEDULE | {
        "_class_name": "DDIMScheduler",
        "prediction_type": config.objective.prediction_type,
        "rescale_betas_zero_snr": config.objective.zero_terminal_snr,
    }
    configs = {"unet": unet_config, "vae": vae_config, "text_encoder": text_config, "scheduler": scheduler}
    model = StableDiffusion.from_configs(configs, jnp.dtype(config.train.dtype))
    abstract = model.abstract_params()
    vae_params = folders.read_params(autoencoder_folder, "vae", abstract["vae"])

    if config.data.source != "shapes" or config.data.encode != "cache":
        raise ValueError(
            f"data.source {config.data.source!r} with data.encode {config.data.encode!r} is not supported by "
            "objective.name 'diffusion'; use shapes and cache"
        )

    def batches(first):
        dataset, vae = load_dataset(config, workdir), digest(vae_params)
        encoder = make_encoder(model, vae_params)
        return make_batches(
            config, workdir, dataset, first, tokenize=tokenize, make_encoder=encoder, encoder_digest=vae
        )

    sampler = PreviewSampler(
        model,
        tokenize,
        shapes.evaluation_prompts("val", config.sample.prompts),
        config.data.size,
        config.sample.batch_size,
    )
    # A model to go on from: its weights are checked against the networks of this config.
    start = {
        name: folders.read_params(layout.locate(config.init), name, abstract[name])
        for name in (("unet", "text_encoder") if config.init else ())
    }

    @jax.jit
    def random():
        unet, text = jax.random.split(jax.random.key(config.train.seed))
        z = jnp.zeros((1, unet_config["sample_size"], unet_config["sample_size"], unet_config["in_channels"]))
        context = jnp.zeros((1, 1, unet_config["cross_attention_dim"]))
        return {
            "unet": model.unet.init(unet, z, jnp.zeros(1, jnp.int32), context)["params"],
            "text_encoder": model.text_encoder.init(text, jnp.zeros((1, 2), jnp.int32))["params"],
        }

    def preview(ema, path):
        images, _ = sampler(ema | {"vae": vae_params}, "ddim", config.sample.steps, config.sample.guidance_scale)
        rows = np.array_split(images, min(len(shapes.TASKS), len(images)))  # a task in each
        save_grid([row[: min(10, len(rows[-1]))] for row in rows], path)
        path.with_suffix(".txt").write_text("\n".join(sampler.prompts) + "\n")
        figures = verifier.score(images, sampler.prompts)
        return {"verifier": figures["overall"]} | {f"verifier/{task}": v for task, v in figures["tasks"].items()}

    def finish(ema, seconds):
        params = ema | {"vae": vae_params}
        build_tokenizer(folder=workdir / "tokenizer")
        with folders.new_folder(workdir / "export", overwrite=True) as folder:
            folders.write_pipeline(folder, configs, params, workdir / "tokenizer", scheduler, dtype=config.export.dtype)
        print(f"teacher in {workdir / 'export'} after {seconds:.0f} s")

    networks = diffusion.Networks(model.denoise, model.encode_prompt, model.to_latents)
    return Job(
        title="diffusion",
        init=lambda: start or random(),
        frozen={"empty_ids": jnp.asarray(tokenize([""])[0])},
        draw=partial(
            diffusion.draw,
            num_train_timesteps=len(model.schedule.alphas_cumprod),
            empty_prompts=config.objective.empty_prompts,
            timestep_power=config.objective.timestep_power,
        ),
        loss=partial(diffusion.loss, networks=networks, schedule=model.schedule),
        example=batch_shapes(model, config.data.size, config.train.batch_size, "moments"),
        batches=batches,
        preview=preview,
        finish=finish,
        origin={"autoencoder": digest(vae_params)} | ({"init": digest(start)} if start else {}),
    )
