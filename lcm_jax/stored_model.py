"""A model as it is stored, whatever the format: configs, and tensors that are read when they are asked for.

A model as an orbax checkpoint is a folder with configs.json, the tokenizers, and one step, 0, under checkpoints/, the
tree of which is {component: parameters}. A run has its whole state there (params, ema, opt_state, step), and no
networks' configs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from lcm_jax.diffusion.schedule import lcm_scheduler
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.weights import diffusers_folder as folders
from lcm_jax.weights import layout, naming, single_file, single_file_configs
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.single_file_family import COMPONENTS, recognise
from lcm_jax.weights.stored import Tensors, hollow, outline_of

CONFIGS = "configs.json"  # in the folder of a model as an orbax checkpoint
# The keys of that file and of a run's config.json that are read here, as `layout.read_json` takes them.
STORED = {"family": (str, True), "configs": ({str: dict}, True), "index": (dict, False), "guessed": ([str], False)}
RUN = {"objective": (dict, True), "teacher": (str, False)}
OBJECTIVE = {"name": (str, True), "num_ddim_steps": (int, False)}


@dataclass
class Model:
    """What an input holds: configs and tensors by component, under diffusers' keys, and where its tokenizer is."""

    name: str  # what it was asked for by
    family: str
    configs: dict[str, dict[str, Any]]
    tensors: dict[str, Mapping[str, np.ndarray]]  # of most inputs, each is read when it is asked for
    tokenizer: Path | None = None
    index: dict[str, Any] | None = None
    guessed: frozenset[str] = frozenset()  # the options of its configs that a base knows better
    left_out: tuple[str, ...] = ()  # keys of a single file that no component has a place for


def read_model(
    name: str,
    *,
    base: str | None = None,
    ema: bool | None = None,
    variant: str | None = None,
    prediction_type: str | None = None,
    scaling_factor: float | None = None,
) -> Model:
    """The model that `name` is: a single file, a model or a run of orbax, a diffusers folder or a hub id.

    base: the model that gives what the input lacks: networks, the tokenizer, what the shapes do not tell; ema: whether
    the averaged weights are taken, None for what the format has first; variant: of a folder's files; prediction_type,
    scaling_factor: of what is read, whatever it or the base says. Raises ModelError.
    """
    path = Path(name)
    if path.is_file():
        model = read_file(name, bool(ema), prediction_type, scaling_factor)
    elif run := None if (path / CONFIGS).is_file() else find_run(path):
        model = read_run(*run, base, ema is not False, variant)
    elif ema is not None:
        raise ModelError(f"{name} has one set of weights: --ema and --noema are for runs and single files")
    else:
        model = read_orbax(path) if (path / CONFIGS).is_file() else read_folder(name, variant, alone=True)
    if model.tokenizer is None and base is not None:
        take_base(model, read_folder(base, variant))
    if not model.family:
        part = next(iter(model.tensors))
        raise ModelError(f"{name} is a {part} alone: name the model that it belongs to with --base")
    for part, option, value in (
        ("scheduler", "prediction_type", prediction_type),
        ("vae", "scaling_factor", scaling_factor),
    ):
        if value is not None:
            if part not in model.configs:
                raise ModelError(f"{option} is given, but {name} tells nothing of a {part}: leave it out")
            model.configs[part] = model.configs[part] | {option: value}
    return model


def family_of(configs: Mapping[str, Mapping[str, Any]]) -> str:
    """sd1, sd2 or sdxl, as single files tell them apart: by the text encoders."""
    if "text_encoder_2" in configs:
        return "sdxl"
    return "sd2" if configs["text_encoder"].get("hidden_act") == "gelu" else "sd1"


# ---- files and folders ----------------------------------------------------------------------------------------------


def read_file(name: str, ema: bool, prediction_type: str | None, scaling_factor: float | None) -> Model:
    """A single file. Raises ModelError where it is not one of a family that is known."""
    tensors, metadata = folders.open_file(Path(name))
    outline = outline_of(tensors)
    try:
        family = recognise(outline)
        configs = single_file_configs.configs_of(outline, family, prediction_type, scaling_factor, metadata)
        parts = single_file.open_diffusers(tensors, family, ema)
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from None
    left_out = tuple(single_file.left_out(outline, family, ema))
    return Model(name, family, configs, parts, guessed=single_file_configs.GUESSED, left_out=left_out)


def read_folder(name: str, variant: str | None = None, alone: bool = False) -> Model:
    """A diffusers folder, a shipped name or a hub id. alone: one network will do, without the rest of the model."""
    folder = layout.locate(name, variant, alone)
    if not (folder / "model_index.json").is_file():
        return read_network(name, folder, variant)
    index = layout.read_index(folder)
    configs, tensors = {"model_index": index}, {}
    for part in layout.networks_of(index):
        configs[part], stored = folders.open_component(folder, part, variant)
        tensors[part] = modern(part, stored)
    configs["scheduler"] = layout.read_json(folder / "scheduler" / "scheduler_config.json")
    return Model(name, family_of(configs), configs, tensors, folder / "tokenizer", index)


def read_network(name: str, folder: Path, variant: str | None = None) -> Model:
    """One network that is published alone. Raises ModelError for a kind that is in no model."""
    config = layout.read_json(folder / "config.json")
    kind = config.get("_class_name") or (config.get("architectures") or [None])[0]
    part = next((part for part in layout.NETWORKS if kind in layout.CLASSES[part][1]), None)
    if part is None:
        kinds = ", ".join(kind for part in layout.NETWORKS for kind in layout.CLASSES[part][1])
        raise ModelError(f"{folder / 'config.json'} is of the class {kind!r}; only {kinds} are supported")
    tensors = modern(part, folders.open_tensors(folder, layout.FILES[part], variant))
    return Model(name, "vae" if part == "vae" else "", {part: config}, {part: tensors})


def modern(component: str, tensors: Tensors) -> Tensors:
    """`tensors` under their present names, without what is no parameter."""
    keys = {naming.modern_key(component, key): key for key in tensors}
    keys.pop(None, None)
    return Tensors({new: tensors.outline[key] for new, key in keys.items()}, lambda new: tensors[keys[new]])


def take_base(model: Model, base: Model) -> None:
    """What a single file or one network does not tell comes from `base`: other networks, the tokenizer, heads, ...

    What it tells stays. Raises ModelError where the two are of different families.
    """
    if model.family not in (base.family, "vae", ""):
        raise ModelError(
            f"--base={base.name} is {base.family} and {model.name} {model.family}; name a base of the same family"
        )
    configs = dict(base.configs)
    for part in model.tensors:
        theirs = base.configs.get(part, {})
        own = model.configs.get(part, theirs)  # a run of an autoencoder has none
        alike = theirs.get("_class_name", own.get("_class_name")) == own.get("_class_name")
        told = {option: value for option, value in own.items() if option not in model.guessed}
        configs[part] = theirs | told if model.guessed and alike else own
    guided = configs["unet"].get("time_cond_proj_dim") is not None
    configs["scheduler"] = scheduler_beside(model.configs.get("scheduler", {}), base.configs["scheduler"], guided)
    classes = {
        part: ["diffusers", configs[part]["_class_name"]] for part in ("unet", "vae") if "_class_name" in configs[part]
    }
    if model.family != base.family:
        StableDiffusion.from_configs(configs)  # raises where the networks belong to different models
    same = configs["scheduler"]["_class_name"] == base.configs["scheduler"]["_class_name"]
    model.index = base.index | classes if same else None
    model.family, model.configs, model.tokenizer = base.family, configs, base.tokenizer
    model.tensors, model.guessed = base.tensors | model.tensors, frozenset()


def scheduler_beside(own: Mapping[str, Any], theirs: Mapping[str, Any], guided: bool) -> dict[str, Any]:
    """The scheduler of a model that tells `own` of it (nothing: {}), and of which `theirs` is the base's.

    guided: the UNet takes the weight of guidance, so that it is an LCM's; the base is then its teacher, or another LCM.
    """
    student = theirs["_class_name"] == "LCMScheduler"
    if guided and not student:
        scheduler = lcm_scheduler(theirs, single_file_configs.LCM["original_inference_steps"])
    elif student and own and not guided:
        scheduler = own | {"prediction_type": theirs.get("prediction_type", "epsilon")}
    else:
        scheduler = theirs
    told = {option: own[option] for option in ("prediction_type", "rescale_betas_zero_snr") if option in own}
    return {"prediction_type": "epsilon"} | dict(scheduler) | told


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
    config = layout.read_json(workdir / "config.json", RUN)
    layout.check_keys(workdir / "config.json", config["objective"], OBJECTIVE)
    step, tree = read_checkpoint(workdir / "checkpoints", step, "ema" if ema else "params")
    print(f"{workdir}: the {'EMA target' if ema else 'student'} at step {step}")
    if config["objective"]["name"] == "autoencoder":
        return Model(str(workdir), "vae", {}, {"vae": by_key(tree)})
    if other := sorted(tree.keys() - set(layout.NETWORKS)):
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
    described = layout.read_json(folder / CONFIGS, STORED)
    for name, config in described["configs"].items():
        file = {"scheduler": "scheduler_config.json", "model_index": "model_index.json"}.get(name, "config.json")
        layout.check_keys(folder / CONFIGS, config, layout.KEYS[file])
    if described["family"] not in COMPONENTS:
        families = ", ".join(COMPONENTS)
        raise ModelError(f"{folder / CONFIGS}: family={layout.shown(described['family'])} is not one of {families}")
    step, outline = checkpointed(lambda checkpoint: checkpoint.read_outline(folder / "checkpoints"))

    held: dict[str, Tensors] = {}

    def component(name: str) -> Tensors:
        if name not in held:
            held.clear()  # before the next is read
            held[name] = by_key(read_checkpoint(folder / "checkpoints", step, name)[1])
        return held[name]

    tensors = {
        name: Tensors(by_key(tree).outline, lambda key, name=name: component(name)[key])
        for name, tree in outline.items()
    }
    tokenizer = folder / "tokenizer"
    return Model(
        str(folder),
        described["family"],
        described["configs"],
        tensors,
        tokenizer if tokenizer.is_dir() else None,
        described.get("index"),
        frozenset(described.get("guessed") or ()),
    )


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


def by_path(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """Tensors by key -> parameters by the names of their path with dots between, read when they are asked for."""
    paths = {key: naming.to_path(key, like.ndim) for key, like in outline_of(tensors).items()}
    keys = {".".join(path): key for key, path in paths.items()}
    outline = {name: naming.to_array(paths[key], outline_of(tensors)[key]) for name, key in keys.items()}
    return Tensors(outline, lambda name: naming.to_array(paths[keys[name]], tensors[keys[name]]))


def by_key(tree: Mapping[str, Any]) -> Tensors:
    """The inverse of `by_path`; a tensor is made contiguous when it is asked for."""
    flat = flatten_dict(tree)
    paths = {naming.to_key(path): path for path in flat}
    outline = {
        key: hollow(flat[path].dtype, tuple(naming.tensor_shape(path, flat[path].shape))) for key, path in paths.items()
    }
    return Tensors(outline, lambda key: naming.to_tensor(paths[key], flat[paths[key]]))
