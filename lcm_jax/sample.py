"""Generate images from text prompts with a diffusers model, or a bundled one (`shapes`, `shapes-lcm`).

Writes OUTPUT/000.png, 001.png, ... in the order of the prompts, each as soon as its batch is generated, and
OUTPUT/grid.png with --grid. Image i does not depend on the batch size.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from absl import flags

from lcm_jax import command
from lcm_jax.errors import check_devices
from lcm_jax.files import check_unicode, decode, whole_file

FLAGS = flags.FlagValues()  # of this command alone, so that others can be imported beside it
OWN: dict[str, Any] = {"flag_values": FLAGS}
MODEL = flags.DEFINE_string(
    "model",
    "shapes-lcm",
    "Folder in diffusers layout, hub id, bundled name (shapes, shapes-lcm), .safetensors or .ckpt file, workdir of a "
    "run, or orbax model.",
    **OWN,
)
BASE = flags.DEFINE_string(
    "base", None, "Model in diffusers layout that supplies what a file lacks: the tokenizer, networks.", **OWN
)
PROMPT = flags.DEFINE_multi_string("prompt", [], "Text prompt; repeat the flag for more.", **OWN)
PROMPTS_FILE = flags.DEFINE_string(
    "prompts_file", None, "Text file with one prompt per line; blank lines are skipped.", **OWN
)
NEGATIVE = flags.DEFINE_string("negative_prompt", None, "Prompt to guide away from; not supported by LCMs.", **OWN)
OUTPUT = flags.DEFINE_string("output", None, "Folder for the images.", **OWN)
STEPS = flags.DEFINE_integer(
    "num_inference_steps",
    4,
    "Number of denoising steps; an LCM supports 1 to its training grid size (shapes-lcm: 8).",
    **OWN,
)
GUIDANCE = flags.DEFINE_float("guidance_scale", 8.0, "Strength of guidance, as in diffusers; 1 is none.", **OWN)
SEED = flags.DEFINE_integer("seed", 0, "Random seed; the same seed gives the same images.", **OWN)
COPIES = flags.DEFINE_integer("num_images_per_prompt", 1, "Number of images of each prompt.", **OWN)
BATCH = flags.DEFINE_integer("batch_size", 8, "Images generated at once; lower it if memory runs out.", **OWN)
SAMPLER = flags.DEFINE_string(
    "sampler", None, "Sampler, such as lcm, ddim or dpmsolver++; defaults to the model's scheduler.", **OWN
)
CLIP_SKIP = flags.DEFINE_integer("clip_skip", None, "Last layers of the text encoder to skip, as in diffusers.", **OWN)
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16", "float16"], "Data type of the computation.", **OWN
)
LORA = flags.DEFINE_multi_string(
    "lora",
    [],
    "LoRAs to apply: LORA or LORA:WEIGHT; repeat it, or use commas, for more. LORA is a file, a folder that has one, "
    "the workdir of a run, or a bundled name (shapes-lcm-lora).",
    **OWN,
)
VARIANT = flags.DEFINE_string("variant", None, "Variant of the weight files to read, such as fp16.", **OWN)
HEIGHT = flags.DEFINE_integer("height", None, "Height in pixels; defaults to the model's.", **OWN)
WIDTH = flags.DEFINE_integer("width", None, "Width in pixels; defaults to the model's.", **OWN)
IMAGE = flags.DEFINE_string("image", None, "Image to repaint, for inpainting models.", **OWN)
MASK = flags.DEFINE_string("mask_image", None, "Mask image, for inpainting models; white pixels are repainted.", **OWN)
GRID = flags.DEFINE_bool("grid", False, "Also write grid.png.", **OWN)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace existing images.", **OWN)

EXAMPLE = """Example:

    python -m lcm_jax.sample --model=shapes-lcm --prompt="a red circle above a blue square" \\
        --num_inference_steps=4 --output=images
    python -m lcm_jax.sample --model=path/to/a/model --lora=style.safetensors:0.8,other.safetensors \\
        --prompt="a lighthouse" --output=images
    python -m lcm_jax.sample --model=path/to/an/inpainting/model --image=photo.png --mask_image=mask.png \\
        --prompt="a lighthouse" --output=images"""


def read_prompts(prompts: Sequence[str], file: str | None) -> list[str]:
    """Return the prompts of the flags, then the prompts of the file.

    Raises ValueError if there are none, and for bytes that are not text.
    """
    content = decode(Path(file).read_bytes(), file) if file else ""
    lines = content.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    given = [check_unicode(prompt, "--prompt") for prompt in prompts]
    given += [line.strip() for line in lines if line.strip()]
    if not given:
        where = f" in {file}" if file else ""
        raise ValueError(f"there are no prompts{where}; use --prompt=TEXT or --prompts_file=FILE")
    return given


def write_image(image, path: Path) -> None:
    """Write a PNG atomically: an interrupted command leaves no partial image."""
    with whole_file(path) as temporary:
        image.save(temporary, format="png")


def make_grid(images, columns: int):
    """Return one image of PIL images of one size, row by row."""
    from PIL import Image

    width, height = images[0].size
    grid = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height), "white")
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * width, i // columns * height))
    return grid


@contextmanager
def progress(total: int, every_seconds: float = 10.0) -> Iterator[Callable[[int], None]]:
    """Show speed and time left on stderr: a bar on a terminal, else a line every `every_seconds`.

    Yields update(done), done being the number of images so far. The speed excludes the first batch, which compiles.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, first = Console(stderr=True), None
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    # A bar and the names of files share a terminal only if rich prints both.
    redirect = {"redirect_stdout": sys.stdout.isatty(), "disable": not console.is_terminal}
    with Progress(*columns, console=console, **redirect) as bar:
        task, shown = bar.add_task("", total=total), time.monotonic()

        def update(done: int) -> None:
            nonlocal first, shown
            now = time.monotonic()
            if first is None:
                first = now, done
            rate = (done - first[1]) / (now - first[0]) if done > first[1] else None
            speed = "" if rate is None else f"{rate:.2f} images/s"
            bar.update(task, completed=done, description=speed)
            if bar.disable and rate is not None and (now - shown >= every_seconds or done == total):
                shown, left = now, (total - done) / rate
                print(f"{done}/{total} images  {speed}  {left // 60:.0f}:{left % 60:02.0f} left", file=sys.stderr)

        yield update


def check_output(output: Path, files: Sequence[Path]) -> None:
    """Raise ValueError if the output is not a folder, or one of `files` exists and --overwrite is not set."""
    if existing := [file for file in files if file.exists()]:
        if not OVERWRITE.value:
            raise ValueError(f"{existing[0]} exists already; use another --output, or pass --overwrite")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output={output} is a file; use a folder")


def sample() -> None:
    """Read the flags and write the images. Raises ValueError or OSError, almost always before anything is written."""
    if OUTPUT.value is None:
        raise ValueError("--output is missing; use --output=FOLDER")
    prompts, output = read_prompts(PROMPT.value, PROMPTS_FILE.value), Path(OUTPUT.value)
    for flag in (COPIES, BATCH):
        if flag.value < 1:
            raise ValueError(f"{flag.name} is {flag.value}; use 1 or more")
    prompts = [prompt for prompt in prompts for _ in range(COPIES.value)]
    total, batch = len(prompts), min(BATCH.value, len(prompts))
    digits = max(3, len(str(total - 1)))
    files = [output / f"{i:0{digits}d}.png" for i in range(total)]
    grid = output / "grid.png"
    check_output(output, [*files, *([grid] if GRID.value else [])])

    command.configure_jax()
    check_devices()
    from lcm_jax.data.images import open_upright
    from lcm_jax.pipeline import Pipeline
    from lcm_jax.weights import lora as loras

    files_given = {"image": IMAGE.value, "mask_image": MASK.value}
    given: dict[str, Any] = {name: open_upright(file) for name, file in files_given.items() if file is not None}

    pipe = Pipeline.from_pretrained(MODEL.value, DTYPE.value, VARIANT.value, base=BASE.value)
    for path, weight in loras.files_and_weights(LORA.value):
        print(f"with {pipe.load_lora(path, weight)} at {weight:g}")
    start, kept, done = time.perf_counter(), [], 0
    try:
        with progress(total) as update:
            for first in range(0, total, batch):
                images = pipe(
                    prompts[first : first + batch],
                    num_inference_steps=STEPS.value,
                    guidance_scale=GUIDANCE.value,
                    seed=SEED.value,
                    height=HEIGHT.value,
                    width=WIDTH.value,
                    sampler=SAMPLER.value,
                    negative_prompt=NEGATIVE.value,
                    clip_skip=CLIP_SKIP.value,
                    batch_size=batch,
                    first=first,
                    **given,
                ).images
                output.mkdir(parents=True, exist_ok=True)
                for image in images:
                    write_image(image, files[done])
                    print(files[done])
                    done += 1
                kept += images if GRID.value else []
                update(done)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{done} of {total} images are in {output}") from None
    seconds = time.perf_counter() - start
    if GRID.value:
        write_image(make_grid(kept, COPIES.value if COPIES.value > 1 else min(total, 8)), grid)
        print(grid)
    print(f"{total} images in {seconds:.2f} s, compilation included: {total / seconds:.2f} images/s")


def run() -> None:
    """Run the command; exits as `command.run` does."""
    command.run(
        sample,
        FLAGS,
        lambda: f"{__doc__}\nOptions:{FLAGS.module_help(sys.modules[__name__])}\n{EXAMPLE}",
        "lower --batch_size, --height or --width, or use --dtype=bfloat16",
    )


if __name__ == "__main__":
    run()
