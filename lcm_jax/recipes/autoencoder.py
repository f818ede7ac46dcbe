"""A KL autoencoder, from scratch or from another one."""

import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax import files
from lcm_jax.compiler import compiler_options
from lcm_jax.data.batches import image_batches
from lcm_jax.data.sources import load_dataset
from lcm_jax.diffusion.pixels import to_float, to_uint8
from lcm_jax.evaluation import verifier
from lcm_jax.models.layers import apply
from lcm_jax.models.vae import AutoencoderKL
from lcm_jax.objectives.autoencoder import Autoencoder, Networks
from lcm_jax.ranges import from_settings
from lcm_jax.recipes.curve import finish_previews
from lcm_jax.recipes.distillation import largest_size
from lcm_jax.recipes.models import OpenModel
from lcm_jax.sampling.preview import save_grid
from lcm_jax.training.loop import TrainTask
from lcm_jax.training.state import Params
from lcm_jax.weights import diffusers_folder as folders
from lcm_jax.weights.model import StoredModel, compute_digests, open_model, read_params

CHUNK = 64  # images encoded and decoded at once


def open_autoencoder(name: str, open_model: OpenModel) -> StoredModel:
    """Open the autoencoder of a model, or of a folder with vae/ alone, such as the export of a run of this recipe."""
    alone = Path(name) / "vae"
    return open_model(str(alone) if alone.is_dir() and not (Path(name) / "model_index.json").is_file() else name)


def autoencoder_task(config, workdir: Path, open_model: OpenModel = open_model) -> TrainTask:
    """Train an autoencoder from scratch, or from the one that `config.init` names. Raises ValueError."""
    objective = from_settings(Autoencoder, "objective", config.objective.to_dict())
    if config.data.encode != "step":
        raise ValueError(f"data.encode {config.data.encode!r} is not supported for an autoencoder; use step")
    vae_config = config.vae.to_dict() | {"sample_size": config.data.size, "scaling_factor": 1.0}
    vae = AutoencoderKL.from_config(vae_config, jnp.dtype(config.train.dtype))
    size, count = config.data.size, config.train.batch_size
    downscale, channels = 2 ** (len(config.vae.block_out_channels) - 1), config.vae.latent_channels
    largest = largest_size(config.data, downscale)
    side = size // downscale

    def latents(batch) -> jax.ShapeDtypeStruct:
        count, height, width, _ = batch["image"].shape
        return jax.ShapeDtypeStruct((count, height // downscale, width // downscale, channels), jnp.float32)

    encode = lambda params, images: apply(vae, params, images, method="encode")  # noqa: E731
    decode = lambda params, z: apply(vae, params, z, method="decode")  # noqa: E731

    @jax.jit
    def init():
        image, noise = jnp.zeros((1, size, size, 3)), jnp.zeros((1, side, side, channels))
        return vae.init(jax.random.key(config.train.seed), image, noise)["params"]

    @partial(jax.jit, compiler_options=compiler_options())
    def restore(params, images):
        """Return (float32[B, H, W, 3] after encoding and decoding, latents)."""
        mean = jnp.split(encode(params, to_float(images)), 2, axis=-1)[0]
        return decode(params, mean), mean

    abstract = jax.eval_shape(init)
    start = open_autoencoder(config.init, open_model) if config.init else None

    @cache
    def dataset():
        return load_dataset(config, workdir)

    def held_out(first: int, last: int) -> np.ndarray:
        return np.stack([dataset().held_out[i]["image"] for i in range(first, last)])

    def write_preview(ema: Params, frozen: Params, path: Path) -> dict[str, float]:
        images = held_out(0, config.sample.images)
        restored, half = restore(ema, images)[0], len(images) // 2
        pixels = np.asarray(to_uint8(restored))
        save_grid([images[:half], pixels[:half], images[half:], pixels[half:]], path)
        return {"held_out_absolute_error": float(jnp.mean(jnp.abs(restored - to_float(images))))}

    def on_complete(ema: Params, frozen: Params, seconds: float) -> None:
        starts = range(0, config.data.held_out, CHUNK)
        pairs = [restore(ema, held_out(first, min(first + CHUNK, config.data.held_out))) for first in starts]
        exported = export_config(vae_config, round(1.0 / float(np.std(np.concatenate([mean for _, mean in pairs]))), 5))
        with folders.new_folder(workdir / "export", overwrite=True) as folder:
            folders.write_component(folder, "vae", exported, ema)
        figures: dict[str, Any] = {"scaling_factor": exported["scaling_factor"], "seconds": seconds}
        summary = f"autoencoder in {workdir / 'export' / 'vae'}"
        if config.data.source == "shapes":  # whose captions the verifier can judge
            captions = [record["caption"] for record in dataset().held_out]
            figures["verifier"] = verifier.score(
                np.concatenate([to_uint8(restored) for restored, _ in pairs]), captions
            )
            overall = figures["verifier"]["overall"]
            summary += f"; the verifier accepts {overall:.1%} of held-out images after encoding and decoding"
        files.write_text(workdir / "report.json", json.dumps(figures, indent=1) + "\n")
        print(summary)
        finish_previews(config, workdir)

    return TrainTask(
        title="autoencoder",
        objective=objective,
        bind=lambda params, target, frozen: Networks(partial(encode, params), partial(decode, params)),
        prepare=lambda params, frozen, batch, draws: to_float(batch["image"]),
        params=abstract,
        frozen={},
        load_params=init if start is None else lambda: read_params(start, "vae", abstract),
        load_frozen=dict,
        latents=latents,
        batch={"image": jax.ShapeDtypeStruct((count, *largest, 3), jnp.uint8)},
        make_batches=lambda first: image_batches(config, dataset(), None, first),
        write_preview=write_preview,
        on_complete=on_complete,
        weight_digests=lambda: {} if start is None else {"init": compute_digests(start)["vae"]},
        figures={"held_out_absolute_error": True},
        data=lambda: {"images": str(len(dataset().train)), "digest": dataset().fingerprint},
        skipped=lambda: dataset().skipped(),
    )


def export_config(vae_config: dict[str, Any], scaling_factor: float) -> dict[str, Any]:
    """Return the config.json of an autoencoder in diffusers layout."""
    widths = list(vae_config["block_out_channels"])
    return vae_config | {
        "_class_name": "AutoencoderKL",
        "scaling_factor": scaling_factor,
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "in_channels": 3,
        "out_channels": 3,
        "act_fn": "silu",
    }
