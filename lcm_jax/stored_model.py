"""A model as it is stored, whatever the format: configs, and tensors that are read when they are asked for.

A model as an orbax checkpoint is a folder with configs.json, the tokenizers, and one step, 0, under checkpoints/, the
tree of which is {component: parameters}. A run has its whole state there (params, ema, opt_state, step), and no
networks' configs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lcm_jax.diffusion.schedule import lcm_scheduler
from lcm_jax.weights import diffusers_folder as folders
from lcm_jax.weights import naming, single_file, single_file_configs
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.stored import Tensors, hollow, outline_of

CONFIGS = "configs.json"  # in the folder of a model as an orbax checkpoint


@dataclass
class Model:
    """What an input holds: configs and tensors by component, under diffusers' keys, and where its tokenizer is."""

    name: str  # what it was asked for by
    family: str
    configs: dict[str, dict[str, Any]]
    tensors: dict[str, Mapping[str, np.ndarray]]  # of most inputs, each is read when it is asked for
    tokenizer: Path | None = None
    index: dict[str, Any] | None = None


def read_model(
    name: str, *, base: str | None = None, ema: bool | None = None, variant: str | None = None,
    prediction_type: str | None = None, scaling_factor: float | None = None,
) -> Model:  # fmt: skip
    """The model that `name` is: a single file, a model or a run of orbax, a diffusers folder or a hub id.

    base: the model that gives a run what it does not train; ema: whether the averaged weights are taken, None for what
    the format has first; variant: of a folder's files; prediction_type, scaling_factor: what a single file may not
    tell. Raises ModelError.
    """
    path = Path(name)
    if path.is_file():
        return read_file(name, bool(ema), prediction_type, scaling_factor)
    if (path / CONFIGS).is_file():
        return read_orbax(path)
    if run := find_run(path):
        return read_run(*run, base, ema is not False, variant)
    return read_folder(name, variant)


def family_of(configs: Mapping[str, Mapping[str, Any]]) -> str:
    """sd1, sd2 or sdxl, as single files tell them apart: by the text encoders."""
    if "text_encoder_2" in configs:
        return "sdxl"
    return "sd2" if configs["text_encoder"].get("hidden_act") == "gelu" else "sd1"


# ---- files and folders ----------------------------------------------------------------------------------------------


def read_file(name: str, ema: bool, prediction_type: str | None, scaling_factor: float | None) -> Model:
    """A single file. Raises ModelError where it is not one of a family that is known."""
    tensors = folders.open_file(Path(name))[0]
    outline = outline_of(tensors)
    family = single_file.recognise(outline)
    configs = single_file_configs.configs_of(outline, family, prediction_type, scaling_factor)
    return Model(name, family, configs, single_file.open_diffusers(tensors, family, ema))


def read_folder(name: str, variant: str | None = None) -> Model:
    """A diffusers folder, a shipped name or a hub id."""
    folder = folders.locate(name, variant)
    index = folders.read_index(folder)
    configs, tensors = {"model_index": index}, {}
    for part in folders.networks_of(index):
        configs[part], stored = folders.open_component(folder, part, variant)
        tensors[part] = modern(part, stored)
    configs["scheduler"] = folders.read_json(folder / "scheduler" / "scheduler_config.json")
    return Model(name, family_of(configs), configs, tensors, folder / "tokenizer", index)


def modern(component: str, tensors: Tensors) -> Tensors:
    """`tensors` under their present names, without what is no parameter."""
    keys = {folders.modern_key(component, key): key for key in tensors}
    keys.pop(None, None)
    return Tensors({new: tensors.outline[key] for new, key in keys.items()}, lambda new: tensors[keys[new]])


def take_base(model: Model, base: Model) -> None:
    """What a single file does not tell comes from `base`: the tokenizer, heads, groups of the norms, the scaling.

    Raises ModelError where the two are of different families.
    """
    if base.family != model.family:
        raise ModelError(
            f"--base={base.name} is {base.family} and {model.name} {model.family}; name a base of the same family"
        )
    guided = {"time_cond_proj_dim": model.configs["unet"].get("time_cond_proj_dim")}
    channels = {"in_channels": model.configs["unet"]["in_channels"]}
    model.tokenizer = base.tokenizer
    model.configs |= {name: base.configs[name] for name in model.tensors if name in base.configs}
    model.configs["unet"] = base.configs["unet"] | guided | channels
    kinds = {one.configs["scheduler"]["_class_name"] for one in (model, base)}
    if "LCMScheduler" in kinds and len(kinds) > 1:  # a student beside its teacher: only the prediction is shared
        model.configs["scheduler"]["prediction_type"] = base.configs["scheduler"].get("prediction_type", "epsilon")
    else:
        model.configs["scheduler"] = base.configs["scheduler"]


# ---- orbax ----------------------------------------------------------------------------------------------------------


def find_run(path: Path) -> tuple[Path, int | None] | None:
    """(workdir, step or None for the newest) of a run's workdir, of its checkpoints/ or of one of them; else None."""
    path = path.absolute()
    places = [(path, None), (path.parent, None)]
    if path.name.isdigit():
        places.append((path.parent.parent, int(path.name)))
    for workdir, step in places:
        inside = path in (workdir, workdir / "checkpoints", workdir / "checkpoints" / str(step))
        if inside and (workdir / "config.json").is_file() and (workdir / "checkpoints").is_dir():
            return workdir, step
    return None


def read_run(workdir: Path, step: int | None, base: str | None, ema: bool, variant: str | None = None) -> Model:
    """The student of a run, or its EMA target, with what is not trained from the model that it began from.

    That is `base`, else the run's export, else the teacher that its config names. Raises ModelError.
    """
    config = folders.read_json(workdir / "config.json")
    step, tree = read_checkpoint(workdir / "checkpoints", step, "ema" if ema else "params")
    print(f"{workdir}: the {'EMA target' if ema else 'student'} at step {step}")
    if config["objective"]["name"] == "autoencoder":
        return Model(str(workdir), "vae", {}, {"vae": by_key(tree)})
    if other := sorted(tree.keys() - set(folders.NETWORKS)):
        raise ModelError(f"{workdir} trains {', '.join(other)}, which are no networks of a model")
    export = workdir / "export"
    began = str(export) if (export / "model_index.json").is_file() else config.get("teacher")
    if (name := base or began) is None:
        raise ModelError(f"{workdir} has no export yet: name a model of the same shape with --base")
    try:
        rest = read_folder(name, variant)
    except ModelError as error:
        raise ModelError(f"the rest of {workdir} cannot be read, name it with --base: {error}") from None
    configs, index = dict(rest.configs), rest.index
    if guided := tree.get("unet", {}).get("time_embedding", {}).get("cond_proj"):
        configs["unet"] = configs["unet"] | {"time_cond_proj_dim": len(guided["kernel"])}
    if guided and configs["scheduler"]["_class_name"] != "LCMScheduler":  # the rest is the teacher's
        configs["scheduler"] = lcm_scheduler(configs["scheduler"], config["objective"]["num_ddim_steps"])
        index = None
    trained = {name: by_key(parameters) for name, parameters in tree.items()}
    return Model(str(workdir), rest.family, configs, rest.tensors | trained, rest.tokenizer, index)


def read_orbax(folder: Path) -> Model:
    """A model as an orbax checkpoint, of which one component is held at a time. Raises ModelError."""
    described = folders.read_json(folder / CONFIGS)
    step, outline = checkpointed(lambda checkpoint: checkpoint.read_outline(folder / "checkpoints"))

    @lru_cache(maxsize=1)
    def component(name: str) -> Tensors:
        return by_key(read_checkpoint(folder / "checkpoints", step, name)[1])

    tensors = {
        name: Tensors(by_key(tree).outline, lambda key, name=name: component(name)[key])
        for name, tree in outline.items()
    }
    tokenizer = folder / "tokenizer"
    return Model(
        str(folder), described["family"], described["configs"], tensors, tokenizer if tokenizer.is_dir() else None,
        described["configs"].get("model_index"),
    )  # fmt: skip


def read_checkpoint(folder: Path, step: int | None, part: str) -> tuple[int, dict[str, Any]]:
    """(step, tree of numpy arrays) of the subtree `part` of a checkpoint in `folder`. Raises ModelError."""
    return checkpointed(lambda checkpoint: checkpoint.read_tree(folder, step, part))


def checkpointed(read: Callable[[ModuleType], Any]) -> Any:
    """read(lcm_jax.training.checkpoint), which takes seconds to import; its errors are ModelErrors."""
    from lcm_jax.training import checkpoint

    try:
        return read(checkpoint)
    except checkpoint.CheckpointError as error:
        raise ModelError(str(error)) from error


def by_path(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Tensors by key -> a tree of parameters."""
    paths = {key: naming.to_path(key, tensor.ndim) for key, tensor in outline_of(tensors).items()}
    return unflatten_dict({path: naming.to_array(path, tensors[key]) for key, path in paths.items()})


def by_key(tree: Mapping[str, Any]) -> Tensors:
    """The inverse of `by_path`; a tensor is made contiguous when it is asked for."""
    flat = flatten_dict(tree)
    paths = {naming.to_key(path): path for path in flat}
    outline = {
        key: hollow(flat[path].dtype, tuple(naming.tensor_shape(path, flat[path].shape))) for key, path in paths.items()
    }
    return Tensors(outline, lambda key: naming.to_tensor(paths[key], flat[paths[key]]))
