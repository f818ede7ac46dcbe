"""The diffusers folder layout: model_index.json, a subfolder per component, safetensors, whole or sharded."""

import difflib
import json
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lcm_jax.weights import hub, naming, pickles
from lcm_jax.weights.errors import ModelError, plural, unwritten
from lcm_jax.weights.stored import (
    Advance,
    Tensors,
    map_safetensors,
    narrow,
    outline_of,
    size_of,
    write_safetensors,
)

DTYPES = ("float32", "bfloat16", "float16")
ASSETS = Path(__file__).resolve().parent.parent / "assets"
SHIPPED = ("shapes", "shapes-lcm")
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
FILES = {
    "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model",
    "text_encoder_2": "model",
}  # fmt: skip
PICKLED = {"model": "pytorch_model"}  # transformers' name of a .bin file
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
# By component: the library, and the classes that are supported, first the usual one. The last two belong to SDXL.
CLASSES = {
    "unet": ("diffusers", ("UNet2DConditionModel",)),
    "vae": ("diffusers", ("AutoencoderKL", "AutoencoderTiny")),
    "text_encoder": ("transformers", ("CLIPTextModel",)),
    "tokenizer": ("transformers", ("CLIPTokenizer",)),
    "text_encoder_2": ("transformers", ("CLIPTextModelWithProjection",)),
    "tokenizer_2": ("transformers", ("CLIPTokenizer",)),
}
SECOND = ("text_encoder_2", "tokenizer_2")
# The attention of the autoencoder had other names when Stable Diffusion 1.x was published.
OLD_VAE_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

Params = dict[str, Any]


def locate(model: str | Path, variant: str | None = None, alone: bool = False) -> Path:
    """The folder of a model: a path, one of the names that are shipped (`shapes`, `shapes-lcm`), or a hub id.

    variant: of the weight files that are fetched from the hub. alone: the folder of one network will do. Raises
    ModelError when there is no such model, or it has no model_index.json, with the command for what convert can read.
    """
    folder = ASSETS / str(model) if str(model) in SHIPPED else Path(model)
    if not folder.exists() and hub.ID.fullmatch(str(model)):
        folder = hub.download(str(model), partial(needed_files, str(model), variant=variant, alone=alone))
    if folder.is_file():
        raise to_convert(model, "a file")
    if not folder.is_dir():
        if str(model) in SHIPPED:
            raise ModelError(f"the shipped model {str(model)!r} is not at {folder}: install lcm_jax again")
        near = difflib.get_close_matches(str(model), SHIPPED, n=1, cutoff=0.5)
        names = ", ".join(SHIPPED)
        hint = f"did you mean {near[0]!r}?" if near else f"give a folder in diffusers layout, or one of {names}"
        raise ModelError(f"there is no model {str(model)!r}: {hint}")
    if (folder / "model_index.json").is_file() or alone and is_component(folder):
        return folder
    if "checkpoints" in (folder.name, folder.parent.name) or (folder / "checkpoints").is_dir():
        raise to_convert(model, "orbax checkpoints", based=False)
    if is_component(folder) and not (folder.parent / "model_index.json").is_file():
        raise to_convert(model, "one network")
    raise ModelError(f"{folder} has no model_index.json: give the top folder of a model in diffusers layout")


def to_convert(model: str | Path, what: str, based: bool = True) -> ModelError:
    """The error for what is a model, but no folder in diffusers layout. based: it lacks what a base gives."""
    base = " --base=BASE`, BASE being a folder of the same family" if based else "`"
    return ModelError(
        f"{model} is {what}, and a folder in diffusers layout is needed: make one with "
        f"`python -m lcm_jax.convert --input={model} --output=DIR --format=diffusers{base}"
    )


def is_component(folder: Path) -> bool:
    """Whether it is the folder of one network, as some are published: config.json beside its weights."""
    return (folder / "config.json").is_file() and any(
        path.suffix in (".safetensors", ".bin") for path in folder.iterdir()
    )


def needed_files(model: str, names: Collection[str], variant: str | None = None, alone: bool = False) -> list[str]:
    """Which of a model's files are read: configs, tokenizers and one kind of weights. Raises ModelError.

    alone: those of one network, which has them at the top, will do.
    """
    if "model_index.json" not in names:
        top = [name for name in names if "/" not in name]
        found = next(filter(None, (component_files(top, stem, variant) for stem in FILES.values())), [])
        if alone and "config.json" in found:
            return found
        if "config.json" in found:
            raise to_convert(model, "one network")
        raise ModelError(
            f"{model} is not in diffusers layout on the hub: download the file that you want, and give that"
        )
    folders = {name.partition("/")[0] for name in names}
    needed = [name for name in names if re.fullmatch(r"model_index\.json|(tokenizer(_2)?|scheduler)/[^/]+", name)]
    for part in NETWORKS:
        inside = [name.removeprefix(f"{part}/") for name in names if name.startswith(f"{part}/")]
        found = component_files(inside, FILES[part], variant)
        if not found and part in folders:
            raise ModelError(
                f"{model} has no weights of the {part}{f' in the variant {variant}' if variant else ''}: there are "
                f"{', '.join(inside)}"
            )
        needed += [f"{part}/{name}" for name in found]
    return needed


def component_files(names: Collection[str], stem: str, variant: str | None = None) -> list[str]:
    """Of a component's files its config and its weights, whole or sharded; nothing where it has no weights."""
    chosen = weight_file(names, stem, variant)
    if chosen is None:
        return []
    suffix = "safetensors" if ".safetensors" in chosen else "bin"
    whole = f"{chosen.split('.')[0]}{f'.{variant}' if variant else ''}.{suffix}"
    wanted = {whole, chosen, "config.json"} if chosen.endswith(".json") else {chosen, "config.json"}
    # Shards are named with the variant before or after their number.
    return [name for name in names if re.sub(r"-\d+-of-\d+", "", name) in wanted]


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: the model is incomplete, copy it again") from None
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error}): copy it again") from None


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json. Raises ModelError where a component is of a class that is not supported."""
    index = read_json(folder / "model_index.json")
    for name, (_, expected) in CLASSES.items():
        entry = index.get(name)
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
        if name in SECOND and not any(index.get(other, [None])[0] for other in SECOND):
            continue
        if str(found).removesuffix("Fast") not in expected:
            supported = " or ".join(expected)
            raise ModelError(f"{folder / 'model_index.json'}: {name} is {found!r}; only {supported} is supported")
    if other := sorted({"controlnet", "motion_adapter", "text_encoder_3"} & index.keys()):
        raise ModelError(f"{folder / 'model_index.json'}: {index.get('_class_name')} with {other[0]} is not supported")
    return index


def networks_of(index: Mapping[str, Any]) -> tuple[str, ...]:
    """The networks that a model_index.json names: text_encoder_2 is in some."""
    return tuple(name for name in NETWORKS if index.get(name, [None])[0])


# ---- reading --------------------------------------------------------------------------------------------------------


def weight_file(names: Collection[str], stem: str, variant: str | None = None) -> str | None:
    """Which of a component's files has its weights, or the index of its shards; None where there is none.

    safetensors before .bin. stem: of FILES; transformers' .bin files are called pytorch_model.
    """
    middle = f".{variant}" if variant else ""
    for name, kind in ((stem, "safetensors"), (PICKLED.get(stem, stem), "bin")):
        whole = f"{name}{middle}.{kind}"
        for found in (whole, f"{whole}.index.json", f"{name}.{kind}.index{middle}.json"):
            if found in names:
                return found
    return None


def open_file(path: Path) -> tuple[Tensors, dict[str, str]]:
    """(tensors, metadata) of a .safetensors file, or of torch's .bin, .ckpt and .pt; nothing is read but the names."""
    if path.suffix not in PICKLES:
        return map_safetensors(path)
    tensors = pickles.read_pickle(path)
    return Tensors(tensors, tensors.__getitem__), {}


def open_tensors(folder: Path, stem: str, variant: str | None = None) -> Tensors:
    """The tensors of `folder`/`stem`[.variant].safetensors or of its shards, or of the .bin files in their absence,
    under PyTorch's names, as stored. Each is read when it is asked for, and the files must stay as they are.

    bfloat16 comes as ml_dtypes.bfloat16. Raises ModelError on a file that is missing, truncated or of another kind.
    """
    names = [path.name for path in sorted(folder.glob("*")) if path.is_file()]
    chosen = weight_file(names, stem, variant)
    if chosen is None:
        whole = folder / f"{stem}{f'.{variant}' if variant else ''}.safetensors"
        raise ModelError(
            f"{whole} is missing (the folder holds {', '.join(names) or 'nothing'}): give the variant of a file that "
            "is there, such as fp16; only safetensors and .bin are read"
        )
    if not chosen.endswith(".json"):
        return open_file(folder / chosen)[0]
    index = folder / chosen
    placed = read_json(index)["weight_map"]
    where: dict[str, Tensors] = {}
    for name in sorted(set(placed.values())):
        if Path(name).name != name:
            raise ModelError(f"{index} names a shard outside its folder: {name!r}")
        shard, _ = open_file(folder / name)
        where |= dict.fromkeys(shard, shard)
    if missing := sorted(placed.keys() - where.keys()):
        count = plural(len(missing), "tensor")
        raise ModelError(f"{index} promises {count} that its shards lack: {', '.join(missing[:5])}")
    return Tensors({key: shard.outline[key] for key, shard in where.items()}, lambda key: where[key][key])


def read_tensors(folder: Path, stem: str, variant: str | None = None) -> dict[str, np.ndarray]:
    """`open_tensors`, all of them in memory."""
    return {key: np.array(tensor) for key, tensor in open_tensors(folder, stem, variant).items()}


def open_component(folder: Path, name: str, variant: str | None = None) -> tuple[dict[str, Any], Tensors]:
    """(config.json, tensors by PyTorch name) of one network; name: unet, vae or text_encoder."""
    part = folder / name
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder}: give one that has a {name}/ folder")
    if not part.is_dir():
        raise ModelError(f"{folder} has no {name}/ folder: the model is incomplete, copy it again")
    return read_json(part / "config.json"), open_tensors(part, FILES[name], variant)


def read_component(folder: Path, name: str, variant: str | None = None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """`open_component`, with all tensors in memory."""
    config, tensors = open_component(folder, name, variant)
    return config, {key: np.array(tensor) for key, tensor in tensors.items()}


def modern_key(name: str, key: str) -> str | None:
    """The present name of a published key, or None for what is no parameter."""
    if name.startswith("text_encoder"):
        if key.endswith("position_ids"):
            return None
        return key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}"
    if name == "vae" and (match := re.fullmatch(r"(.*mid_block\.attentions\.0)\.(\w+)\.(weight|bias)", key)):
        block, layer, leaf = match.groups()
        return f"{block}.{OLD_VAE_NAMES.get(layer, layer)}.{leaf}"
    return key


def to_params(name: str, tensors: Mapping[str, np.ndarray], abstract: Params, where: str = "") -> Params:
    """Tensors by PyTorch name -> a tree shaped like `abstract` (arrays or ShapeDtypeStructs), in the stored dtypes.

    Raises ModelError that lists every key that is missing, extra or of another shape.
    """
    wanted = {path: tuple(leaf.shape) for path, leaf in flatten_dict(abstract).items()}
    found: dict[tuple[str, ...], np.ndarray] = {}
    extra = []
    for key, tensor in tensors.items():
        modern = modern_key(name, key)
        if modern is None:
            continue
        path = naming.to_path(modern, tensor.ndim)
        if path in wanted and path not in found and tensor.dtype.name in DTYPES:
            found[path] = naming.to_array(path, tensor)
        else:
            extra.append(f"+ {key} {tensor.dtype.name}{list(tensor.shape)}")
    missing = [f"- {naming.to_key(path)}" for path in wanted if path not in found]
    shapes = [
        f"! {naming.to_key(path)}: {naming.tensor_shape(path, found[path].shape)} in the file, "
        f"{naming.tensor_shape(path, shape)} by the config"
        for path, shape in wanted.items()
        if path in found and found[path].shape != shape
    ]
    if problems := [*sorted(missing), *sorted(extra), *sorted(shapes)]:
        raise ModelError(
            f"{name}{f' of {where}' if where else ''}: weights and config.json disagree "
            f"({len(missing)} keys missing -, {len(extra)} extra +, {len(shapes)} of another shape !); "
            "use the config that belongs to these weights\n" + "\n".join(problems)
        )
    return unflatten_dict(found)


def all_params(
    tensors: Mapping[str, Mapping[str, np.ndarray]], abstract: Mapping[str, Params], where: str = ""
) -> dict[str, Params]:
    """`to_params` of every network of `tensors`; what is wrong in any of them is in one error."""
    params, problems = {}, []
    for name in tensors:
        try:
            params[name] = to_params(name, tensors[name], abstract[name], where)
        except ModelError as error:
            problems.append(str(error))
    if problems:
        raise ModelError("\n".join(problems))
    return params


# ---- writing --------------------------------------------------------------------------------------------------------


def from_params(params: Params, dtype: str | None = None) -> dict[str, np.ndarray]:
    """The inverse of `to_params`: tensors by PyTorch name, in their own dtype or cast to `dtype`.

    Raises ModelError for another dtype than float32, bfloat16, float16, or where a finite number overflows in it.
    """
    if dtype not in (None, *DTYPES):
        raise ModelError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    tensors = {
        naming.to_key(path): naming.to_tensor(path, np.asarray(leaf)) for path, leaf in flatten_dict(params).items()
    }
    return tensors if dtype is None else dict(narrow(tensors, dtype))


def check_target(target: Path, overwrite: bool) -> bool:
    """Whether there is a model at `target`, a folder to write. Raises ModelError where it is not to be replaced."""
    if target.exists() and not target.is_dir():
        raise ModelError(f"{target} is a file; give a folder")
    if filled := target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise ModelError(f"{target} exists already; choose another folder, or pass --overwrite (overwrite=True)")
        if not any((target / part).exists() for part in ("model_index.json", "configs.json", *NETWORKS)):
            raise ModelError(f"{target} holds something that is no model; it is not overwritten, choose another folder")
    return filled


@contextmanager
def new_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling to write into; it takes the place of `target` only when the block ends without an error.

    Raises ModelError when `target` exists with something in it, unless `overwrite` and it is a model; and when writing
    fails, on a full disk say. What was there is then untouched.
    """
    target = Path(target).resolve()  # a link to a folder stays a link
    filled = check_target(target, overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ModelError(f"{target} cannot be written ({error}); choose another folder") from None
    try:
        yield temporary
        temporary.chmod(0o755)
        for path in temporary.rglob("*"):  # safetensors writes files that only their owner can read
            path.chmod(0o755 if path.is_dir() else 0o644)
        if filled:
            aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.replace(target, aside)
            try:
                os.replace(temporary, target)
            except OSError:
                os.replace(aside, target)
                raise
            shutil.rmtree(aside)
        else:
            os.replace(temporary, target)
    except OSError as error:
        raise unwritten(target, error) from error
    finally:
        remove(temporary)


def remove(folder: Path) -> None:
    """Deletes a folder that may be gone already. orbax's threads may still write to it for a moment after an error.

    Warns where it cannot be deleted.
    """
    if not folder.exists():
        return
    for pause in (0.1, 0.5, 2.0):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(pause)
        if not folder.exists():
            return
    warnings.warn(f"{folder} is left over and could not be deleted; delete it yourself", stacklevel=2)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_component(
    folder: Path, name: str, config: Mapping[str, Any], params: Params,
    dtype: str | None = None, variant: str | None = None, max_shard_bytes: int = 10 * 2**30,
) -> None:  # fmt: skip
    """Writes `folder`/`name`/ with config.json and safetensors; sharded, with an index, above `max_shard_bytes`."""
    write_tensors(folder, name, config, from_params(params, dtype), variant, max_shard_bytes)


def write_tensors(
    folder: Path, name: str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray],
    variant: str | None = None, max_shard_bytes: int = 10 * 2**30, advance: Advance = lambda _: None,
) -> None:  # fmt: skip
    """`write_component` of tensors by PyTorch name, each of which is read when its turn comes."""
    part = folder / name
    part.mkdir(parents=True)
    write_json(part / "config.json", config)
    outline = outline_of(tensors)
    stem = FILES[name] + (f".{variant}" if variant else "")
    shards: list[dict[str, np.ndarray]] = [{}]
    for key in sorted(outline):
        if shards[-1] and size_of(shards[-1]) + outline[key].nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][key] = outline[key]
    if len(shards) == 1:
        write_safetensors(part / f"{stem}.safetensors", tensors, advance=advance)
        return
    placed = {}
    for i, shard in enumerate(shards, 1):
        tail = f"-{i:05d}-of-{len(shards):05d}"
        file = f"{FILES[name]}.{variant}{tail}.safetensors" if variant else f"{stem}{tail}.safetensors"
        write_safetensors(part / file, Tensors(shard, tensors.__getitem__), advance=advance)
        placed |= dict.fromkeys(shard, file)
    index = f"{FILES[name]}.safetensors.index.{variant}.json" if variant else f"{stem}.safetensors.index.json"
    write_json(part / index, {"metadata": {"total_size": size_of(outline)}, "weight_map": placed})


def write_pipeline(
    folder: Path, configs: Mapping[str, Mapping[str, Any]], params: Mapping[str, Params], tokenizer: Path,
    scheduler: Mapping[str, Any], index: Mapping[str, Any] | None = None, **how: Any,
) -> None:  # fmt: skip
    """Writes all of a text-to-image pipeline into the empty `folder`.

    configs, params: by network (unet, vae, text_encoder, text_encoder_2). tokenizer: a folder to copy, with the folder
    `tokenizer_2` beside it where there are two text encoders. scheduler: its config.
    index: the model_index.json to keep but for components that are not written (a safety checker), which become null;
    otherwise one is made: a StableDiffusionXLPipeline where there are two text encoders, else a
    LatentConsistencyModelPipeline where the scheduler is LCMScheduler, else a StableDiffusionPipeline.
    how: dtype, variant, max_shard_bytes of `write_component`.
    """
    for name in params:
        write_component(folder, name, configs[name], params[name], **how)
    write_surroundings(folder, configs, tokenizer, scheduler, index, xl="text_encoder_2" in params)


def write_surroundings(
    folder: Path, configs: Mapping[str, Mapping[str, Any]], tokenizer: Path, scheduler: Mapping[str, Any],
    index: Mapping[str, Any] | None, xl: bool,
) -> None:  # fmt: skip
    """All of `write_pipeline` but the networks. xl: there are two text encoders."""
    shutil.copytree(tokenizer, folder / "tokenizer")
    if xl:
        shutil.copytree(tokenizer.with_name("tokenizer_2"), folder / "tokenizer_2")
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    written = {*CLASSES, "scheduler"}
    if index is not None:
        kept = {k: [None, None] if isinstance(v, list) and k not in written else v for k, v in index.items()}
        write_json(folder / "model_index.json", kept | ({} if xl else {"requires_safety_checker": False}))
        return
    kind = "LatentConsistencyModelPipeline" if scheduler["_class_name"] == "LCMScheduler" else "StableDiffusionPipeline"
    kind = "StableDiffusionXLPipeline" if xl else kind
    made = {"_class_name": kind, "_diffusers_version": "0.42.0"}
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
