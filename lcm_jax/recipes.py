"""From a config to what the training loop runs: weights, networks, data, previews and what is left behind at the end.

Each function builds the Job of one objective; `RECIPES` is the table of their names.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from lcm_jax.data import loader, shapes
from lcm_jax.models.vae import AutoencoderKL
from lcm_jax.objectives import autoencoder
from lcm_jax.training.loop import Job


def to_uint8(images) -> np.ndarray:
    """float[..., 3] in -1..1 -> uint8."""
    return np.asarray(jnp.clip(jnp.round((images + 1.0) * 127.5), 0, 255).astype(jnp.uint8))


def save_grid(rows: list[np.ndarray], path: Path) -> None:
    """Writes a PNG of rows of equally sized pictures, each uint8[n, H, W, 3]."""
    picture = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    Image.fromarray(picture).save(path)


class Pictures:
    """The pictures of a source without their captions, for the autoencoder."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        return {"image": self.source[i]["image"]}


def autoencoder_job(config, workdir: Path) -> Job:
    vae_config = config.vae.to_dict() | {"sample_size": config.data.size}
    vae = AutoencoderKL.from_config(vae_config, dtype=jnp.dtype(config.train.dtype))
    downscale, channels = 2 ** (len(config.vae.block_out_channels) - 1), config.vae.latent_channels
    size = config.data.size
    source = Pictures(shapes.Shapes("train", config.data.length, size))
    held = shapes.Shapes("test", 512, size)
    shown = np.stack([held[i]["image"] for i in range(config.sample.pictures)])
    apply = lambda method: lambda params, x: vae.apply({"params": params}, x, method=method)  # noqa: E731
    reconstruct = jax.jit(lambda params, x: vae.apply({"params": params}, jnp.split(vae.apply({"params": params}, x, method="encode"), 2, -1)[0], method="decode"))

    def init():
        image = jnp.zeros((1, size, size, 3))
        noise = jnp.zeros((1, size // downscale, size // downscale, channels))
        return vae.init(jax.random.key(config.train.seed), image, noise)["params"]

    def preview(ema, path):
        pictures = jnp.asarray(shown, jnp.float32) / 127.5 - 1
        again = reconstruct(ema, pictures)
        half = len(shown) // 2
        restored = to_uint8(again)
        save_grid([shown[:half], restored[:half], shown[half:], restored[half:]], path)
        return {"held_out_absolute_error": float(jnp.mean(jnp.abs(again - pictures)))}

    def finish(ema, seconds):
        import safetensors.numpy
        from flax.traverse_util import flatten_dict
        safetensors.numpy.save_file({"/".join(k): np.asarray(v) for k, v in flatten_dict(ema).items()}, workdir / "vae_tmp.safetensors")

    return Job(
        title="autoencoder",
        init=init,
        frozen={},
        draw=partial(autoencoder.draw, downscale=downscale, channels=channels),
        loss=partial(
            autoencoder.loss,
            networks=autoencoder.Networks(apply("encode"), apply("decode")),
            kl_weight=config.objective.kl_weight,
        ),
        batches=lambda step: loader.batches(source, config.train.batch_size, seed=config.train.seed, first=step),
        preview=preview,
        finish=finish,
    )


RECIPES: Mapping[str, Callable] = {"autoencoder": autoencoder_job}
