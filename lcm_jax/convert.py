"""Convert a model between diffusers' folder, the single file of A1111 and ComfyUI, and orbax checkpoints, to the bit.

    python -m lcm_jax.convert --input=runs/sd/export --output=lcm.safetensors --format=ldm
    python -m lcm_jax.convert --input=model.ckpt --output=model --format=diffusers --base=path/to/any/sd15/folder
    python -m lcm_jax.convert --input=path/to/a/unet --output=model --format=diffusers --base=path/to/the/rest
    python -m lcm_jax.convert --input=runs/sd --output=student --format=diffusers --noema
    python -m lcm_jax.convert --input=style.safetensors --output=peft.safetensors --format=lora-peft --base=model
    python -m lcm_jax.convert --input=model --output=merged --format=diffusers --merge=style.safetensors:0.8

It says what it found, reads and writes one tensor at a time, all or nothing, and reads the result back. A single file
has no tokenizer, and does not tell how many heads its attention has: --base names a model in diffusers layout of the
same family to take them from. What the file tells, or an option gives, wins over the base. If the input is a part of a
model (a folder, hub id or single file of a UNet, an autoencoder, text encoders), --base supplies the rest. For a LoRA,
a file or a folder that PEFT has saved, it is the model that the LoRA belongs to, which kohya's names need. float8
becomes float16, in which it is exact, and keys of a single file that no network has a place for are listed. --merge
adds LoRAs to what is written; the input stays as it was, so that unmerging is to use it again.
Of a run it takes the newest checkpoint (--input=runs/sd/checkpoints/300 another): the EMA target, as exports do, or the
student itself with --noema, or both in one file with --with_ema. --dry_run only says what it found.
"""

import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from absl import flags, logging

from lcm_jax import command
from lcm_jax.errors import check_devices
from lcm_jax.weights.errors import ModelError, plural, write_error

if TYPE_CHECKING:  # the rest is imported late, so that --help and a mistyped option answer at once
    from lcm_jax.weights.model import StoredModel

LORA_FORMATS = ("lora-kohya", "lora-peft")
AVERAGES = "averaged unet"  # beside the components of a model: the EMA target, where the student is written with it
FORMATS = ("diffusers", "ldm", "orbax", *LORA_FORMATS)
FLAGS = flags.FlagValues()  # of this command alone, so that others can be imported beside it
OWN = {"flag_values": FLAGS}
INPUT = flags.DEFINE_string(
    "input",
    None,
    "A folder in diffusers layout (also of one network), a hub id, a shipped name, a .safetensors or "
    ".ckpt, a run's workdir.",
    **OWN,
)
OUTPUT = flags.DEFINE_string(
    "output", None, "The folder (diffusers, orbax) or .safetensors file (others) to write.", **OWN
)
FORMAT = flags.DEFINE_enum("format", None, FORMATS, "What to write.", **OWN)
BASE = flags.DEFINE_string(
    "base",
    None,
    "A model in diffusers layout that gives what the input lacks: networks, the tokenizer, what a single "
    "file does not tell of its configs; or the model that a LoRA belongs to.",
    **OWN,
)
MERGE = flags.DEFINE_list("merge", [], "LoRA files to add, each FILE or FILE:WEIGHT, with commas between them.", **OWN)
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "By default each tensor's own.", **OWN)
COMPONENT = flags.DEFINE_string("component", None, "Only this component, such as unet; by default all of them.", **OWN)
VARIANT = flags.DEFINE_string("variant", None, "The variant of a folder's weight files to read, such as fp16.", **OWN)
EMA = flags.DEFINE_bool(
    "ema",
    None,
    "The averaged weights: of a run's checkpoint unless --noema (the student), of a single file with --ema.",
    **OWN,
)
WITH_EMA = flags.DEFINE_bool(
    "with_ema", False, "Write a run's student with its EMA target beside it, in one file of --format=ldm.", **OWN
)
PREDICTION = flags.DEFINE_enum(
    "prediction_type",
    None,
    ["epsilon", "v_prediction"],
    "What the model predicts, whatever its input or the base says; a single file of Stable Diffusion 2 does not.",
    **OWN,
)
SCALING = flags.DEFINE_float("scaling_factor", None, "Of the latents, whatever the input or the base says.", **OWN)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Say what the input is, and write nothing.", **OWN)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the output if it is there already.", **OWN)


def describe(model: "StoredModel") -> dict[str, str]:
    """Prints what the model is; the digest of each component."""
    from lcm_jax.weights.stored import get_specs

    unknown = "what it predicts is not told" if model.family == "sd2" and model.guessed else "predicts epsilon"
    told = model.configs.get("scheduler", {}).get("prediction_type")
    predicts = f"predicts {told}" if told else unknown
    print(f"{model.name}: {model.family}" + (f", {predicts}" if "unet" in model.tensors else ""))
    digests = digests_of(model.tensors, "reading")
    for name, tensors in model.tensors.items():
        outline = get_specs(tensors).values()
        count = sum(tensor.size for tensor in outline)
        dtypes = ", ".join(sorted({tensor.dtype.name for tensor in outline}))
        size = f"{plural(len(tensors), 'tensor')}, {count:,} parameters, {dtypes}"
        print(f"  {name}: {size}, sha256 {digests[name][:16]}")
    if model.left_out:
        groups = Counter(key.partition(".")[0] for key in model.left_out).items()
        names = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in groups)
        print(f"  left out, as no network has a place for {plural(len(model.left_out), 'tensor')}: {names}")
    return digests


def digests_of(components: Mapping[str, Mapping[str, np.ndarray]], what: str) -> dict[str, str]:
    """sha256 by component, with a progress bar."""
    from lcm_jax.weights import stored

    with progress(what, components) as advance:
        return {name: stored.digest(tensors, advance) for name, tensors in components.items()}


@contextmanager
def progress(what: str, components: Mapping[str, Mapping[str, np.ndarray]]):
    """A bar on a terminal, of the bytes of all tensors and the time that is left; yields what is told of bytes done."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from lcm_jax.weights.stored import size_of

    console = Console(stderr=True)
    columns = (TextColumn(f"{what:8}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=sum(map(size_of, components.values())))
        yield lambda count: bar.advance(task, count)


# ---- LoRA -----------------------------------------------------------------------------------------------------------


def read_lora(path: Path, base: "StoredModel | None"):
    """The LoRA of a file, checked against the model it belongs to where there is one. Raises ModelError."""
    from lcm_jax.weights import lora
    from lcm_jax.weights.stored import get_specs

    outlines = base and {name: get_specs(parts) for name, parts in base.tensors.items()}
    return lora.open_lora(path, outlines, base.family if base else "sd1")


def convert_lora(path: Path) -> None:
    """A LoRA in one naming to the other."""
    from lcm_jax.weights import lora, stored
    from lcm_jax.weights.model import open_folder

    of_models = (MERGE, COMPONENT, WITH_EMA, EMA, DTYPE, PREDICTION, SCALING)
    if given := [f"--{flag.name}" for flag in of_models if flag.present]:
        raise ModelError(f"{path} is a LoRA, which keeps its dtypes and is written whole: leave out {given[0]}")
    found = read_lora(path, None if BASE.value is None else open_folder(BASE.value, VARIANT.value))
    print(f"{path}: a LoRA")
    for component, updates in found.updates.items():
        ranks = sorted({len(update.down) for update in updates.values()})
        count = sum(update.down.size + update.up.size for update in updates.values())
        dtypes = ", ".join(sorted({update.down.dtype.name for update in updates.values()}))
        of = ", ".join(map(str, ranks))
        print(f"  {component}: {len(updates)} modules of rank {of}, {count:,} parameters, {dtypes}")
    if DRY_RUN.value:
        return
    if FORMAT.value not in LORA_FORMATS:
        raise ModelError(
            f"{path} is a LoRA: write it with --format=lora-kohya or lora-peft, or add it to a model with --merge"
        )
    tensors, metadata = (lora.to_kohya if FORMAT.value == "lora-kohya" else lora.to_peft)(found)
    digest = stored.digest(tensors)
    check = lambda file: verify({"the LoRA": digest}, {"the LoRA": file})  # noqa: E731
    write_file({"the LoRA": tensors}, tensors, metadata, Path(OUTPUT.value), check)
    print(f"wrote {OUTPUT.value}, and read it back: sha256 {digest[:16]}")


def merge(model: "StoredModel") -> "StoredModel":
    """Return `model` with every LoRA of --merge added to its tensors."""
    from lcm_jax.weights import lora

    chosen = []
    for path, weight in map(lora.file_and_weight, MERGE.value):
        chosen.append((read_lora(path, model), weight))
        print(f"merging {path} at {weight:g}")
    return replace(model, tensors=lora.merge(model.tensors, chosen))


# ---- writing --------------------------------------------------------------------------------------------------------


def check_target() -> None:
    """Raises ModelError where --output cannot be what is to be written: before anything is read."""
    from lcm_jax.weights import diffusers_folder as folders

    target = Path(OUTPUT.value)
    if FORMAT.value in ("diffusers", "orbax"):
        folders.check_target(target, OVERWRITE.value)
    elif target.exists() and not OVERWRITE.value:
        raise ModelError(f"{target} exists already; choose another --output, or pass --overwrite")
    elif target.is_dir():
        raise ModelError(f"--output={target} is a folder; give a file")
    elif target.suffix != ".safetensors":
        raise ModelError(f"--output={target} must end in .safetensors: pickles are read, never written")


def check_space(target: Path, components: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Raise ModelError if the disk of `target` has less space than the tensors take: before anything is written."""
    from lcm_jax.weights.stored import size_of

    disk = next(folder for folder in target.absolute().parents if folder.exists())
    needed, free = sum(map(size_of, components.values())), shutil.disk_usage(disk).free
    if free < needed:
        raise ModelError(
            f"{target} needs {needed / 1e9:.3g} GB, and {disk} has {free / 1e9:.3g} GB free; free some space, or "
            "choose another --output"
        )


def write_file(
    components: Mapping[str, Mapping[str, np.ndarray]],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    target: Path,
    check: Callable[[Mapping[str, np.ndarray]], None],
) -> None:
    """One file, whole or not at all; check(its tensors) raises ModelError where what was written does not read back."""
    from lcm_jax.weights import stored

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        os.close(handle)
    except OSError as error:
        raise ModelError(f"{target} cannot be written ({error}); choose another place") from None
    try:
        with progress("writing", components) as advance:
            stored.write_safetensors(Path(temporary), tensors, metadata, advance)
        check(stored.map_safetensors(Path(temporary))[0])
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError as error:
        raise write_error(target, error) from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def write_ldm(model: "StoredModel", target: Path, digests: Mapping[str, str]) -> None:
    """A model in one .safetensors file."""
    from lcm_jax.weights import single_file, single_file_configs
    from lcm_jax.weights.stored import Tensors

    averages = model.tensors.get(AVERAGES)
    others = {name: tensors for name, tensors in model.tensors.items() if name != AVERAGES}

    def check(file):
        written = single_file.open_diffusers(file, model.family)
        if averages is not None:
            written = written | {AVERAGES: single_file.open_diffusers(file, model.family, ema=True)["unet"]}
        verify(digests, written)

    file = single_file.open_ldm(others, model.family, averages)
    marks = single_file_configs.marks_of(model.configs.get("scheduler", {})) if "unet" in others else {}
    tensors = Tensors(file.specs | marks, lambda key: marks[key] if key in marks else file[key])
    write_file(model.tensors, tensors, {}, target, check)


def write_folder(model: "StoredModel", target: Path, digests: Mapping[str, str]) -> None:
    """A diffusers folder, whole or not at all."""
    from lcm_jax.models.stable_diffusion import StableDiffusion
    from lcm_jax.weights import diffusers_folder as folders
    from lcm_jax.weights import trees
    from lcm_jax.weights.stored import get_specs

    if missing := sorted({"unet", "vae", "text_encoder"} - model.tensors.keys()):
        raise ModelError(
            f"{INPUT.value} has no {', '.join(missing)}, and a folder needs every component: name a model in diffusers "
            "layout that has them with --base"
        )
    if model.tokenizer is None:
        raise ModelError(f"{INPUT.value} has no tokenizer: name a {model.family} model in diffusers layout with --base")
    abstract = StableDiffusion.from_configs(model.configs).abstract_params()
    outlines = {name: get_specs(tensors) for name, tensors in model.tensors.items()}
    trees.all_params(outlines, abstract, INPUT.value)  # raises where they do not fit
    with folders.new_folder(target, OVERWRITE.value) as folder:
        with progress("writing", model.tensors) as advance:
            for name, tensors in model.tensors.items():
                folders.write_tensors(folder, name, model.configs[name], tensors, advance=advance)
        folders.write_surroundings(
            folder,
            model.configs,
            model.tokenizer,
            model.configs["scheduler"],
            model.index,
            xl="text_encoder_2" in model.tensors,
        )
        verify(digests, {name: folders.open_component(folder, name)[1] for name in model.tensors})


def write_orbax(model: "StoredModel", target: Path, digests: Mapping[str, str]) -> None:
    """A model as an orbax checkpoint with its configs, whole or not at all."""
    from flax.traverse_util import unflatten_dict

    from lcm_jax.weights import diffusers_folder as folders
    from lcm_jax.weights import orbax_folder, orbax_tree, single_file_configs

    if model.guessed:
        single_file_configs.complete(model.configs, model.family)
    about = {"family": model.family, "configs": model.configs, "index": model.index, "guessed": sorted(model.guessed)}
    with folders.new_folder(target, OVERWRITE.value) as folder:
        folders.write_json(folder / orbax_folder.CONFIGS, about)
        if model.tokenizer is not None:
            for name in ("tokenizer", "tokenizer_2"):
                if (path := model.tokenizer.with_name(name)).is_dir():
                    shutil.copytree(path, folder / name)
        parts = {name: orbax_folder.by_path(tensors) for name, tensors in model.tensors.items()}
        outline = {name: unflatten_dict(part.specs, sep=".") for name, part in parts.items()}

        def read(name):
            component, _, rest = name.partition(".")
            return parts[component][rest]

        logging.set_verbosity(logging.FATAL)  # orbax logs the trace of what it raises as well
        try:
            with progress("writing", model.tensors) as advance:
                orbax_tree.write_tree(folder / "checkpoints", outline, read, advance)
        except ModelError as error:
            raise write_error(target, error) from error
        verify(digests, orbax_folder.open_components(folder / "checkpoints", None)[1])


def verify(digests: Mapping[str, str], written: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Raises ModelError where what was read back is not what was to be written."""
    found = digests_of({name: written.get(name, {}) for name in digests}, "checking")
    if wrong := [name for name in digests if found[name] != digests[name]]:
        raise ModelError(
            f"{', '.join(wrong)} reads back as other numbers than were written; nothing was kept. Try again"
        )


def convert() -> None:
    """Reads the flags and writes the output. Raises ValueError (ModelError) before anything is written."""
    from lcm_jax.weights import diffusers_folder as folders
    from lcm_jax.weights import lora, lora_settings, orbax_folder, stored
    from lcm_jax.weights.model import open_model

    for flag in (INPUT, *(() if DRY_RUN.value else (OUTPUT, FORMAT))):
        if flag.value is None:
            raise ValueError(f"--{flag.name} is missing; see --help for an example")
    command.configure_jax()
    check_devices()
    if not DRY_RUN.value:
        check_target()
    source = Path(INPUT.value)
    adapter = (source / lora_settings.FILE).is_file()
    if adapter or source.is_file() and lora.is_lora(folders.open_file(source)[0]):
        return convert_lora(source)
    if FORMAT.value in LORA_FORMATS:
        raise ModelError(f"--format={FORMAT.value} is for LoRAs; {INPUT.value} has none by its keys")
    alone = FORMAT.value != "ldm" or MERGE.value or EMA.present or orbax_folder.find_run(source) is None
    if WITH_EMA.value and alone:
        raise ModelError("--with_ema writes a run to --format=ldm, without --merge and --ema; leave it out otherwise")
    how = {
        "base": BASE.value,
        "variant": VARIANT.value,
        "prediction_type": PREDICTION.value,
        "scaling_factor": SCALING.value,
    }
    model = open_model(INPUT.value, ema=False if WITH_EMA.value else EMA.value, **how)
    if COMPONENT.value is not None:
        if COMPONENT.value not in model.tensors:
            there = ", ".join(model.tensors)
            raise ModelError(f"--component={COMPONENT.value} is not in {INPUT.value}; it has {there}")
        if FORMAT.value == "diffusers":
            raise ModelError("--component works with ldm and orbax: a folder needs every component")
        model = replace(model, tensors={COMPONENT.value: model.tensors[COMPONENT.value]})
    if WITH_EMA.value:
        if "unet" not in model.tensors:
            raise ModelError(f"--with_ema is for a run that trains a UNet; {INPUT.value} trains none")
        averages = open_model(INPUT.value, ema=True, **how).tensors["unet"]
        model = replace(model, tensors={**model.tensors, AVERAGES: averages})
    digests = describe(model)
    if MERGE.value:
        model = merge(model)
    if DRY_RUN.value:
        return
    if DTYPE.value is not None:
        cast = {name: stored.cast(tensors, DTYPE.value) for name, tensors in model.tensors.items()}
        model = replace(model, tensors=cast)
    if MERGE.value or DTYPE.value is not None:
        digests = digests_of(model.tensors, "changing")
    check_space(Path(OUTPUT.value), model.tensors)
    write = {"ldm": write_ldm, "diffusers": write_folder, "orbax": write_orbax}[FORMAT.value]
    try:
        write(model, Path(OUTPUT.value), digests)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing unfinished is left") from None
    print(f"wrote {OUTPUT.value}, and read it back:")
    for name, digest in digests.items():
        print(f"  {name}: sha256 {digest[:16]}")


def run() -> None:
    """The command; exits as `command.run` does."""
    command.run(
        convert,
        FLAGS,
        lambda: f"{__doc__}\nOptions:{FLAGS.module_help(sys.modules[__name__])}",
        "use a machine with more memory",
        logging.ERROR,  # orbax warns of what it is told: to read only
    )


if __name__ == "__main__":
    run()
