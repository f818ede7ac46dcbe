"""A KL autoencoder on the embedded pictures."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.data.batches import make_batches
from lcm_jax.data.sources import load_dataset
from lcm_jax.diffusion.pixels import to_float, to_uint8
from lcm_jax.evaluation import verifier
from lcm_jax.models.vae import AutoencoderKL
from lcm_jax.objectives import autoencoder
from lcm_jax.recipes.sources import digest
from lcm_jax.sampling.preview import save_grid
from lcm_jax.training.loop import Job
from lcm_jax.weights import diffusers_folder as folders
from lcm_jax.weights import layout


def folder_of(model: str) -> Path:
    """Where an autoencoder is: a shipped model, or a folder with vae/, such as the export of such a run."""
    return layout.locate(model) if model in layout.SHIPPED else Path(model)


def check_source(config) -> None:
    """Raise ValueError unless `config.data` names images whose captions the verifier can judge."""
    if config.data.source != "shapes" or config.data.encode != "step":
        raise ValueError(
            f"data.source {config.data.source!r} with data.encode {config.data.encode!r} is not supported by "
            "objective.name 'autoencoder'; use shapes and step"
        )


def autoencoder_job(config, workdir: Path) -> Job:
    """An autoencoder from scratch, or from the one that `config.init` has."""
    vae_config = config.vae.to_dict() | {"sample_size": config.data.size, "scaling_factor": 1.0}
    vae = AutoencoderKL.from_config(vae_config, jnp.dtype(config.train.dtype))
    downscale, channels = 2 ** (len(config.vae.block_out_channels) - 1), config.vae.latent_channels
    size = config.data.size
    check_source(config)
    dataset = load_dataset(config, workdir)
    held_out = dataset.held_out
    shown = np.stack([held_out[i]["image"] for i in range(config.sample.pictures)])
    captions = [held_out[i]["caption"] for i in range(len(held_out))]
    apply = lambda method: lambda params, x: vae.apply({"params": params}, x, method=method)  # noqa: E731
    encode = jax.jit(apply("encode"))
    decode_mean = jax.jit(lambda params, moments: apply("decode")(params, jnp.split(moments, 2, axis=-1)[0]))

    @jax.jit
    def random():
        noise = jnp.zeros((1, size // downscale, size // downscale, channels))
        return vae.init(jax.random.key(config.train.seed), jnp.zeros((1, size, size, 3)), noise)["params"]

    # An autoencoder to go on from: its weights are checked against the network of this config.
    start = folders.read_params(folder_of(config.init), "vae", jax.eval_shape(random)) if config.init else {}

    def preview(ema, path):
        restored = decode_mean(ema, encode(ema, to_float(shown)))
        half = len(shown) // 2
        again = np.asarray(to_uint8(restored))
        save_grid([shown[:half], again[:half], shown[half:], again[half:]], path)
        return {"held_out_absolute_error": float(jnp.mean(jnp.abs(restored - to_float(shown))))}

    def finish(ema, seconds):
        images = np.stack([held_out[i]["image"] for i in range(len(held_out))])
        moments = jnp.concatenate([encode(ema, to_float(part)) for part in np.array_split(images, 8)])
        restored = [np.asarray(to_uint8(decode_mean(ema, part))) for part in jnp.array_split(moments, 8)]
        mean = jnp.split(moments, 2, axis=-1)[0]
        exported = vae_config | {
            "_class_name": "AutoencoderKL",
            "scaling_factor": round(1.0 / float(jnp.std(mean)), 5),
            "block_out_channels": list(config.vae.block_out_channels),
            "down_block_types": ["DownEncoderBlock2D"] * len(config.vae.block_out_channels),
            "up_block_types": ["UpDecoderBlock2D"] * len(config.vae.block_out_channels),
            "in_channels": 3,
            "out_channels": 3,
            "act_fn": "silu",
        }
        with folders.new_folder(workdir / "export", overwrite=True) as folder:
            folders.write_component(folder, "vae", exported, ema)
        figures = {
            "verifier": verifier.score(np.concatenate(restored), captions),
            "scaling_factor": exported["scaling_factor"],
            "seconds": seconds,
        }
        (workdir / "report.json").write_text(json.dumps(figures, indent=1) + "\n")
        print(
            f"autoencoder in {workdir / 'export' / 'vae'}; the verifier accepts {figures['verifier']['overall']:.1%} "
            f"of held-out pictures after encoding and decoding"
        )

    return Job(
        title="autoencoder",
        init=lambda: start or random(),
        frozen={},
        draw=partial(autoencoder.draw, downscale=downscale, channels=channels),
        loss=partial(
            autoencoder.loss,
            networks=autoencoder.Networks(apply("encode"), apply("decode")),
            kl_weight=config.objective.kl_weight,
        ),
        example={"image": jax.ShapeDtypeStruct((config.train.batch_size, size, size, 3), jnp.uint8)},
        batches=lambda step: make_batches(config, workdir, dataset, step),
        preview=preview,
        finish=finish,
        origin={"init": digest(start)} if start else {},
    )
