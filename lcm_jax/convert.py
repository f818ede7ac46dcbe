"""Convert a model between diffusers' folder, the single file of A1111 and ComfyUI, and orbax checkpoints, bit-exact.

    python -m lcm_jax.convert --input=runs/sd/export --output=lcm.safetensors --format=ldm
    python -m lcm_jax.convert --input=model.ckpt --output=model --format=diffusers --base=path/to/any/sd15/folder
    python -m lcm_jax.convert --input=path/to/a/unet --output=model --format=diffusers --base=path/to/the/rest
    python -m lcm_jax.convert --input=runs/sd --output=student --format=diffusers --noema
    python -m lcm_jax.convert --input=style.safetensors --output=peft.safetensors --format=lora-peft --base=model
    python -m lcm_jax.convert --input=model --output=merged --format=diffusers --merge=style.safetensors:0.8
    python -m lcm_jax.convert --input=path/to/a/controlnet --output=controlnet.safetensors --format=ldm

It prints a description of the input, reads and writes one tensor at a time, and reads the result back; the output
appears when it is complete. A single file has no tokenizer and does not record the number of attention heads: --base
names a model in diffusers layout of the same family that supplies them. Precedence: command-line option, input file,
base. If the input is a part of a model (a folder, hub id or single file of a UNet, an autoencoder, text encoders),
--base supplies the rest. For a LoRA, a file or a folder that PEFT has saved, --base is the model that the LoRA belongs
to, which kohya's names require. float8 becomes float16, in which it is exact; keys of a single file that no network has
a place for are listed. --merge adds LoRAs to the output; the input stays unchanged. A ControlNet (folder, hub id or
single file) is converted alone, to diffusers or ldm; --base then supplies config values that a single file lacks.
For a run, the newest checkpoint is converted (--input=runs/sd/checkpoints/300: that one): the EMA weights, as in
exports, the student's own with --noema, or both in one file with --with_ema. --dry_run only describes the input.
"""

import sys
from typing import Any

from absl import flags

from lcm_jax import command

FORMATS = ("diffusers", "ldm", "orbax", "lora-kohya", "lora-peft")  # of conversion.py, which is imported late
FLAGS = flags.FlagValues()  # of this command alone, so that others can be imported beside it
OWN: dict[str, Any] = {"flag_values": FLAGS}
INPUT = flags.DEFINE_string(
    "input",
    None,
    "Folder in diffusers layout (also of a single network), hub id, bundled name, .safetensors or .ckpt file, LoRA, "
    "ControlNet, or workdir of a run.",
    **OWN,
)
OUTPUT = flags.DEFINE_string(
    "output", None, "Folder (diffusers, orbax) or .safetensors file (other formats) to write.", **OWN
)
FORMAT = flags.DEFINE_enum("format", None, FORMATS, "Format to write.", **OWN)
BASE = flags.DEFINE_string(
    "base",
    None,
    "Model in diffusers layout that supplies missing networks, tokenizer and config values; for a LoRA, the model that "
    "it belongs to.",
    **OWN,
)
MERGE = flags.DEFINE_multi_string(
    "merge", [], "LoRA to add: LORA or LORA:WEIGHT; repeat it, or use commas, for more.", **OWN
)
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16", "float16"], "Dtype to write; by default each tensor's own.", **OWN
)
COMPONENT = flags.DEFINE_string("component", None, "Write this component alone, such as unet.", **OWN)
VARIANT = flags.DEFINE_string("variant", None, "Variant of a folder's weight files to read, such as fp16.", **OWN)
EMA = flags.DEFINE_bool("ema", None, "Use EMA weights (runs: default on; single files: default off).", **OWN)
WITH_EMA = flags.DEFINE_bool(
    "with_ema", False, "Write a run's student together with its EMA weights to one file of --format=ldm.", **OWN
)
PREDICTION = flags.DEFINE_enum(
    "prediction_type",
    None,
    ["epsilon", "v_prediction"],
    "Prediction type; overrides the input and --base. Stable Diffusion 2 files do not record it.",
    **OWN,
)
SCALING = flags.DEFINE_float(
    "scaling_factor", None, "Scaling factor of the latents; overrides the input and --base.", **OWN
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Describe the input, and write nothing.", **OWN)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the output if it exists.", **OWN)


def convert() -> None:
    """Read the flags and write the output. Raises ValueError (ModelError) before anything is written."""
    for flag in (INPUT, *(() if DRY_RUN.value else (OUTPUT, FORMAT))):
        if flag.value is None:
            raise ValueError(f"--{flag.name} is missing; see --help for an example")
    command.configure_jax()
    # Imported late, so that --help and a mistyped option answer at once.
    from lcm_jax import conversion
    from lcm_jax.errors import check_devices

    check_devices()
    assert INPUT.value is not None  # checked above
    try:
        conversion.convert(
            INPUT.value,
            OUTPUT.value,
            FORMAT.value,
            base=BASE.value,
            merge=MERGE.value,
            dtype=DTYPE.value,
            component=COMPONENT.value,
            ema=EMA.value,
            with_ema=WITH_EMA.value,
            prediction_type=PREDICTION.value,
            scaling_factor=SCALING.value,
            variant=VARIANT.value,
            overwrite=OVERWRITE.value,
            dry_run=DRY_RUN.value,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing unfinished is left") from None


def run() -> None:
    """The command; exits as `command.run` does."""
    command.run(
        convert,
        FLAGS,
        lambda: f"{__doc__}\nOptions:{FLAGS.module_help(sys.modules[__name__])}",
        "use a machine with more memory",
    )


if __name__ == "__main__":
    run()
