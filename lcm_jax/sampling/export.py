"""A sampling program as files that run without this package: StableHLO, its parameters, tokenizers and run.py."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lcm_jax.diffusion.samplers.table import Table
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.sampling import standalone
from lcm_jax.sampling.generate import generate
from lcm_jax.sampling.inputs import Inputs, draw_noise, make_time_ids
from lcm_jax.weights import diffusers_folder as folders
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.stored import write_safetensors

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
DESCRIPTION, PARAMETERS, TABLE, NOISE, IMAGES = (
    "export.json",
    "parameters.safetensors",
    "table.safetensors",
    "noise.stablehlo",
    "images.stablehlo",
)
FORMAT = 1


def flat_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leaves of a tree of parameters by their path, joined by dots."""
    return flatten_dict(params, sep=".")


def image_program(
    model: StableDiffusion, sampler: str, size: tuple[int, int], guided: bool, tile: int | None
) -> Callable[..., tuple[jax.Array, list]]:
    """Return program(params, table, token_ids, negative_ids, latents, keys, guidance_scale) -> (images, finite).

    params: by `flat_params`. table: the fields of a Table by name. keys: uint32[B, n], the data of the noise's keys.
    negative_ids are not used unless `guided` is True. finite: a bool[] of each stage of `Finite` that runs. The rest is
    as in `Inputs` and `generate`.
    """
    make_images = partial(generate, model, sampler=sampler, tile=tile)

    def program(params, table, token_ids, negative_ids, latents, keys, guidance_scale):
        time_ids = None if model.text_encoder_2 is None else make_time_ids(len(token_ids), size)
        inputs = Inputs(
            token_ids,
            negative_ids if guided else None,
            latents,
            jax.random.wrap_key_data(keys),
            guidance_scale,
            time_ids,
        )
        images, finite = make_images(unflatten_dict(params, sep="."), inputs, table=Table(**table))
        return images, [flag for flag in finite if flag is not None]

    return program


def noise_program(shape: tuple[int, int, int]) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Return program(seed int32[], numbers uint32[B]) -> (latents, keys) of `draw_noise`, keys as uint32[B, n]."""

    def program(seed, numbers):
        latents, keys = draw_noise(seed, numbers, shape)
        return latents, jax.random.key_data(keys)

    return program


def describe_programs(
    noise: jax.export.Exported, images: jax.export.Exported, parameters: int, guided: bool
) -> dict[str, Any]:
    """Return the inputs and outputs of both programs by file, for readers. parameters: their number."""
    batch, ids = noise.in_avals[1].shape[0], str(images.in_avals[parameters + len(Table._fields)])
    latents, keys = map(str, noise.out_avals)
    return {
        NOISE: {
            "inputs": {"seed": "int32[]", "numbers": f"uint32[{batch}], of the images, from 0"},
            "outputs": {"latents": latents, "keys": keys},
        },
        IMAGES: {
            "inputs": {
                "params": f"{parameters} arrays by name, those of {PARAMETERS}",
                "table": f"{len(Table._fields)} arrays by name, those of {TABLE}",
                "token_ids": ids,
                "negative_ids": f"{ids}, {'of the negative prompts' if guided else 'not used'}",
                "latents": latents,
                "keys": keys,
                "guidance_scale": "float32[]",
            },
            "outputs": {"images": str(images.out_avals[0]), "finite": "a list of bool[], False for NaN"},
        },
    }


def write_export(
    target: Path,
    model: StableDiffusion,
    params: Mapping[str, Any],
    tokenizers: Sequence[Any],
    table: Table,
    sampler: str,
    *,
    batch_size: int,
    size: tuple[int, int],
    guidance_scale: float,
    guided: bool,
    tile: int | None,
    platforms: Sequence[str],
) -> None:
    """Write the folder `target`, whole or not at all, and never over another.

    params: by network, in the dtypes that are written. tokenizers: of transformers, one for each text encoder. table:
    of `sampler_table`. guided: the program takes a second pass for negative prompts. platforms: that the program is
    lowered for, of PLATFORMS. Raises ModelError if `target` exists, and ValueError for a platform that is not
    supported.
    """
    if target.exists():
        raise ModelError(f"{target} exists already; use another folder")
    if other := [platform for platform in platforms if platform not in PLATFORMS]:
        raise ValueError(f"platforms has {other[0]!r}; use {', '.join(PLATFORMS)}")
    shape = (size[0] // model.downscale, size[1] // model.downscale, model.vae.config["latent_channels"])
    abstract = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)  # noqa: E731
    like = lambda dtype, *dims: jax.ShapeDtypeStruct(dims, dtype)  # noqa: E731
    length = tokenizers[0].model_max_length
    ids = like(jnp.int32, batch_size, *((2, length) if len(tokenizers) > 1 else (length,)))
    flat, fields = flat_params(params), {name: np.asarray(value) for name, value in table._asdict().items()}
    # Attention has a kernel that every platform has if it is traced for the host.
    with jax.default_device("cpu"):
        export = lambda program: jax.export.export(jax.jit(program), platforms=tuple(platforms))  # noqa: E731
        noise = export(noise_program(shape))(like(jnp.int32), like(jnp.uint32, batch_size))
        images = export(image_program(model, sampler, size, guided, tile))(
            abstract(flat),
            abstract(fields),
            ids,
            ids,
            *(jax.ShapeDtypeStruct(each.shape, each.dtype) for each in noise.out_avals),
            like(jnp.float32),
        )
    description = {
        "format": FORMAT,
        "jax": jax.__version__,
        "platforms": list(platforms),
        "batch_size": batch_size,
        "height": size[0],
        "width": size[1],
        "num_inference_steps": int(np.sum(table.timesteps >= 0)),
        "sampler": sampler,
        "guidance_scale": guidance_scale,
        "negative_prompt": guided,
        "tokenizers": [
            {"file": f"tokenizer{'_2' * i}.json", "length": length, "pad": each.pad_token_id}
            for i, each in enumerate(tokenizers)
        ],
        "programs": describe_programs(noise, images, len(flat), guided),
    }
    with folders.new_folder(target) as folder:
        (folder / NOISE).write_bytes(noise.serialize())
        (folder / IMAGES).write_bytes(images.serialize())
        write_safetensors(folder / PARAMETERS, {key: np.asarray(leaf) for key, leaf in flat.items()})
        write_safetensors(folder / TABLE, fields)
        for entry, tokenizer in zip(description["tokenizers"], tokenizers, strict=True):
            tokenizer.backend_tokenizer.save(str(folder / entry["file"]))
        folders.write_json(folder / DESCRIPTION, description)
        shutil.copyfile(standalone.__file__, folder / "run.py")
