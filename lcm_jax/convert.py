"""Convert a model between diffusers' folder and the single file of A1111 and ComfyUI, without losing a bit; a LoRA too.

    python -m lcm_jax.convert --input=runs/sd/export --output=lcm.safetensors --format=ldm
    python -m lcm_jax.convert --input=model.ckpt --output=model --format=diffusers --base=path/to/any/sd15/folder
    python -m lcm_jax.convert --input=style.safetensors --output=peft.safetensors --format=lora-peft --base=model
    python -m lcm_jax.convert --input=model --output=merged --format=diffusers --merge=style.safetensors:0.8

It says what it found, writes all or nothing, and reads the result back. A single file has no tokenizer, and does not
tell how many heads its attention has: --base names a model in diffusers layout of the same shape to take them from.
Of a LoRA it is the model that it belongs to, which kohya's names need. --merge adds LoRAs to what is written; the input
stays as it was, so that unmerging is to use it again.
--dry_run only says what it found.
"""

import hashlib
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags, logging

FORMATS = ("diffusers", "ldm", "lora-kohya", "lora-peft")
INPUT = flags.DEFINE_string("input", None, "A folder in diffusers layout, a shipped name, a .safetensors or a .ckpt.")
OUTPUT = flags.DEFINE_string("output", None, "The folder (diffusers) or the .safetensors file (all others) to write.")
FORMAT = flags.DEFINE_enum("format", None, FORMATS, "What to write.")
BASE = flags.DEFINE_string(
    "base", None, "A model in diffusers layout: of the same shape, for its tokenizer and configs; or a LoRA's own."
)
MERGE = flags.DEFINE_list("merge", [], "LoRA files to add, each FILE or FILE:WEIGHT, with commas between them.")
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "By default each tensor's own.")
COMPONENT = flags.DEFINE_string("component", None, "Only this component, such as unet; by default all of them.")
VARIANT = flags.DEFINE_string("variant", None, "The variant of a folder's weight files to read, such as fp16.")
EMA = flags.DEFINE_bool("ema", False, "Take the averaged weights of a single file that has both.")
PREDICTION = flags.DEFINE_enum(
    "prediction_type", None, ["epsilon", "v_prediction"], "What a single file of Stable Diffusion 2 predicts."
)
SCALING = flags.DEFINE_float("scaling_factor", None, "Of the latents of a single file that is an autoencoder alone.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Say what the input is, and write nothing.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the output if it is there already.")


class Model:
    """What an input holds: configs and tensors by component, under diffusers' keys, and where its tokenizer is."""

    def __init__(self, family: str, configs: dict, tensors: dict, tokenizer: Path | None, index: dict | None):
        self.family, self.configs, self.tensors = family, configs, tensors
        self.tokenizer, self.index = tokenizer, index


def read_file(path: Path) -> Model:
    """A single file. Raises ModelError where it is not one of a family that is known."""
    from lcm_jax.weights import diffusers_folder as folders
    from lcm_jax.weights import pickles, single_file

    pickled = path.suffix in (".ckpt", ".pt", ".bin")
    tensors = pickles.read_pickle(path) if pickled else folders.read_safetensors(path)
    family = single_file.recognise(tensors)
    configs = single_file.configs_of(tensors, family, PREDICTION.value, SCALING.value)
    return Model(family, configs, single_file.to_diffusers(tensors, family, EMA.value), None, None)


def read_folder(name: str) -> Model:
    """A diffusers folder, or a shipped name."""
    from lcm_jax.weights import diffusers_folder as folders

    folder = folders.locate(name)
    index = folders.read_index(folder)
    configs, tensors = {"model_index": index}, {}
    for part in folders.networks_of(index):
        configs[part], stored = folders.read_component(folder, part, VARIANT.value)
        modern = {folders.modern_key(part, key): tensor for key, tensor in stored.items()}
        tensors[part] = {key: tensor for key, tensor in modern.items() if key is not None}
    configs["scheduler"] = folders.read_json(folder / "scheduler" / "scheduler_config.json")
    return Model(family_of(configs), configs, tensors, folder / "tokenizer", index)


def family_of(configs: Mapping[str, Mapping[str, Any]]) -> str:
    """sd1, sd2 or sdxl, as single files tell them apart: by the text encoders."""
    if "text_encoder_2" in configs:
        return "sdxl"
    return "sd2" if configs["text_encoder"].get("hidden_act") == "gelu" else "sd1"


def digest(tensors: Mapping[str, np.ndarray]) -> str:
    """sha256 of a component's keys, dtypes, shapes and bytes, in hexadecimal."""
    total = hashlib.sha256()
    for key in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[key])
        total.update(f"{key} {tensor.dtype.name} {tensor.shape}".encode())
        total.update(tensor.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def narrow(tensors: dict[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """Every tensor in `dtype`. Raises ModelError that counts and names those of which a finite number overflows."""
    from lcm_jax.weights import diffusers_folder as folders

    with np.errstate(over="ignore"):
        cast = {key: tensor.astype(folders.np_dtype(dtype)) for key, tensor in tensors.items()}
    finite = lambda tensor: np.isfinite(tensor.astype(np.float32)).all()  # noqa: E731
    if bad := [key for key in cast if not finite(cast[key]) and finite(tensors[key])]:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise folders.ModelError(
            f"{len(bad)} tensors overflow in {dtype}: {', '.join(bad[:5])}{more}; use bfloat16 or float32"
        )
    return cast


def describe(model: Model) -> None:
    predicts = model.configs.get("scheduler", {}).get("prediction_type", "epsilon")
    print(f"{INPUT.value}: {model.family}, predicts {predicts}")
    for name, tensors in model.tensors.items():
        count = sum(tensor.size for tensor in tensors.values())
        dtypes = ", ".join(sorted({tensor.dtype.name for tensor in tensors.values()}))
        print(f"  {name}: {len(tensors)} tensors, {count:,} parameters, {dtypes}, sha256 {digest(tensors)[:16]}")


def keys_of(path: Path) -> list[str]:
    """The names of the tensors in a file. Raises ModelError where it is none."""
    from lcm_jax.weights import diffusers_folder as folders
    from lcm_jax.weights import pickles

    return list(
        pickles.read_pickle(path) if path.suffix in (".ckpt", ".pt", ".bin") else folders.read_safetensors(path)
    )


def read_lora(path: Path, base: Model | None):
    """The LoRA of a file, checked against the model it belongs to where there is one. Raises ModelError."""
    from safetensors import safe_open

    from lcm_jax.weights import diffusers_folder as folders
    from lcm_jax.weights import lora, pickles

    if path.suffix in (".ckpt", ".pt", ".bin"):
        tensors, metadata = pickles.read_pickle(path), {}
    else:
        tensors = folders.read_safetensors(path)
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
    metadata.pop("format", None)
    return lora.read_lora(tensors, metadata, base and base.tensors, base.family if base else "sd1")


def convert_lora(path: Path) -> None:
    """A LoRA in one naming to the other."""
    from lcm_jax.weights import diffusers_folder as folders
    from lcm_jax.weights import lora

    found = read_lora(path, None if BASE.value is None else read_folder(BASE.value))
    print(f"{path}: a LoRA")
    for component, updates in found.updates.items():
        ranks = sorted({len(update.down) for update in updates.values()})
        count = sum(update.down.size + update.up.size for update in updates.values())
        dtypes = ", ".join(sorted({update.down.dtype.name for update in updates.values()}))
        of = ", ".join(map(str, ranks))
        print(f"  {component}: {len(updates)} modules of rank {of}, {count:,} parameters, {dtypes}")
    if DRY_RUN.value:
        return
    if FORMAT.value not in ("lora-kohya", "lora-peft"):
        raise folders.ModelError(
            f"{path} is a LoRA: write it with --format=lora-kohya or lora-peft, or add it to a model with --merge"
        )
    if DTYPE.value is not None:
        raise folders.ModelError("--dtype is for models: a LoRA keeps its own")
    tensors, metadata = (lora.to_kohya if FORMAT.value == "lora-kohya" else lora.to_peft)(found)

    def check(temporary: Path) -> None:
        if digest(folders.read_safetensors(temporary)) != digest(tensors):
            raise folders.ModelError("the LoRA reads back as other numbers than were written; nothing was kept")

    write_safetensors(tensors, metadata, Path(OUTPUT.value), check)
    print(f"wrote {OUTPUT.value}, and read it back: sha256 {digest(tensors)[:16]}")


def merge(model: Model) -> None:
    """Adds every LoRA of --merge to the tensors of `model`."""
    from lcm_jax.weights import diffusers_folder as folders
    from lcm_jax.weights import lora

    chosen = []
    for each in MERGE.value:
        path, _, weight = each.rpartition(":") if ":" in each else (each, "", "1")
        try:
            chosen.append((read_lora(Path(path), model), float(weight)))
        except ValueError as error:
            if isinstance(error, folders.ModelError):
                raise
            raise folders.ModelError(f"--merge={each}: {weight!r} is no number; write FILE or FILE:WEIGHT") from None
        print(f"merging {path} at {float(weight):g}")
    model.tensors = lora.merge(model.tensors, chosen)


def write_file(model: Model, target: Path) -> None:
    """A model in one .safetensors file."""
    from lcm_jax.weights import diffusers_folder as folders
    from lcm_jax.weights import single_file

    write_safetensors(
        single_file.to_ldm(model.tensors, model.family), {}, target,
        lambda temporary: verify(model, single_file.to_diffusers(folders.read_safetensors(temporary), model.family)),
    )  # fmt: skip


def write_safetensors(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], target: Path, check) -> None:
    """One file, whole or not at all; check(path) raises ModelError where what was written does not read back."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    from lcm_jax.weights import diffusers_folder as folders

    if target.exists() and not OVERWRITE.value:
        raise folders.ModelError(f"{target} exists already; choose another --output, or pass --overwrite")
    if target.suffix != ".safetensors":
        raise folders.ModelError(f"--output={target} must end in .safetensors: pickles are read, never written")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        os.close(handle)
    except OSError as error:
        raise folders.ModelError(f"{target} cannot be written ({error}); choose another place") from None
    try:
        contiguous = {key: np.asarray(value, order="C") for key, value in tensors.items()}  # keeps a scalar's shape
        save_file(contiguous, temporary, {"format": "pt", **metadata})
        check(Path(temporary))
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        raise folders.ModelError(f"writing {target} failed ({error}); what was there is untouched") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def write_folder(model: Model, target: Path) -> None:
    """A diffusers folder, whole or not at all."""
    from lcm_jax.models.stable_diffusion import StableDiffusion
    from lcm_jax.weights import diffusers_folder as folders

    if model.tokenizer is None:
        if BASE.value is None:
            raise folders.ModelError(
                f"{INPUT.value} has no tokenizer: name a {model.family} model in diffusers layout with --base"
            )
        take_base(model, read_folder(BASE.value))
    abstract = StableDiffusion.from_configs(model.configs).abstract_params()
    if missing := sorted(abstract.keys() - model.tensors.keys()):
        raise folders.ModelError(f"{INPUT.value} has no {', '.join(missing)}: a folder needs every component")
    params = {name: folders.to_params(name, model.tensors[name], abstract[name], INPUT.value) for name in abstract}
    with folders.new_folder(target, OVERWRITE.value) as folder:
        folders.write_pipeline(
            folder, model.configs, params, model.tokenizer, model.configs["scheduler"], index=model.index
        )
        verify(model, {name: folders.read_component(folder, name)[1] for name in model.tensors})


def take_base(model: Model, base: Model) -> None:
    """What a single file does not tell comes from `base`: the tokenizer, heads, groups of the norms, the scaling."""
    from lcm_jax.weights import diffusers_folder as folders

    if base.family != model.family:
        raise folders.ModelError(
            f"--base={BASE.value} is {base.family} and {INPUT.value} {model.family}; name a base of the same family"
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


def verify(model: Model, written: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Raises ModelError where what was read back is not what was to be written."""
    from lcm_jax.weights import diffusers_folder as folders

    for name, tensors in model.tensors.items():
        if digest(tensors) != digest(written.get(name, {})):
            raise folders.ModelError(
                f"{name} reads back as other numbers than were written; nothing was kept. Try again"
            )


def convert() -> None:
    """Reads the flags and writes the output. Raises ValueError (ModelError) before anything is written."""
    from lcm_jax.weights import diffusers_folder as folders
    from lcm_jax.weights import lora

    source = Path(INPUT.value)
    if source.is_file() and lora.is_lora(keys_of(source)):
        return convert_lora(source)
    if FORMAT.value in ("lora-kohya", "lora-peft"):
        raise folders.ModelError(f"--format={FORMAT.value} is for LoRAs; {INPUT.value} has none by its keys")
    model = read_file(source) if source.is_file() else read_folder(INPUT.value)
    if COMPONENT.value is not None:
        if COMPONENT.value not in model.tensors:
            there = ", ".join(model.tensors)
            raise folders.ModelError(f"--component={COMPONENT.value} is not in {INPUT.value}; it has {there}")
        if FORMAT.value == "diffusers":
            raise folders.ModelError("--component works with --format=ldm: a folder needs every component")
        model.tensors = {COMPONENT.value: model.tensors[COMPONENT.value]}
    describe(model)
    if MERGE.value:
        merge(model)
    if DRY_RUN.value:
        return
    if DTYPE.value is not None:
        model.tensors = {name: narrow(tensors, DTYPE.value) for name, tensors in model.tensors.items()}
    (write_file if FORMAT.value == "ldm" else write_folder)(model, Path(OUTPUT.value))
    print(f"wrote {OUTPUT.value}, and read it back:")
    for name, tensors in model.tensors.items():
        print(f"  {name}: sha256 {digest(tensors)[:16]}")


def main(argv: list[str]) -> int:
    logging.set_verbosity(logging.WARNING)  # libraries speak at INFO
    if len(argv) > 1:
        print(f"error: unexpected argument {argv[1]!r}; options are written --name=value", file=sys.stderr)
        return 1
    try:
        convert()
    except (ValueError, OSError) as error:  # ModelError is a ValueError
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse(argv: list[str]) -> list[str]:
    """The flags; --help prints them with an example, and succeeds."""
    if any(option in argv for option in ("--help", "-help", "-h")):
        print(f"{__doc__}\nOptions:{flags.FLAGS.module_help(sys.modules[__name__])}")
        sys.exit(0)
    rest = flags.FLAGS(argv)
    for flag in (INPUT, *(() if DRY_RUN.value else (OUTPUT, FORMAT))):
        if flag.value is None:
            raise flags.ValidationError(f"--{flag.name} is missing; see --help for an example")
    return rest


def run() -> None:
    """The command; an option that does not exist is an error of one line that names the nearest one."""
    try:
        app.run(main, flags_parser=parse)
    except flags.Error as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run()
