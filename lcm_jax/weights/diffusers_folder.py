"""Read and write the diffusers folder layout: a subfolder per component, safetensors, whole or sharded."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lcm_jax import files
from lcm_jax.weights import pickles
from lcm_jax.weights.errors import ModelError, plural, write_error
from lcm_jax.weights.layout import (
    CLASSES,
    FILES,
    LORA_FILE,
    NETWORKS,
    SECOND,
    choose_variant,
    is_component,
    read_json,
    shown,
    weight_file,
)
from lcm_jax.weights.preset import FILE as PRESET_FILE
from lcm_jax.weights.preset import Preset
from lcm_jax.weights.stored import Advance, Tensors, get_specs, map_safetensors, total_bytes, widen, write_safetensors
from lcm_jax.weights.trees import Params, from_params, to_params

POINTER = b"version https://git-lfs"  # begins the file that git leaves for a large file that it did not fetch


# ---- reading --------------------------------------------------------------------------------------------------------


def open_file(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Return (tensors, metadata) of a safetensors file or of one by torch.save; only the names are read.

    The content decides, not the ending: people rename files. float8 is read as float16, in which each of its
    numbers is exact. Raises ModelError.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(POINTER))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: the model is incomplete, copy it again") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}): copy it again") from None
    if start == POINTER:
        raise ModelError(f"{path} is a pointer of Git LFS, not the weights: run `git lfs pull` in its repository")
    # The first eight bytes of safetensors are a length and may be any, behind them is a JSON object.
    if start[8:9] != b"{" and start.startswith(pickles.STARTS):
        tensors = pickles.read_pickle(path)
        return widen(Tensors(tensors, tensors.__getitem__), path), {}
    tensors, metadata = map_safetensors(path)
    return widen(tensors, path), metadata


def open_tensors(folder: Path, stem: str, variant: str | None = None) -> Tensors:
    """Return the tensors of `folder`/`stem`[.variant].safetensors or of its shards, else of the .bin files.

    By PyTorch's names, as stored. Each is read when it is used, and the files must stay as they are.

    bfloat16 is ml_dtypes.bfloat16. Raises ModelError on a file that is missing, truncated or of another kind.
    """
    names = [path.name for path in sorted(folder.glob("*")) if path.is_file()]
    chosen = weight_file(names, stem, variant)
    if chosen is None:
        whole = folder / f"{stem}{f'.{variant}' if variant else ''}.safetensors"
        raise ModelError(
            f"{whole} is missing (the folder contains {', '.join(names) or 'nothing'}); use the variant of a file that "
            "is there, such as fp16; only safetensors and .bin are read"
        )
    if not chosen.endswith(".json"):
        return open_file(folder / chosen)[0]
    index = folder / chosen
    if not (placed := read_json(index)["weight_map"]):
        raise ModelError(f"{index} names no tensors in its weight_map: copy the model again")
    where: dict[str, Tensors] = {}
    for name in sorted(set(placed.values())):
        if Path(name).name != name or "\0" in name:
            raise ModelError(f"{index} names a shard outside its folder: {shown(name)}")
        if name not in names:
            raise ModelError(f"{index} names the shard {shown(name)}, which is missing: copy the model again")
        shard, _ = open_file(folder / name)
        where |= dict.fromkeys(shard, shard)
    if missing := sorted(placed.keys() - where.keys()):
        count = plural(len(missing), "tensor")
        raise ModelError(f"{index} promises {count} that its shards lack: {shown(', '.join(missing[:5]))}")
    return Tensors({key: shard.specs[key] for key, shard in where.items()}, lambda key: where[key][key])


def read_tensors(folder: Path, stem: str, variant: str | None = None) -> dict[str, np.ndarray]:
    """Return the tensors of `open_tensors`, all in memory."""
    return {key: np.array(tensor) for key, tensor in open_tensors(folder, stem, variant).items()}


def open_component(folder: Path, name: str, variant: str | None = None) -> tuple[dict[str, Any], Tensors]:
    """Return (config.json, tensors by PyTorch name) of one network; name: unet, vae or text_encoder.

    variant: of its weights, unless only other networks of the folder have files of it, as in diffusers.
    """
    part = folder / name
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder}; use one that has a {name}/ folder")
    if not part.is_dir():
        raise ModelError(f"{folder} has no {name}/ folder: the model is incomplete, copy it again")
    names = {other: [path.name for path in (folder / other).glob("*")] for other in NETWORKS}
    return read_json(part / "config.json"), open_tensors(part, FILES[name], choose_variant(names, name, variant))


def read_component(folder: Path, name: str, variant: str | None = None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return what `open_component` does, with all tensors in memory."""
    config, tensors = open_component(folder, name, variant)
    return config, {key: np.array(tensor) for key, tensor in tensors.items()}


def read_params(folder: Path, name: str, abstract: Params) -> Params:
    """Read the parameters of one network in float32, a tree shaped like `abstract`; see `to_params`."""
    tree = to_params(name, read_component(folder, name)[1], abstract, str(folder))
    params: dict[tuple[str, ...], Any] = flatten_dict(tree)
    return unflatten_dict({path: leaf.astype(np.float32) for path, leaf in params.items()})


# ---- writing --------------------------------------------------------------------------------------------------------


def check_target(target: Path, overwrite: bool) -> None:
    """Raise ModelError if `target`, a folder to write, has content that must not be replaced."""
    if target.exists() and not target.is_dir():
        raise ModelError(f"{target} is a file; use a folder")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise ModelError(f"{target} exists already; use another folder, or pass --overwrite (overwrite=True)")
        marks = ("model_index.json", "configs.json", LORA_FILE, *NETWORKS)
        if not any((target / part).exists() for part in marks) and not is_component(target):
            raise ModelError(f"{target} is not a model folder and was not overwritten; use another folder")


@contextmanager
def new_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder to write a model to; it replaces `target` when the block ends without an error.

    Raises ModelError if `target` has content, unless `overwrite` is True and it is a model, and if writing fails, on a
    full disk say. What was there is then untouched.
    """
    target = Path(target).resolve()  # a link to a folder stays a link
    check_target(target, overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with files.whole_folder(target) as temporary:
            yield temporary
    except OSError as error:
        raise write_error(target, error) from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_component(
    folder: Path,
    name: str,
    config: Mapping[str, Any],
    params: Params,
    dtype: str | None = None,
    variant: str | None = None,
    max_shard_bytes: int = 10 * 2**30,
) -> None:
    """Write `folder`/`name`/ with config.json and safetensors; sharded, with an index, above `max_shard_bytes`."""
    write_tensors(folder, name, config, from_params(params, dtype), variant, max_shard_bytes)


def write_tensors(
    folder: Path,
    name: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    variant: str | None = None,
    max_shard_bytes: int = 10 * 2**30,
    advance: Advance = lambda _: None,
) -> None:
    """Write a component as `write_component` does, from tensors by PyTorch name, each read when its turn comes."""
    part = folder / name
    part.mkdir(parents=True)
    write_network(part, FILES[name], config, tensors, variant, max_shard_bytes, advance)


def write_network(
    part: Path,
    name: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    variant: str | None = None,
    max_shard_bytes: int = 10 * 2**30,
    advance: Advance = lambda _: None,
) -> None:
    """Write config.json and safetensors of one network to the empty folder `part`. name: of the file, as in FILES."""
    write_json(part / "config.json", config)
    specs = get_specs(tensors)
    stem = name + (f".{variant}" if variant else "")
    shards: list[dict[str, np.ndarray]] = [{}]
    for key in sorted(specs):
        if shards[-1] and total_bytes(shards[-1]) + specs[key].nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][key] = specs[key]
    if len(shards) == 1:
        write_safetensors(part / f"{stem}.safetensors", tensors, advance=advance)
        return
    placed = {}
    for i, shard in enumerate(shards, 1):
        tail = f"-{i:05d}-of-{len(shards):05d}"
        file = f"{name}.{variant}{tail}.safetensors" if variant else f"{stem}{tail}.safetensors"
        write_safetensors(part / file, Tensors(shard, tensors.__getitem__), advance=advance)
        placed |= dict.fromkeys(shard, file)
    index = f"{name}.safetensors.index.{variant}.json" if variant else f"{stem}.safetensors.index.json"
    write_json(part / index, {"metadata": {"total_size": total_bytes(specs)}, "weight_map": placed})


def write_pipeline(
    folder: Path,
    configs: Mapping[str, Mapping[str, Any]],
    params: Mapping[str, Params],
    tokenizer: Path,
    scheduler: Mapping[str, Any],
    index: Mapping[str, Any] | None = None,
    preset: Preset | None = None,
    **save_options: Any,
) -> None:
    """Write all of a text-to-image pipeline to the empty `folder`.

    configs, params: by network (unet, vae, text_encoder, text_encoder_2). tokenizer: a folder to copy, with the folder
    `tokenizer_2` beside it if there are two text encoders. scheduler: its config.
    index: the model_index.json to keep but for components that are not written (a safety checker), which become null;
    otherwise one is made: a StableDiffusionXLPipeline if there are two text encoders, else a
    LatentConsistencyModelPipeline if the scheduler is LCMScheduler, else a StableDiffusionPipeline.
    preset: written to preset.json if there is one.
    save_options: dtype, variant, max_shard_bytes of `write_component`.
    """
    for name in params:
        write_component(folder, name, configs[name], params[name], **save_options)
    write_surroundings(folder, configs, tokenizer, scheduler, index, preset, xl="text_encoder_2" in params)


def write_surroundings(
    folder: Path,
    configs: Mapping[str, Mapping[str, Any]],
    tokenizer: Path,
    scheduler: Mapping[str, Any],
    index: Mapping[str, Any] | None,
    preset: Preset | None,
    xl: bool,
) -> None:
    """Write all of a pipeline but the networks. xl: there are two text encoders."""
    shutil.copytree(tokenizer, folder / "tokenizer")
    if xl:
        shutil.copytree(tokenizer.with_name("tokenizer_2"), folder / "tokenizer_2")
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    if preset is not None:
        write_json(folder / PRESET_FILE, preset.to_json())
    written = {*CLASSES, "scheduler"}
    if index is not None:
        kept = {k: [None, None] if isinstance(v, list) and k not in written else v for k, v in index.items()}
        write_json(folder / "model_index.json", kept | ({} if xl else {"requires_safety_checker": False}))
        return
    unet = configs.get("unet", {})
    guided = unet.get("time_cond_proj_dim") is not None  # without it, LatentConsistencyModelPipeline fails
    lcm = guided and scheduler["_class_name"] == "LCMScheduler"
    kind = "LatentConsistencyModelPipeline" if lcm else "StableDiffusionPipeline"
    kind = "StableDiffusionXLPipeline" if xl else kind
    if unet.get("in_channels", 4) != unet.get("out_channels", 4):  # LCMs that inpaint have no class of their own
        kind = "StableDiffusionXLInpaintPipeline" if xl else "StableDiffusionInpaintPipeline"
    made: dict[str, Any] = {"_class_name": kind, "_diffusers_version": "0.42.0"}
    for name, (library, classes) in CLASSES.items():
        if xl or name not in SECOND:
            made[name] = [library, configs.get(name, {}).get("_class_name", classes[0])]
    made |= {"scheduler": ["diffusers", scheduler["_class_name"]]}
    made |= {"feature_extractor": [None, None], "image_encoder": [None, None]}
    if xl:
        made["force_zeros_for_empty_prompt"] = configs.get("model_index", {}).get("force_zeros_for_empty_prompt", True)
    else:
        made |= {"safety_checker": [None, None], "requires_safety_checker": False}
    write_json(folder / "model_index.json", made)
