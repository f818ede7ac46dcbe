"""A model as it is stored, in whatever format: its configs, and tensors that are read when they are used."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lcm_jax.diffusion.schedule import PREDICTION_TYPES
from lcm_jax.models.families import FAMILIES
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.weights import diffusers_folder as folders
from lcm_jax.weights import layout, naming, orbax_folder, single_file, single_file_configs, stored, trees
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.lora import LoRA, is_lora
from lcm_jax.weights.lora import merge as merge_lora
from lcm_jax.weights.lora_files import to_updates
from lcm_jax.weights.preset import Preset, adapter_preset, read_preset, run_preset
from lcm_jax.weights.scheduler import LCM, lcm_scheduler, merge_scheduler
from lcm_jax.weights.single_file_family import detect_family
from lcm_jax.weights.stored import NoTensors, Tensors, get_specs


@dataclass(frozen=True)
class StoredModel:
    """The configs of a model, its tensors under diffusers' keys, and the place of its tokenizer.

    Nothing changes one: `dataclasses.replace` makes another. A tensor is read from its file each time it is used, so
    the files must stay as they are.
    """

    name: str  # for messages: the path or id that it was opened by
    family: str  # sd1, sd2, sdxl, or vae for an autoencoder alone
    configs: Mapping[str, Mapping[str, Any]]  # by component, and of scheduler and model_index
    tensors: Mapping[str, Mapping[str, np.ndarray]]  # by component
    tokenizer: Path | None = None  # a folder, with tokenizer_2 beside it for SDXL
    index: Mapping[str, Any] | None = None  # model_index.json; None if it must be made from the configs
    guessed: frozenset[str] = frozenset()  # options of the configs that the input does not record
    left_out: tuple[str, ...] = ()  # keys of a single file that no component has a place for
    preset: Preset | None = None  # as stored; `default_preset` has one for models without


# ---- opening --------------------------------------------------------------------------------------------------------


def open_model(
    name: str | Path,
    *,
    base: str | Path | None = None,
    ema: bool | None = None,
    variant: str | None = None,
    prediction_type: str | None = None,
    scaling_factor: float | None = None,
) -> StoredModel:
    """Open a model in any format; its configs and the names of its tensors are read, and tensors when they are used.

    name: a .safetensors or .ckpt file, a folder in diffusers layout (also of a single network), a hub id (`org/name`),
    a bundled name (`shapes`), the workdir of a run (or its best/, or one of its checkpoints), or an orbax model written
    by `convert`. base: a model in diffusers layout that supplies what the input lacks: networks, tokenizer, config
    values; a model that lacks nothing has no use for it. ema: use the averaged weights; by default those of a run, but
    not those of a single file. variant: of the weight files of a folder, such as `fp16`. prediction_type,
    scaling_factor: override the input and the base. Raises ModelError.
    """
    if prediction_type not in (None, *PREDICTION_TYPES):
        raise ModelError(f"prediction_type {prediction_type!r} is not supported; use {', '.join(PREDICTION_TYPES)}")
    path = Path(name)
    run = None if orbax_folder.is_model(path) else orbax_folder.find_run(path)
    if path.is_file():
        model = open_file(path, bool(ema), prediction_type, scaling_factor)
    elif run is not None:
        model = open_run(run, base, ema, variant)
    elif ema is not None:
        raise ModelError(f"{name} has one set of weights; use --ema and --noema with runs and single files only")
    else:
        model = open_orbax(path) if orbax_folder.is_model(path) else open_folder(name, variant, True)
    if model.tokenizer is None and base is not None:
        model = merge_base(model, open_folder(base, variant))
    if not model.family:
        part = next(iter(model.tensors))
        raise ModelError(f"{name} contains only a {part}; pass its model as base (--base)")
    for part, option, value in (
        ("scheduler", "prediction_type", prediction_type),
        ("vae", "scaling_factor", scaling_factor),
    ):
        if value is not None:
            if part not in model.configs:
                raise ModelError(f"{name} has no {part}; omit {option}")
            model = replace(model, configs={**model.configs, part: {**model.configs[part], option: value}})
    return model


def open_file(
    path: Path, ema: bool = False, prediction_type: str | None = None, scaling_factor: float | None = None
) -> StoredModel:
    """Open a single file; the options are those of `open_model`. Raises ModelError if its family is unknown."""
    tensors, metadata = folders.open_file(path)
    if is_lora(tensors):
        raise ModelError(
            f"{path} is a LoRA, not a model; merge it into its model: lcm_jax.convert --input=MODEL --merge={path}"
        )
    specs = get_specs(tensors)
    try:
        family = detect_family(specs)
        configs = single_file_configs.infer_configs(specs, family, prediction_type, scaling_factor, metadata)
        settings = Preset.from_metadata(metadata)
        components = single_file.open_diffusers(tensors, family, ema)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    left_out = tuple(single_file.left_out(specs, family, ema))
    guessed = single_file_configs.GUESSED
    return StoredModel(str(path), family, configs, components, guessed=guessed, left_out=left_out, preset=settings)


def open_folder(name: str | Path, variant: str | None = None, allow_single_network: bool = False) -> StoredModel:
    """Open a diffusers folder, a bundled name or a hub id; with `allow_single_network` also one network alone."""
    folder = layout.locate(name, variant, allow_single_network)
    if not (folder / "model_index.json").is_file():
        return open_network(name, folder, variant)
    index = layout.read_index(folder)
    configs, tensors = {"model_index": index}, {}
    for part in layout.networks_of(index):
        configs[part], opened = folders.open_component(folder, part, variant)
        tensors[part] = rename_legacy_keys(part, opened)
    configs["scheduler"] = layout.read_json(folder / "scheduler" / "scheduler_config.json")
    family, settings = infer_family(configs), read_preset(folder)
    return StoredModel(str(name), family, configs, tensors, folder / "tokenizer", index, preset=settings)


def open_network(name: str | Path, folder: Path, variant: str | None = None) -> StoredModel:
    """Open a network that is published alone. Raises ModelError for a kind that no model here has."""
    config = layout.read_json(folder / "config.json")
    kind = config.get("_class_name") or (config.get("architectures") or [None])[0]
    if kind == "ControlNetModel":
        raise ModelError(f"{folder} is a ControlNet; use its model, with this folder as controlnet")
    part = next((part for part in layout.NETWORKS if kind in layout.CLASSES[part][1]), None)
    if part is None:
        kinds = ", ".join(kind for part in layout.NETWORKS for kind in layout.CLASSES[part][1])
        raise ModelError(f"{folder / 'config.json'}: class {kind!r} is not supported; use one of {kinds}")
    tensors = rename_legacy_keys(part, folders.open_tensors(folder, layout.FILES[part], variant))
    return StoredModel(str(name), "vae" if part == "vae" else "", {part: config}, {part: tensors})


def open_run(
    place: orbax_folder.RunPlace,
    base: str | Path | None,
    ema: bool | None,
    variant: str | None,
    within: frozenset[Path] = frozenset(),
) -> StoredModel:
    """Open the student of a run, by default its EMA if it has one, with the networks that the run does not train.

    Adapters are merged into the UNet of the model that has these, see `open_untrained`, which is read for it. within:
    the workdirs of the runs that began from this one. Raises ModelError.
    """
    workdir, folder, step = place
    config = orbax_folder.read_run_file(workdir)
    step, tree = orbax_folder.read_tree(folder, step)
    part = choose_part(workdir, tree, ema)
    name = f"{workdir}, the {'EMA target' if part == 'ema' else 'student'} at step {step}"
    if config["objective"]["name"] == "autoencoder":
        return StoredModel(name, "vae", {}, orbax_folder.open_components(folder, step, part)[1])
    adapted = tree[part].keys() == {"lora"}
    if other := sorted(tree[part].keys() - {"lora"} - set(layout.NETWORKS)):
        raise ModelError(f"{workdir} trains {', '.join(other)}, which no model has; use the workdir of another run")
    began = config.get("init" if config["objective"]["name"] == "lcf" else "teacher")
    if adapted and base is not None and str(base) != str(began):
        raise ModelError(
            f"{workdir} trains adapters of {began}, which no base replaces; convert it to lora-peft, and merge that"
        )
    rest = open_untrained(workdir, began, config.get("base"), base, variant, within | {workdir})
    if adapted:
        trained = {"unet": merge_lora(rest.tensors, [(open_run_lora(place, ema), 1.0)])["unet"]}
    else:
        trained = orbax_folder.open_components(folder, step, part)[1]
    configs, index = dict(rest.configs), rest.index
    guided = get_specs(trained.get("unet", {})).get("time_embedding.cond_proj.weight")
    if guided is not None:
        configs["unet"] = {**configs["unet"], "time_cond_proj_dim": guided.shape[1]}
    if (grid := config["objective"].get("num_ddim_steps")) is not None:
        # The rest is the teacher's, or of LCF the LCM before, which may have another grid.
        if configs["scheduler"]["_class_name"] != "LCMScheduler" or config["objective"]["name"] == "lcf":
            grid = LCM["original_inference_steps"] if adapted and guided is None else grid  # as users sample adapters
            configs["scheduler"], index = lcm_scheduler(configs["scheduler"], grid), None
    settings = preset_of_run(workdir, partial(run_preset, config, guided is not None, rest.preset))
    tensors = {**rest.tensors, **trained}
    return StoredModel(name, rest.family, configs, tensors, rest.tokenizer, index, preset=settings)


def open_untrained(
    workdir: Path,
    began: str | None,
    beside: str | None,
    base: str | Path | None,
    variant: str | None,
    within: frozenset[Path],
) -> StoredModel:
    """Open a model that has the networks that a run does not train: `base`, else its export, else what it began from.

    began: its teacher or, for LCF, its init, in any format. beside: the base of that model, if it is a single file.
    within: the workdirs of this run and of those that began from it. Raises ModelError.
    """
    export = workdir / "export"
    try:
        if base is not None or (export / "model_index.json").is_file():
            return open_folder(export if base is None else base, variant)
        if not began:
            raise ModelError("it has no export yet, and its config names no model")
        if (run := orbax_folder.find_run(Path(began))) is None:
            return open_model(began, base=beside or None, variant=variant)
        if run.workdir in within:
            raise ModelError(f"{workdir} and {run.workdir} began from each other")
        return open_run(run, None, None, variant, within)
    except ModelError as error:
        raise ModelError(f"the rest of {workdir} cannot be read, pass it as base (--base): {error}") from None


def preset_of_run(workdir: Path, make: Callable[[], Preset | None]) -> Preset | None:
    """Return what `make` makes of the config of a run. Raises ModelError that names the config for its ValueError."""
    try:
        return make()
    except ValueError as error:
        raise ModelError(f"{workdir / 'config.json'}: {error}") from None


def choose_part(workdir: Path, tree: Mapping[str, Any], ema: bool | None) -> str:
    """Return "ema" or "params", the part of a checkpoint to open. Raises ModelError for an EMA that is not there."""
    averaged = bool(tree.get("ema"))  # None in a run without one
    if ema and not averaged:
        raise ModelError(f"{workdir} has no moving average (train.ema_rate is 0); omit --ema")
    return "ema" if averaged and ema is not False else "params"


def open_run_lora(place: orbax_folder.RunPlace, ema: bool | None = None) -> LoRA:
    """Return the adapters of a run, by default their EMA if it has one. Raises ModelError if it trains none."""
    workdir, folder, step = place
    config = orbax_folder.read_run_file(workdir)
    step, tree = orbax_folder.read_tree(folder, step)
    part = choose_part(workdir, tree, ema)
    if "lora" not in tree[part] or config.get("lora") is None:
        raise ModelError(f"{workdir} trains no LoRA; use format diffusers, ldm or orbax")
    adapters = orbax_folder.read_arrays(folder, step, part, "lora")
    settings = preset_of_run(workdir, partial(adapter_preset, config))
    metadata = {} if settings is None else settings.to_metadata()
    return LoRA({"unet": to_updates(adapters, config["lora"]["alpha"])}, metadata)


def open_orbax(folder: Path) -> StoredModel:
    """Open a model that `convert` wrote as an orbax checkpoint. Raises ModelError."""
    content = orbax_folder.read_model_file(folder)
    _, tensors = orbax_folder.open_components(folder / "checkpoints", None)
    tokenizer, stated = folder / "tokenizer", content.get("preset")
    return StoredModel(
        str(folder),
        content["family"],
        content["configs"],
        tensors,
        tokenizer if tokenizer.is_dir() else None,
        content.get("index"),
        frozenset(content.get("guessed") or ()),
        preset=None if stated is None else Preset.from_json(stated, f"{folder / orbax_folder.CONFIGS}: preset"),
    )


def published(family: str) -> StoredModel:
    """Return a model of the published configs of `family`, a name of `FAMILIES`, without tensors: for dry runs.

    Raises ModelError for another name; so does every use of a tensor.
    """
    if family not in FAMILIES:
        raise ModelError(f"family {family!r} is not supported; use one of {', '.join(FAMILIES)}")
    configs, name = FAMILIES[family], f"the published configs of {family}"
    tensors = {network: NoTensors(name) for network in layout.NETWORKS if network in configs}
    return StoredModel(name, infer_family(configs), configs, tensors)


# ---- parts ----------------------------------------------------------------------------------------------------------


def infer_family(configs: Mapping[str, Mapping[str, Any]]) -> str:
    """Return sd1, sd2 or sdxl, which single files distinguish, by the text encoders."""
    if "text_encoder_2" in configs:
        return "sdxl"
    return "sd2" if configs["text_encoder"].get("hidden_act") == "gelu" else "sd1"


def rename_legacy_keys(component: str, tensors: Tensors) -> Tensors:
    """Return `tensors` under their present names, without those that are not parameters."""
    keys = {new: key for key in tensors if (new := naming.modern_key(component, key)) is not None}
    return Tensors({new: tensors.specs[key] for new, key in keys.items()}, lambda new: tensors[keys[new]])


def merge_base(model: StoredModel, base: StoredModel) -> StoredModel:
    """Return `model` with what it lacks from `base`: other networks, the tokenizer, options that were guessed.

    What the input records has precedence. Raises ModelError if the two are of different families.
    """
    if model.family not in (base.family, "vae", ""):
        raise ModelError(
            f"{model.name} is of family {model.family} and the base {base.name} of {base.family}; use a base of the "
            "same family"
        )
    configs = dict(base.configs)
    configs |= {part: merge_config(model, base, part) for part in model.tensors}
    guided = configs["unet"].get("time_cond_proj_dim") is not None
    configs["scheduler"] = merge_scheduler(model.configs.get("scheduler", {}), base.configs["scheduler"], guided)
    if model.family != base.family:
        StableDiffusion.from_configs(configs)  # raises if the networks belong to different models
    index, settings = None, model.preset
    assert base.index is not None  # a diffusers folder has one
    if configs["scheduler"]["_class_name"] == base.configs["scheduler"]["_class_name"]:
        settings = model.preset or base.preset
        named = [part for part in ("unet", "vae") if "_class_name" in configs[part]]
        index = {**base.index, **{part: ["diffusers", configs[part]["_class_name"]] for part in named}}
    return StoredModel(
        model.name,
        base.family,
        configs,
        {**base.tensors, **model.tensors},
        base.tokenizer,
        index,
        left_out=model.left_out,
        preset=settings,
    )


def merge_config(model: StoredModel, base: StoredModel, part: str) -> Mapping[str, Any]:
    """Return the config of a network of `model`, with the options that were guessed from the same kind in `base`."""
    theirs = base.configs.get(part, {})
    own = model.configs.get(part, theirs)  # a run of an autoencoder has none
    same_class = theirs.get("_class_name", own.get("_class_name")) == own.get("_class_name")
    recorded = {option: value for option, value in own.items() if option not in model.guessed}
    return {**theirs, **recorded} if model.guessed and same_class else own


def replace_vae(model: StoredModel, vae: StoredModel) -> StoredModel:
    """Return `model` with the autoencoder of another model, or of a folder or file that has nothing else.

    Raises ModelError if there is none, or if its latents have another number of channels.
    """
    if "vae" not in vae.tensors:
        raise ModelError(f"{vae.name} has no autoencoder, only {', '.join(vae.tensors)}; use another vae")
    config = merge_config(vae, model, "vae")
    ours, theirs = (each.get("latent_channels", 4) for each in (model.configs["vae"], config))
    if ours != theirs:
        raise ModelError(
            f"the autoencoder of {vae.name} has {layout.shown(theirs)} latent channels, and {model.name} has {ours}; "
            "use one of the same family"
        )
    index = model.index
    if index is not None:
        index = {**index, "vae": ["diffusers", config.get("_class_name", layout.CLASSES["vae"][1][0])]}
    configs, tensors = {**model.configs, "vae": config}, {**model.tensors, "vae": vae.tensors["vae"]}
    return replace(model, configs=configs, tensors=tensors, index=index)


def check_complete(model: StoredModel) -> Path:
    """Return the tokenizer's folder. Raises ModelError unless `model` has every network and the tokenizer."""
    if missing := sorted({"unet", "vae", "text_encoder"} - model.tensors.keys()):
        raise ModelError(
            f"{model.name} has no {', '.join(missing)}; pass a model in diffusers layout that has them as base (--base)"
        )
    if model.tokenizer is None:
        raise ModelError(
            f"{model.name} has no tokenizer; pass a {model.family} model in diffusers layout as base (--base)"
        )
    return model.tokenizer


def check_params(model: StoredModel, abstract: Mapping[str, trees.Params]) -> None:
    """Raise ModelError that lists the missing, extra and misshapen keys of every network; nothing is read.

    abstract: the trees of `StableDiffusion.abstract_params`, by network.
    """
    problems = []
    for name, tensors in model.tensors.items():
        try:
            trees.match_params(name, tensors, abstract[name], model.name)
        except ModelError as error:
            problems.append(str(error))
    if problems:
        raise ModelError("\n".join(problems))


def read_params(
    model: StoredModel,
    component: str,
    abstract: trees.Params,
    cast: Callable[[np.ndarray], Any] | None = None,
    put: Callable[[np.ndarray], Any] | None = None,
) -> trees.Params:
    """Read the parameters of one component, a tree shaped like `abstract`, of numpy arrays in our layout.

    Each tensor is read when it is converted; one that needs no change stays mapped from its file, read-only. cast:
    array -> the dtype for it; by default arrays keep the stored dtype. put: array -> the leaf for it, an array on a
    device say, so that no second copy of the component is made. Raises ModelError that lists every missing, extra and
    misshapen key.
    """
    if component not in model.tensors:
        raise ModelError(f"{model.name} has no {component}; pass a model that has one as base (--base)")
    return trees.to_params(component, model.tensors[component], abstract, model.name, cast, put)


def compute_digests(model: StoredModel, advance: stored.Advance = lambda _: None) -> dict[str, str]:
    """Return the sha256 of each component's tensors as stored: keys, dtypes, shapes and bytes, in hexadecimal."""
    return {name: stored.digest(tensors, advance) for name, tensors in model.tensors.items()}


def fingerprint(model: StoredModel) -> str:
    """Return a sha256 that differs between trained models: of keys, dtypes, shapes and the first KiB of each tensor.

    Unlike `compute_digests` it reads little of a file, so that it takes milliseconds.
    """
    total = hashlib.sha256()
    for name in sorted(model.tensors):
        for key in sorted(model.tensors[name]):
            tensor = model.tensors[name][key]
            total.update(f"{name} {key} {tensor.dtype.name} {tensor.shape}".encode())
            total.update(tensor.reshape(-1)[: 1024 // tensor.itemsize].tobytes())
    return total.hexdigest()
