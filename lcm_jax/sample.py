"""Make pictures from texts with a model in diffusers layout, or a shipped one (`shapes`, `shapes-lcm`).

Writes OUTPUT/000.png, 001.png, ... in the order of the prompts, and OUTPUT/grid.png with --grid.
"""

import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging

MODEL = flags.DEFINE_string("model", "shapes-lcm", "A folder in diffusers layout, or shapes, or shapes-lcm.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "What to draw; repeat it for several prompts.")
PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "A text file of prompts, one a line; blank lines are skipped.")
OUTPUT = flags.DEFINE_string("output", None, "The folder that the pictures go to.")
STEPS = flags.DEFINE_integer(
    "num_inference_steps",
    4,
    "Network evaluations a picture; an LCM makes 1 to as many as its own grid has (shapes-lcm: 8).",
)
GUIDANCE = flags.DEFINE_float("guidance_scale", 8.0, "How closely to follow the prompt, as in diffusers.")
SEED = flags.DEFINE_integer("seed", 0, "The same seed gives the same pictures.")
COPIES = flags.DEFINE_integer("num_images_per_prompt", 1, "Pictures of each prompt.")
SAMPLER = flags.DEFINE_enum(
    "sampler", None, ["lcm", "ddim", "dpmsolver++", "euler", "euler_ancestral"], "By default the model's own."
)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "What the networks compute in.")
LORA = flags.DEFINE_list("lora", [], "LoRA files to draw with, each FILE or FILE:WEIGHT, with commas between them.")
VARIANT = flags.DEFINE_string("variant", None, "The variant of the weight files to read, such as fp16.")
HEIGHT = flags.DEFINE_integer("height", None, "Pixels; by default the model's own.")
WIDTH = flags.DEFINE_integer("width", None, "Pixels; by default the model's own.")
IMAGE = flags.DEFINE_string("image", None, "For a model that inpaints: the picture to paint in.")
MASK = flags.DEFINE_string("mask_image", None, "With --image: a picture that is white where to paint, black elsewhere.")
GRID = flags.DEFINE_bool("grid", False, "Write grid.png too.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace pictures that are there already.")

EXAMPLE = """Example:

    python -m lcm_jax.sample --model=shapes-lcm --prompt="a red circle above a blue square" \\
        --num_inference_steps=4 --output=pictures
    python -m lcm_jax.sample --model=path/to/a/model --lora=style.safetensors:0.8,other.safetensors \\
        --prompt="a lighthouse" --output=pictures
    python -m lcm_jax.sample --model=path/to/an/inpainting/model --image=photo.png --mask_image=mask.png \\
        --prompt="a lighthouse" --output=pictures"""


def read_prompts(prompts: Sequence[str], file: str | None) -> list[str]:
    """The prompts of the flags, then those of the file. Raises ValueError when there are none."""
    lines = Path(file).read_text(encoding="utf-8").splitlines() if file else []
    found = [*prompts, *(line.strip() for line in lines if line.strip())]
    if not found:
        where = f" in {file}" if file else ""
        raise ValueError(f"there are no prompts{where}: give --prompt=TEXT or --prompts_file=FILE")
    return found


def write_picture(picture, path: Path) -> None:
    """Whole or not at all: a stopped command leaves no half picture behind."""
    temporary = path.with_name(f".{path.name}")
    picture.save(temporary, format="png")
    os.replace(temporary, path)


def make_grid(pictures, columns: int):
    """PIL pictures of one size -> one picture, row by row."""
    from PIL import Image

    width, height = pictures[0].size
    grid = Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * height), "white")
    for i, picture in enumerate(pictures):
        grid.paste(picture, (i % columns * width, i // columns * height))
    return grid


def sample() -> None:
    """Reads the flags and writes the pictures. Raises ValueError or OSError before anything is written."""
    prompts, output = read_prompts(PROMPT.value, PROMPTS_FILE.value), Path(OUTPUT.value)
    if COPIES.value < 1:
        raise ValueError(f"num_images_per_prompt is {COPIES.value}; give 1 or more")
    digits = max(3, len(str(len(prompts) * COPIES.value - 1)))
    files = [output / f"{i:0{digits}d}.png" for i in range(len(prompts) * COPIES.value)]
    grid = output / "grid.png"
    there = [file for file in [*files, *([grid] if GRID.value else [])] if file.exists()]
    if there and not OVERWRITE.value:
        raise ValueError(f"{there[0]} exists already; choose another --output, or pass --overwrite")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output={output} is a file; give a folder")

    from PIL import Image

    from lcm_jax import command
    from lcm_jax.pipeline import Pipeline
    from lcm_jax.weights import lora as loras

    command.configure_jax()
    given = {"image": IMAGE.value, "mask_image": MASK.value}
    given = {name: Image.open(file) for name, file in given.items() if file is not None}

    pipe = Pipeline.from_pretrained(MODEL.value, dtype=DTYPE.value, variant=VARIANT.value)
    for path, weight in map(loras.file_and_weight, LORA.value):
        print(f"with {pipe.load_lora(path, weight)} at {weight:g}")
    start = time.perf_counter()
    pictures = pipe(
        prompts, num_inference_steps=STEPS.value, guidance_scale=GUIDANCE.value, seed=SEED.value,
        num_images_per_prompt=COPIES.value, height=HEIGHT.value, width=WIDTH.value, sampler=SAMPLER.value, **given,
    ).images  # fmt: skip
    seconds = time.perf_counter() - start

    output.mkdir(parents=True, exist_ok=True)
    for picture, file in zip(pictures, files, strict=True):
        write_picture(picture, file)
        print(file)
    if GRID.value:
        write_picture(make_grid(pictures, COPIES.value if COPIES.value > 1 else min(len(pictures), 8)), grid)
        print(grid)
    rate = len(pictures) / seconds
    print(f"{len(pictures)} pictures in {seconds:.2f} s, compilation included: {rate:.2f} pictures/s")


def main(argv: list[str]) -> int:
    logging.set_verbosity(logging.WARNING)  # libraries speak at INFO
    if len(argv) > 1:
        print(f"error: unexpected argument {argv[1]!r}; options are written --name=value", file=sys.stderr)
        return 1
    try:
        sample()
    except (ValueError, OSError) as error:  # ModelError is a ValueError
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse(argv: list[str]) -> list[str]:
    """The flags; --help prints them with an example, and succeeds."""
    if any(option in argv for option in ("--help", "-help", "-h")):
        print(f"{__doc__}\nOptions:{flags.FLAGS.module_help(sys.modules[__name__])}\n{EXAMPLE}")
        sys.exit(0)
    rest = flags.FLAGS(argv)
    if OUTPUT.value is None:
        raise flags.ValidationError("--output is missing: name the folder that the pictures go to")
    return rest


def run() -> None:
    """The command; an option that does not exist is an error of one line that names the nearest one."""
    try:
        app.run(main, flags_parser=parse)
    except flags.Error as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run()
