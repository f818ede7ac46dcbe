"""Locate models in diffusers layout, and choose the files of them that are read."""

import difflib
import json
import re
import reprlib
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lcm_jax.files import TextError, decode
from lcm_jax.weights import hub
from lcm_jax.weights.errors import ModelError

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SHIPPED = ("shapes", "shapes-lcm")
SHIPPED_LORAS = ("shapes-lcm-lora",)
LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name of the weights of a LoRA in a folder
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
FILES = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
PICKLED = {"model": "pytorch_model"}  # transformers' name of a .bin file
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
SHORT = reprlib.Repr()
SHORT.maxlevel, SHORT.maxstring, SHORT.maxother, SHORT.maxlong = 3, 60, 60, 30


def locate(model: str | Path, variant: str | None = None, allow_single_network: bool = False) -> Path:
    """Return the folder of a model: a path, a bundled name (`shapes`, `shapes-lcm`), or a hub id.

    variant: of the weight files that are downloaded from the hub. allow_single_network: accept the folder of a single
    network, or a folder with one below it, as runs of autoencoders export. Raises ModelError if there is no such model
    or it has no model_index.json, with the command if `convert` can read it.
    """
    folder = ASSETS / str(model) if str(model) in SHIPPED else Path(model)
    if not folder.exists() and hub.ID.fullmatch(str(model)):
        choose = partial(needed_files, str(model), variant=variant, allow_single_network=allow_single_network)
        folder = hub.download(str(model), choose)
    if folder.is_file():
        raise conversion_needed_error(model, "a file")
    if not folder.is_dir():
        if str(model) in SHIPPED_LORAS:
            raise ModelError(f"{str(model)!r} is a LoRA; use the model shapes, and add it with --lora (load_lora)")
        if str(model) in SHIPPED:
            raise ModelError(f"the bundled model {str(model)!r} is not at {folder}; install lcm_jax again")
        near = difflib.get_close_matches(str(model), SHIPPED, n=1, cutoff=0.5)
        names = ", ".join(SHIPPED)
        hint = f"did you mean {near[0]!r}?" if near else f"use a model in diffusers layout, or one of {names}"
        raise ModelError(f"there is no model {str(model)!r}: {hint}")
    if (folder / "model_index.json").is_file():
        return folder
    if allow_single_network:
        single = [each for each in (folder, *(folder / part for part in NETWORKS)) if is_component(each)]
        if len(single) == 1:
            return single[0]
    elif "checkpoints" in (folder.name, folder.parent.name) or (folder / "checkpoints").is_dir():
        raise conversion_needed_error(model, "orbax checkpoints", based=False)
    elif is_component(folder) and not (folder.parent / "model_index.json").is_file():
        raise conversion_needed_error(model, "one network")
    raise ModelError(f"{folder} has no model_index.json; use the top folder of a model in diffusers layout")


def conversion_needed_error(model: str | Path, kind: str, based: bool = True) -> ModelError:
    """Return the error for a model in another format. based: it lacks something that a base supplies."""
    base = " --base=BASE`, BASE being a folder of the same family" if based else "`"
    return ModelError(
        f"{model} is {kind}, and a folder in diffusers layout is needed; make one with "
        f"`python -m lcm_jax.convert --input={model} --output=DIR --format=diffusers{base}"
    )


def is_component(folder: Path) -> bool:
    """Return True if `folder` holds a single network, as some are published: config.json beside its weights."""
    return (folder / "config.json").is_file() and any(
        path.suffix.lower() in (".safetensors", ".bin") for path in folder.iterdir()
    )


def needed_files(
    model: str, names: Collection[str], variant: str | None = None, allow_single_network: bool = False
) -> list[str]:
    """Return the files of a model that are read: configs, tokenizers and one kind of weights. Raises ModelError.

    allow_single_network: those of one network, which has them at the top, will do.
    """
    if "model_index.json" not in names:
        top = [name for name in names if "/" not in name]
        found = next(filter(None, (component_files(top, stem, variant) for stem in FILES.values())), [])
        if allow_single_network and "config.json" in found:
            return found
        if "config.json" in found:
            raise conversion_needed_error(model, "one network")
        raise ModelError(
            f"{model} is not in diffusers layout on the hub; download the file that you want, and use that"
        )
    folders = {name.partition("/")[0] for name in names}
    needed = [
        name for name in names if re.fullmatch(r"(model_index|preset)\.json|(tokenizer(_2)?|scheduler)/[^/]+", name)
    ]
    inside = {
        part: [name.removeprefix(f"{part}/") for name in names if name.startswith(f"{part}/")] for part in NETWORKS
    }
    for part in NETWORKS:
        found = component_files(inside[part], FILES[part], choose_variant(inside, part, variant))
        if not found and part in folders:
            raise ModelError(
                f"{model} has no weights of the {part}{f' in the variant {variant}' if variant else ''}: there are "
                f"{', '.join(inside[part])}"
            )
        needed += [f"{part}/{name}" for name in found]
    return needed


def component_files(names: Collection[str], stem: str, variant: str | None = None) -> list[str]:
    """Return the config and weights of a component, whole or sharded; an empty list if there are no weights."""
    chosen = weight_file(names, stem, variant)
    if chosen is None:
        return []
    suffix = "safetensors" if ".safetensors" in chosen else "bin"
    whole = f"{chosen.split('.')[0]}{f'.{variant}' if variant else ''}.{suffix}"
    wanted = {whole, chosen, "config.json"} if chosen.endswith(".json") else {chosen, "config.json"}
    # Shards are named with the variant before or after their number.
    return [name for name in names if re.sub(r"-\d+-of-\d+", "", name) in wanted]


def weight_file(names: Collection[str], stem: str, variant: str | None = None) -> str | None:
    """Return the file among `names` that holds a component's weights, or the index of its shards; None without one.

    The order is that of diffusers and transformers: safetensors before .bin; if a folder has both whole weights and
    shards, transformers reads the whole ones and diffusers the shards. Three spellings of a variant's index are read:
    `model.safetensors.index.fp16.json` and the earlier `model.fp16.safetensors.index.json` and
    `model.safetensors.fp16.index.json`. stem: of FILES; transformers' .bin files are called pytorch_model.
    """
    middle = f".{variant}" if variant else ""
    for name, kind in ((stem, "safetensors"), (PICKLED.get(stem, stem), "bin")):
        whole = f"{name}{middle}.{kind}"
        shards = (f"{name}.{kind}.index{middle}.json", f"{whole}.index.json", f"{name}.{kind}{middle}.index.json")
        for found in (whole, *shards) if stem in PICKLED else (*shards, whole):
            if found in names:
                return found
    return None


def choose_variant(names: Mapping[str, Collection[str]], part: str, variant: str | None) -> str | None:
    """Return the variant in which to read the network `part` of a model whose files are `names`, by network.

    As in diffusers, a network without files of the variant is read without it if another network has some.
    """
    have = [other for other in names if weight_file(names[other], FILES[other], variant)]
    return variant if part in have or not have else None


# ---- JSON -----------------------------------------------------------------------------------------------------------

ENTRY = "a [library, class] pair"
# The keys of each file that are read here, and the kind of their values; the networks' own options are checked by the
# networks. Keys with True must be there.
KEYS: dict[str, Mapping[str, tuple[Any, bool]]] = {
    "model_index.json": {"_class_name": (str, False), "force_zeros_for_empty_prompt": (bool, False)}
    | dict.fromkeys((*CLASSES, "scheduler"), (ENTRY, False)),
    "config.json": {"_class_name": (str, False), "architectures": ([str], False)},
    "scheduler_config.json": {"_class_name": (str, True), "prediction_type": (str, False)},
    "index.json": {"weight_map": ({str: str}, True)},
}
NAMES = {str: "a string", bool: "true or false", dict: "an object", int: "an integer", ENTRY: ENTRY}


def read_json(path: Path, keys: Mapping[str, tuple[Any, bool]] | None = None) -> dict[str, Any]:
    """Return the JSON object in a file: UTF-8, or the encoding of its byte order mark, as editors on Windows write.

    keys: (kind, required) of the keys that are checked; by default those that KEYS has for a file of this name. null
    counts as absent. Raises ModelError that names the file, and the key, for anything else.
    """
    try:
        content = json.loads(decode(path.read_bytes(), str(path)))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: the model is incomplete, copy it again") from None
    except TextError as error:
        raise ModelError(str(error)) from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}): copy it again") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}): copy it again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} contains {shown(content)}, not a JSON object: copy it again")
    check_keys(path, content, expected_keys(path.name) if keys is None else keys)
    return content


def check_keys(path: Path, content: Mapping[str, Any], keys: Mapping[str, tuple[Any, bool]]) -> None:
    """Check the keys of an object that is part of a file, as `read_json` does."""
    for key, (kind, required) in keys.items():
        value = content.get(key)
        if value is None and required:
            raise ModelError(f"{path} has no {key}: copy it again")
        if value is not None and not is_kind(value, kind):
            raise ModelError(f"{path}: {key}={shown(value)} is not supported; it must be {describe_kind(kind)}")


def expected_keys(name: str) -> Mapping[str, tuple[Any, bool]]:
    return KEYS["index.json"] if ".index." in name else KEYS.get(name, {})


def is_kind(value: Any, kind: Any) -> bool:
    """kind: a type, [type] for a list of it, {str: type} for an object of it, or ENTRY."""
    if kind is ENTRY:
        return isinstance(value, list) and len(value) == 2 and all(each is None or type(each) is str for each in value)
    if isinstance(kind, list):
        return isinstance(value, list) and all(type(each) is kind[0] for each in value)
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(type(each) is kind[str] for each in value.values())
    return type(value) is kind


def describe_kind(kind: Any) -> str:
    if isinstance(kind, list):
        return f"a list of {NAMES[kind[0]].removeprefix('a ').removeprefix('an ')}s"
    if isinstance(kind, dict):
        return f"an object of {NAMES[kind[str]].removeprefix('a ').removeprefix('an ')}s"
    return NAMES[kind]


def shown(value: Any) -> str:
    """Return a JSON value for an error: shortened, on one line."""
    return SHORT.repr(value)


def read_index(folder: Path) -> dict[str, Any]:
    """Return model_index.json. Raises ModelError if a component is of a class that is not supported."""
    path = folder / "model_index.json"
    index = read_json(path)
    for name, (_, expected) in CLASSES.items():
        library, found = index.get(name) or [None, None]
        found = found if library else None
        if name in SECOND and not any((index.get(other) or [None])[0] for other in SECOND):
            continue
        if str(found).removesuffix("Fast") not in expected:
            supported = " or ".join(expected)
            raise ModelError(f"{path}: {name} is {shown(found)}; only {supported} is supported")
    if other := sorted({"controlnet", "motion_adapter", "text_encoder_3"} & index.keys()):
        raise ModelError(f"{path}: {shown(index.get('_class_name'))} with {other[0]} is not supported")
    return index


def networks_of(index: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the networks that a model_index.json lists; only some list text_encoder_2."""
    return tuple(name for name in NETWORKS if (index.get(name) or [None])[0])
