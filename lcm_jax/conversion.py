"""Convert models, LoRAs and ControlNets, bit-exact: one tensor at a time, whole or not at all, and read back."""

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from flax.traverse_util import unflatten_dict
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from lcm_jax.files import whole_file
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.weights import (
    controlnet,
    layout,
    lora,
    lora_settings,
    orbax_folder,
    single_file,
    single_file_configs,
    stored,
    trees,
)
from lcm_jax.weights import diffusers_folder as folders
from lcm_jax.weights.errors import ModelError, plural, write_error
from lcm_jax.weights.model import StoredModel, check_complete, check_params, open_folder, open_model, open_run_lora
from lcm_jax.weights.stored import Tensors, get_specs, total_bytes

MODEL_FORMATS = ("diffusers", "ldm", "orbax")
LORA_FORMATS = ("lora-kohya", "lora-peft")
FORMATS = (*MODEL_FORMATS, *LORA_FORMATS)
AVERAGES = "averaged unet"  # beside the components of a model: the EMA, if the student is written with it
Components = Mapping[str, Mapping[str, np.ndarray]]
Log = Callable[[str], None]


def convert(
    source: str | Path,
    target: str | Path | None,
    format: str | None,
    *,
    base: str | Path | None = None,
    merge: Sequence[str] = (),
    dtype: str | None = None,
    component: str | None = None,
    ema: bool | None = None,
    with_ema: bool = False,
    prediction_type: str | None = None,
    scaling_factor: float | None = None,
    variant: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    log: Log = print,
) -> dict[str, str]:
    """Convert a model, a LoRA or a ControlNet to another format; return the sha256 of what was written, by component.

        convert("runs/sd/export", "lcm.safetensors", "ldm")
        convert("model.ckpt", "model", "diffusers", base="path/to/any/sd15/folder")
        convert("style.safetensors", "peft.safetensors", "lora-peft", base="model")
        convert("model", "merged", "diffusers", merge=["style.safetensors:0.8"])

    source: anything that `weights.model.open_model` opens, a LoRA, or a ControlNet (to diffusers or ldm). target: a
    folder (diffusers, orbax) or a .safetensors file (ldm, lora-kohya, lora-peft). base, ema, prediction_type,
    scaling_factor, variant: see `open_model`; for a LoRA, base is the model that it belongs to. merge: LoRAs to add,
    each LORA or LORA:WEIGHT. dtype: float32, bfloat16 or float16; by default each tensor's own. component: write this
    component alone. with_ema: write a run's student together with its EMA to one file. overwrite: replace the target.
    dry_run: describe the source and write nothing; target and format may then be None. log: receives each printed line.

    The target appears when all of it is written and has been read back. Raises ModelError; the target is then
    untouched.
    """
    if dtype not in (None, *trees.DTYPES):
        raise ModelError(f"dtype {dtype!r} is not supported; use {', '.join(trees.DTYPES)}")
    write = None if dry_run else _choose_writer(target, format, overwrite)
    path = Path(source)
    given = {
        "merge": merge,
        "component": component,
        "with_ema": with_ema,
        "prediction_type": prediction_type,
        "scaling_factor": scaling_factor is not None,
    }
    place = orbax_folder.find_run(path) if format in LORA_FORMATS else None
    if place is not None or _is_lora(source):
        given |= {
            "ema": ema is not None and place is None,
            "base": base is not None and place is not None,
            "dtype": dtype,
        }
        _refuse(given, f"{path} is a LoRA, which keeps its dtypes and is written whole")
        belongs_to = None if base is None else open_folder(base, variant)
        adapter = _open_lora(path, belongs_to) if place is None else open_run_lora(place, ema)
        return _convert_lora(adapter, path, target, format, dry_run, log)
    if format in LORA_FORMATS:
        raise ModelError(f"format {format} is for LoRAs, and {source} has none by its keys; use another format")
    if controlnet.is_controlnet(source, variant):
        _refuse(given | {"ema": ema is not None}, f"{source} is a ControlNet, one network without a schedule")
        model = _open_controlnet(source, base, variant)
        write = None if write is None else _choose_controlnet_writer(model, format, Path(str(target)))
        return _write(model, write, target, describe(model, log), dtype, False, overwrite, log)
    if with_ema and (format != "ldm" or merge or ema is not None or orbax_folder.find_run(path) is None):
        raise ModelError("with_ema writes a run to format ldm, without merge and ema; omit it otherwise")
    open_with = partial(
        open_model, source, base=base, variant=variant, prediction_type=prediction_type, scaling_factor=scaling_factor
    )
    model = open_with(ema=False if with_ema else ema)
    if component is not None:
        if component not in model.tensors:
            raise ModelError(f"component {component} is not in {source}; use one of {', '.join(model.tensors)}")
        if format == "diffusers":
            raise ModelError("component works with ldm and orbax; a folder needs every component")
        model = replace(model, tensors={component: model.tensors[component]})
        model = model if component == "unet" else replace(model, preset=None)
    if with_ema:
        if "unet" not in model.tensors:
            raise ModelError(f"with_ema is for a run that trains a UNet; {source} trains none")
        model = replace(model, tensors={**model.tensors, AVERAGES: open_with(ema=True).tensors["unet"]})
    digests = describe(model, log)
    if merge:
        model = _merge(model, merge, log)
    return _write(model, write, target, digests, dtype, bool(merge), overwrite, log)


def _refuse(options: Mapping[str, object], reason: str) -> None:
    """Raise ModelError for the first of the options that is set."""
    if names := [name for name, value in options.items() if value]:
        raise ModelError(f"{reason}; omit {names[0]}")


def _write(model: StoredModel, write, target, digests, dtype, changed: bool, overwrite: bool, log: Log):
    """Write a model by `write`, cast to `dtype`, unless `write` is None; return the digests of what was written.

    digests: of the tensors as they were opened. changed: they have been changed since.
    """
    if write is None:
        return digests
    if dtype is not None:
        cast = {name: stored.cast(tensors, dtype) for name, tensors in model.tensors.items()}
        model = replace(model, tensors=cast)
    if changed or dtype is not None:
        digests = _compute_digests(model.tensors, "changing")
    _check_space(Path(target), model.tensors)
    write(model, Path(target), digests, overwrite)
    log(f"wrote {target}, and read it back:")
    for name, digest in digests.items():
        log(f"  {name}: sha256 {digest[:16]}")
    return digests


def describe(model: StoredModel, log: Log = print) -> dict[str, str]:
    """Log the family, prediction type and components of a model; return the sha256 of each component."""
    predicts = model.configs.get("scheduler", {}).get("prediction_type")
    if predicts is None and model.family == "sd2" and model.guessed:
        prediction = "prediction type unknown"
    else:
        prediction = f"predicts {predicts or 'epsilon'}"
    log(f"{model.name}: {model.family}" + (f", {prediction}" if "unet" in model.tensors else ""))
    if model.preset is not None:
        log(f"  preset: {model.preset}")
    digests = _compute_digests(model.tensors, "reading")
    for name, tensors in model.tensors.items():
        specs = get_specs(tensors).values()
        dtypes = ", ".join(sorted({spec.dtype.name for spec in specs}))
        count = sum(spec.size for spec in specs)
        size = f"{plural(len(tensors), 'tensor')}, {count:,} parameters, {dtypes}"
        log(f"  {name}: {size}, sha256 {digests[name][:16]}")
    if model.left_out:
        groups = Counter(key.partition(".")[0] for key in model.left_out).items()
        names = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in groups)
        log(f"  left out, as no network has a place for {plural(len(model.left_out), 'tensor')}: {names}")
    return digests


def _compute_digests(components: Components, phase: str) -> dict[str, str]:
    """Return the sha256 by component, with a progress bar."""
    with _progress(phase, components) as advance:
        return {name: stored.digest(tensors, advance) for name, tensors in components.items()}


@contextmanager
def _progress(phase: str, components: Components):
    """Show a bar on a terminal, of the bytes of all tensors and the time left; yield the function that advances it."""
    console = Console(stderr=True)
    columns = (TextColumn(f"{phase:8}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(phase, total=sum(map(total_bytes, components.values())))
        yield lambda count: bar.advance(task, count)


# ---- LoRA -----------------------------------------------------------------------------------------------------------


def _is_lora(source: str | Path) -> bool:
    """Return True for a bundled LoRA, a file or a folder that has one; a model's folder may have one beside it."""
    path = Path(source)
    if path.is_file():
        return lora.is_lora(folders.open_file(path)[0])
    has_lora = any((path / mark).is_file() for mark in (lora_settings.FILE, layout.LORA_FILE))
    return str(source) in layout.SHIPPED_LORAS or (has_lora and not (path / "model_index.json").is_file())


def _open_lora(path: Path, base: StoredModel | None) -> lora.LoRA:
    """Return the LoRA of a file, checked against the model it belongs to if there is one. Raises ModelError."""
    specs = None if base is None else {name: get_specs(tensors) for name, tensors in base.tensors.items()}
    return lora.open_lora(path, specs, base.family if base else "sd1")


def _convert_lora(adapter: lora.LoRA, path: Path, target, format: str | None, dry_run: bool, log: Log):
    """Write the LoRA of a file or of a run in a naming."""
    log(f"{path}: a LoRA")
    for component, updates in adapter.updates.items():
        ranks = ", ".join(map(str, sorted({len(update.down) for update in updates.values()})))
        count = sum(update.down.size + update.up.size for update in updates.values())
        dtypes = ", ".join(sorted({update.down.dtype.name for update in updates.values()}))
        log(f"  {component}: {len(updates)} modules of rank {ranks}, {count:,} parameters, {dtypes}")
    if dry_run:
        return {}
    if format not in LORA_FORMATS:
        raise ModelError(f"{path} is a LoRA; use format lora-kohya or lora-peft, or add it to a model with merge")
    tensors, metadata = (lora.to_kohya if format == "lora-kohya" else lora.to_peft)(adapter)
    digests = {"the LoRA": stored.digest(tensors)}
    check = lambda file: _verify(digests, {"the LoRA": file})  # noqa: E731
    _write_file({"the LoRA": tensors}, tensors, metadata, Path(target), check)
    log(f"wrote {target}, and read it back: sha256 {digests['the LoRA'][:16]}")
    return digests


def _merge(model: StoredModel, files: Sequence[str], log: Log) -> StoredModel:
    """Return `model` with every LoRA of `files` added to its tensors."""
    adapters, preset = [], model.preset
    for path, weight in lora.files_and_weights(files):
        adapters.append((_open_lora(path, model), weight))
        preset = adapters[-1][0].preset or preset  # an LCM-LoRA makes an LCM of it
        log(f"merging {path} at {weight:g}")
    return replace(model, tensors=lora.merge(model.tensors, adapters), preset=preset)


# ---- ControlNet -----------------------------------------------------------------------------------------------------


def _open_controlnet(source: str | Path, base: str | Path | None, variant: str | None) -> StoredModel:
    """Return a ControlNet with the options that its file does not record from the UNet of `base`, if there is one."""
    model = controlnet.open_controlnet(source, variant)
    if base is None:
        return model
    theirs = open_folder(base, variant)
    if theirs.family != model.family:
        raise ModelError(
            f"{source} is of family {model.family} and the base {base} of {theirs.family}; use a base of the same "
            "family"
        )
    return controlnet.with_unet(model, theirs.configs["unet"])


def _choose_controlnet_writer(model: StoredModel, format: str | None, target: Path) -> Callable[..., None]:
    """Return the function that writes a ControlNet. Raises ModelError if `format` or `target` cannot hold it."""
    writers = {"diffusers": _write_controlnet_folder, "ldm": _write_controlnet_file}
    if format not in writers:
        raise ModelError(f"{model.name} is a ControlNet, which format {format} cannot hold; use {' or '.join(writers)}")
    if format == "ldm":
        controlnet.check_name(model, target)
    return writers[format]


def _write_controlnet_folder(model: StoredModel, target: Path, digests: Mapping[str, str], overwrite: bool) -> None:
    """Write a ControlNet as a diffusers folder."""
    controlnet.build(model)  # raises if weights and config disagree
    tensors, config = model.tensors[controlnet.COMPONENT], model.configs[controlnet.COMPONENT]
    with folders.new_folder(target, overwrite) as folder:
        with _progress("writing", model.tensors) as advance:
            folders.write_network(folder, controlnet.FILE, config, tensors, advance=advance)
        _verify(digests, {controlnet.COMPONENT: folders.open_tensors(folder, controlnet.FILE)})


def _write_controlnet_file(model: StoredModel, target: Path, digests: Mapping[str, str], overwrite: bool) -> None:
    """Write a ControlNet as one .safetensors file."""
    check = lambda file: _verify(digests, {controlnet.COMPONENT: controlnet.open_diffusers(file)[0]})  # noqa: E731
    _write_file(model.tensors, controlnet.open_ldm(model), {}, target, check)


# ---- writing --------------------------------------------------------------------------------------------------------


def _choose_writer(target: str | Path | None, format: str | None, overwrite: bool) -> Callable[..., None]:
    """Return the function that writes `format`. Raises ModelError if `target` cannot be its output."""
    if format not in FORMATS:
        raise ModelError(f"format {format!r} is not supported; use one of {', '.join(FORMATS)}")
    if target is None:
        raise ModelError(f"target is missing; use a path for the {format} output")
    target = Path(target)
    if format in ("diffusers", "orbax"):
        folders.check_target(target, overwrite)
    elif target.exists() and not overwrite:
        raise ModelError(f"{target} exists already; use another output, or pass --overwrite (overwrite=True)")
    elif target.is_dir():
        raise ModelError(f"{target} is a folder; use a file for format {format}")
    elif target.suffix != ".safetensors":
        raise ModelError(f"{target} does not end in .safetensors; use that ending (pickles are read, never written)")
    return {"diffusers": _write_folder, "orbax": _write_orbax}.get(format, _write_ldm)


def _check_space(target: Path, components: Components) -> None:
    """Raise ModelError if the disk of `target` has less space than the tensors take: before anything is written."""
    disk = next(folder for folder in target.absolute().parents if folder.exists())
    needed, free = sum(map(total_bytes, components.values())), shutil.disk_usage(disk).free
    if free < needed:
        raise ModelError(
            f"{target} needs {needed / 1e9:.3g} GB, and {disk} has {free / 1e9:.3g} GB free; free some space, or "
            "use another output"
        )


def _verify(digests: Mapping[str, str], written: Components) -> None:
    """Raise ModelError if what was read back is not what was to be written."""
    read_back = _compute_digests({name: written.get(name, {}) for name in digests}, "checking")
    if wrong := [name for name in digests if read_back[name] != digests[name]]:
        raise ModelError(f"verification failed for {', '.join(wrong)}; the output was removed, try again")


def _write_file(
    components: Components,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    target: Path,
    check: Callable[[Mapping[str, np.ndarray]], None],
) -> None:
    """Write one file; check(its tensors) raises ModelError if they are not what was to be written."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as temporary:
            with _progress("writing", components) as advance:
                stored.write_safetensors(temporary, tensors, metadata, advance)
            check(stored.map_safetensors(temporary)[0])
    except OSError as error:
        raise write_error(target, error) from error


def _write_ldm(model: StoredModel, target: Path, digests: Mapping[str, str], overwrite: bool) -> None:
    """Write a model as one .safetensors file."""
    averages = model.tensors.get(AVERAGES)
    others = {name: tensors for name, tensors in model.tensors.items() if name != AVERAGES}

    def check(file):
        written = single_file.open_diffusers(file, model.family)
        if averages is not None:
            written |= {AVERAGES: single_file.open_diffusers(file, model.family, ema=True)["unet"]}
        _verify(digests, written)

    file = single_file.open_ldm(others, model.family, averages)
    marks = single_file_configs.make_marks(model.configs.get("scheduler", {})) if "unet" in others else {}
    tensors = Tensors({**file.specs, **marks}, lambda key: marks[key] if key in marks else file[key])
    metadata = {} if model.preset is None else model.preset.to_metadata()
    _write_file(model.tensors, tensors, metadata, target, check)


def _write_folder(model: StoredModel, target: Path, digests: Mapping[str, str], overwrite: bool) -> None:
    """Write a model as a diffusers folder."""
    tokenizer = check_complete(model)
    check_params(model, StableDiffusion.from_configs(model.configs).abstract_params())
    with folders.new_folder(target, overwrite) as folder:
        with _progress("writing", model.tensors) as advance:
            for name, tensors in model.tensors.items():
                folders.write_tensors(folder, name, model.configs[name], tensors, advance=advance)
        folders.write_surroundings(
            folder,
            model.configs,
            tokenizer,
            model.configs["scheduler"],
            model.index,
            model.preset,
            xl="text_encoder_2" in model.tensors,
        )
        _verify(digests, {name: folders.open_component(folder, name)[1] for name in model.tensors})


def _write_orbax(model: StoredModel, target: Path, digests: Mapping[str, str], overwrite: bool) -> None:
    """Write a model as an orbax checkpoint with its configs."""
    from lcm_jax.weights import orbax_tree  # orbax takes seconds to import

    if model.guessed:
        single_file_configs.complete(model.configs, model.family)
    about = {"family": model.family, "configs": model.configs, "index": model.index, "guessed": sorted(model.guessed)}
    about |= {} if model.preset is None else {"preset": model.preset.to_json()}
    with folders.new_folder(target, overwrite) as folder:
        folders.write_json(folder / orbax_folder.CONFIGS, about)
        if model.tokenizer is not None:
            for name in ("tokenizer", "tokenizer_2"):
                if (path := model.tokenizer.with_name(name)).is_dir():
                    shutil.copytree(path, folder / name)
        parts = {name: orbax_folder.by_path(tensors) for name, tensors in model.tensors.items()}
        specs = {name: unflatten_dict(part.specs, sep=".") for name, part in parts.items()}

        def read(name):
            component, _, rest = name.partition(".")
            return parts[component][rest]

        logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs the trace of what it raises as well
        try:
            with _progress("writing", model.tensors) as advance:
                orbax_tree.write_tree(folder / "checkpoints", specs, read, advance)
        except ModelError as error:
            raise write_error(target, error) from error
        _verify(digests, orbax_folder.open_components(folder / "checkpoints", None)[1])
