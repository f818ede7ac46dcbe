"""Write random models of full size as diffusers folders, which both sides read.

    python -m lcm_jax.benchmarks.random_model MODEL DTYPE FOLDER [student] [teacher] [tiny_vae]

It is a process of its own, so that the device stays free: run it with JAX_PLATFORMS=cpu.
"""

import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from lcm_jax.benchmarks import cases
from lcm_jax.data import tokenizer as tokenizers
from lcm_jax.models.families import FAMILIES, TAESD
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.weights import diffusers_folder as folders
from lcm_jax.weights import layout, naming
from lcm_jax.weights.model import open_model
from lcm_jax.weights.stored import Tensors, placeholder
from lcm_jax.weights.trees import from_params

Configs = Mapping[str, Mapping[str, Any]]


def random_tensors(configs: Configs, dtype: str) -> dict[str, Tensors]:
    """Return the tensors of every network, drawn when they are read: weights of unit gain in `dtype`.

    A pool of random numbers is repeated, since a billion distinct ones would take longer than the benchmark.
    """
    pool = np.random.default_rng(0).standard_normal(2**22, np.float32)
    scaled = cache(lambda fan_in: (pool * fan_in**-0.5).astype(jnp.dtype(dtype)))

    def open_random(params) -> Tensors:
        paths = {naming.to_key(path): path for path in flatten_dict(params)}
        specs = {key: placeholder(jnp.dtype(dtype), spec.shape) for key, spec in from_params(params).specs.items()}

        def draw(key: str) -> np.ndarray:
            shape, name = specs[key].shape, paths[key][-1]
            if name in ("scale", "bias"):
                return np.full(shape, name == "scale", jnp.dtype(dtype))
            return np.resize(scaled(specs[key].size // shape[0] if name == "kernel" else 1), shape)

        return Tensors(specs, draw)

    abstract = StableDiffusion.from_configs(configs).abstract_params()
    return {name: open_random(params) for name, params in abstract.items()}


def write_model(configs: Configs, dtype: str, folder: Path) -> None:
    """Write a random model to the new folder `folder`; its tokenizer knows the prompt of the benchmark."""
    folder.mkdir(parents=True)
    tokenizer, xl = folder.parent / "tokenizer", "text_encoder_2" in configs
    for name in ("tokenizer", "tokenizer_2")[: 1 + xl]:
        if not (folder.parent / name).exists():
            tokenizers.build(cases.PROMPT.split(), folder.parent / name, model_max_length=77)
    for name, tensors in random_tensors(configs, dtype).items():
        folders.write_tensors(folder, name, configs[name], tensors)
    folders.write_surroundings(folder, configs, tokenizer, configs["scheduler"], None, None, xl)


def write_tiny_vae(configs: Configs, dtype: str, folder: Path) -> None:
    """Write a random autoencoder like TAESD, with the latents of the model of these configs, to the folder `folder`."""
    vae = configs["vae"]
    levels = len(vae["block_out_channels"])
    tiny = TAESD | {
        "latent_channels": vae.get("latent_channels", 4),
        "encoder_block_out_channels": [64] * levels,
        "decoder_block_out_channels": [64] * levels,
        "num_encoder_blocks": [1, *[3] * (levels - 1)],
        "num_decoder_blocks": [*[3] * (levels - 1), 1],
    }
    folder.mkdir(parents=True)
    tensors = random_tensors({**configs, "vae": tiny}, dtype)["vae"]
    folders.write_network(folder, layout.FILES["vae"], tiny, tensors)


def main(model: str, dtype: str, folder: Path, parts: list[str]) -> None:
    for part in parts:
        if part == "tiny_vae":
            configs = FAMILIES[model] if model in cases.RANDOM else open_model(model).configs
            write_tiny_vae(configs, dtype, folder / part)
        else:
            student, teacher = cases.RANDOM[model]
            write_model(FAMILIES[student if part == "student" else teacher], dtype, folder / part)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
