"""Where a model in diffusers layout is, what it consists of, and which of its files are read."""

import difflib
import json
import re
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lcm_jax.weights import hub
from lcm_jax.weights.errors import ModelError

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SHIPPED = ("shapes", "shapes-lcm")
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
FILES = {
    "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model",
    "text_encoder_2": "model",
}  # fmt: skip
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
