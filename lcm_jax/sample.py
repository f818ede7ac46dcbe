"""Generate images from text prompts with a diffusers model, or a bundled one (`shapes`, `shapes-lcm`).

Writes OUTPUT/000.png, 001.png, ... in the order of the prompts, each as soon as its batch is generated, and
OUTPUT/grid.png with --grid. Every PNG has its settings in it, as A1111's text and as JSON, from which --from_png
repeats the image bit for bit on the same kind of device.
"""

import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

import lcm_jax
from lcm_jax import command, compiler
from lcm_jax.errors import check_devices
from lcm_jax.files import check_unicode, decode
from lcm_jax.progress import progress
from lcm_jax.sampling.settings import Control, File, Lora, Settings

if TYPE_CHECKING:
    from lcm_jax.pipeline import Pipeline

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
VAE = flags.DEFINE_string(
    "vae", None, "Autoencoder in place of the model's own, in any format, such as the tiny TAESD.", **OWN
)
PROMPT = flags.DEFINE_multi_string("prompt", [], "Text prompt; repeat the flag for more.", **OWN)
PROMPTS_FILE = flags.DEFINE_string(
    "prompts_file", None, "Text file with one prompt per line; blank lines are skipped. - is the standard input.", **OWN
)
WEIGHTS = flags.DEFINE_bool(
    "prompt_weights",
    False,
    "Read (text), (text:1.3), [text] and BREAK in prompts as A1111 does; otherwise brackets are text.",
    **OWN,
)
NEGATIVE = flags.DEFINE_string("negative_prompt", None, "Prompt to guide away from; not supported by LCMs.", **OWN)
OUTPUT = flags.DEFINE_string("output", None, "Folder for the images.", **OWN)
STEPS = flags.DEFINE_integer(
    "num_inference_steps",
    None,
    "Number of denoising steps, by default the model's; an LCM supports 1 to its training grid size (shapes-lcm: 8).",
    **OWN,
)
GUIDANCE = flags.DEFINE_float(
    "guidance_scale", None, "Strength of guidance, as in diffusers; 1 is none; by default the model's.", **OWN
)
SEED = flags.DEFINE_integer("seed", 0, "Random seed; the same seed gives the same images.", **OWN)
COPIES = flags.DEFINE_integer("num_images_per_prompt", 1, "Number of images of each prompt.", **OWN)
BATCH = flags.DEFINE_integer("batch_size", 8, "Images generated at once; lower it if memory runs out.", **OWN)
SAMPLER = flags.DEFINE_string(
    "sampler", None, "Sampler, such as lcm, ddim or dpmsolver++; by default the model's.", **OWN
)
ETA = flags.DEFINE_float("eta", None, "Noise that ddim (default 0) and tcd (0.3) add, 0 to 1.", **OWN)
CLIP_SKIP = flags.DEFINE_integer("clip_skip", None, "Last layers of the text encoder to skip, as in diffusers.", **OWN)
DTYPE = flags.DEFINE_enum(
    "dtype",
    "float32",
    ["float32", "bfloat16", "float16", "int8", "fp8"],
    "Data type of the computation; int8 and fp8 are quantized, and need the extra `quantized`.",
    **OWN,
)
LORA = flags.DEFINE_multi_string(
    "lora",
    [],
    "LoRAs to apply: LORA or LORA:WEIGHT; repeat it, or use commas, for more. LORA is a file, a folder that has one, "
    "the workdir of a run, or a bundled name (shapes-lcm-lora).",
    **OWN,
)
CONTROL = flags.DEFINE_multi_string(
    "control",
    [],
    "ControlNet, the image that it follows, and the scale of what it adds (default 1): MODEL:IMAGE:SCALE; repeat it "
    "for more.",
    **OWN,
)
VARIANT = flags.DEFINE_string("variant", None, "Variant of the weight files to read, such as fp16.", **OWN)
VAE_TILING = flags.DEFINE_bool(
    "vae_tiling", False, "Decode and encode large images in tiles, which takes less memory.", **OWN
)
HEIGHT = flags.DEFINE_integer("height", None, "Height in pixels; defaults to the model's.", **OWN)
WIDTH = flags.DEFINE_integer("width", None, "Width in pixels; defaults to the model's.", **OWN)
IMAGE = flags.DEFINE_string("image", None, "Image to change, or to repaint where --mask_image is white.", **OWN)
MASK = flags.DEFINE_string("mask_image", None, "Mask image: white pixels of --image are repainted.", **OWN)
STRENGTH = flags.DEFINE_float(
    "strength", None, "Share of noise that --image gets, up to 1; by default 0.8, or 1 with a mask.", **OWN
)
CROP = flags.DEFINE_integer(
    "padding_mask_crop",
    None,
    "Generate only the surroundings of the mask, with this margin in pixels, and paste them into --image.",
    **OWN,
)
FROM_PNG = flags.DEFINE_string(
    "from_png",
    None,
    "PNG of this command, or of A1111 and its kin, whose settings are used; flags beside it override them.",
    **OWN,
)
GRID = flags.DEFINE_bool("grid", False, "Also write grid.png.", **OWN)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace existing images.", **OWN)
PROFILE = flags.DEFINE_string(
    "profile", None, "New folder for a profile of another call, for python -m lcm_jax.profile.", **OWN
)

EXAMPLE = """Example:

    python -m lcm_jax.sample --model=shapes-lcm --prompt="a red circle above a blue square" \\
        --num_inference_steps=4 --output=images
    python -m lcm_jax.sample --model=path/to/a/model --lora=style.safetensors:0.8,other.safetensors \\
        --prompt="a lighthouse" --output=images
    python -m lcm_jax.sample --model=path/to/a/model --image=photo.png --mask_image=mask.png --strength=0.8 \\
        --prompt="a lighthouse" --output=images
    python -m lcm_jax.sample --model=path/to/a/model --control=path/to/a/controlnet:edges.png:0.8 \\
        --prompt="a lighthouse" --output=images
    python -m lcm_jax.sample --from_png=images/000.png --output=again"""

# Flags whose values are fields of the settings, and the first of these arguments of the pipeline, under the same names.
ARGUMENTS = """negative_prompt prompt_weights num_inference_steps guidance_scale seed sampler clip_skip eta strength
padding_mask_crop width height""".split()
FIELDS = [*ARGUMENTS, *"model base variant vae vae_tiling dtype".split()]


def read_prompts(prompts: Sequence[str], file: str | None) -> list[str]:
    """Return the prompts of the flags, then the prompts of the file, - for the standard input.

    Raises ValueError for bytes that are not text.
    """
    content = ""
    if file == "-":
        content = decode(sys.stdin.buffer.read(), "the standard input")
    elif file:
        content = decode(Path(file).read_bytes(), file)
    lines = content.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    given = [check_unicode(prompt, "--prompt") for prompt in prompts]
    return given + [line.strip() for line in lines if line.strip()]


def choose_settings(recorded: Settings | None) -> Settings:
    """Return the settings that all images share: of the flags that are set, else those recorded, else the defaults.

    Raises OSError for an image that cannot be read, and ValueError for --lora or --control that cannot be parsed.
    """
    from lcm_jax.weights import lora as loras

    chosen = Settings("") if recorded is None else recorded
    fields: dict[str, Any] = {}
    for name in FIELDS:
        flag = FLAGS[name]
        if flag.present or recorded is None or getattr(recorded, name) is None:
            fields[name] = flag.value
    for flag, name in ((IMAGE, "image"), (MASK, "mask_image")):
        path = flag.value if FLAGS[flag.name].present else getattr(getattr(chosen, name), "path", None)
        fields[name] = None if path is None else File.of(path)
    pairs = [(lora.file.path, lora.weight) for lora in chosen.loras]
    if FLAGS[LORA.name].present:
        pairs = [(str(file), weight) for file, weight in loras.files_and_weights(LORA.value)]
    if FLAGS[CONTROL.name].present:
        fields["controls"] = tuple(map(Control.parse, CONTROL.value))
    else:
        fields["controls"] = tuple(replace(each, image=File.of(each.image.path)) for each in chosen.controls)
    fields["loras"] = tuple(Lora(File.of(path, loras.find_file(path)), weight) for path, weight in pairs)
    return replace(chosen, **fields)


def check_output(output: Path, files: Sequence[Path]) -> None:
    """Raise ValueError if the output is not a folder, or one of `files` exists and --overwrite is not set."""
    if existing := [file for file in files if file.exists()]:
        if not OVERWRITE.value:
            raise ValueError(f"{existing[0]} exists already; use another --output, or pass --overwrite")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output={output} is a file; use a folder")


def open_images(settings: Settings) -> dict[str, Any]:
    """Return the images of the settings, and the scales of control images, as arguments of the pipeline.

    Raises ImageError.
    """
    from lcm_jax.data.images import open_upright

    files = {"image": settings.image, "mask_image": settings.mask_image}
    images: dict[str, Any] = {name: open_upright(file.path) for name, file in files.items() if file is not None}
    if settings.controls:
        images["control_image"] = [open_upright(control.image.path) for control in settings.controls]
        images["controlnet_conditioning_scale"] = [control.scale for control in settings.controls]
    return images


def open_pipeline(settings: Settings) -> tuple["Pipeline", Settings]:
    """Return the pipeline with its LoRAs, and the settings with the model's defaults, the device and the versions.

    Raises ModelError.
    """
    import jax

    from lcm_jax.pipeline import Pipeline
    from lcm_jax.weights.controlnet import open_controlnet
    from lcm_jax.weights.model import fingerprint, open_model, replace_vae

    s = settings
    stored = open_model(s.model or MODEL.default, base=s.base, variant=s.variant)
    stored = stored if s.vae is None else replace_vae(stored, open_model(s.vae))
    nets = [open_controlnet(control.model) for control in s.controls]
    pipe = Pipeline(stored, s.dtype or DTYPE.default, controlnet=nets)
    if s.vae_tiling:
        pipe.enable_vae_tiling()
    for lora in s.loras:
        print(f"with {pipe.load_lora(lora.file.path, lora.weight)} at {lora.weight:g}")
    pairs = zip(s.controls, nets, strict=True)
    steps, scale = s.num_inference_steps, s.guidance_scale
    return pipe, replace(
        s,
        num_inference_steps=pipe.preset.num_inference_steps if steps is None else steps,
        guidance_scale=pipe.preset.guidance_scale if scale is None else scale,
        sampler=s.sampler or pipe.sampler,
        fingerprint=fingerprint(stored),
        controls=tuple(replace(control, fingerprint=fingerprint(net)) for control, net in pairs),
        device=jax.devices()[0].device_kind,
        jax=jax.__version__,
        version=lcm_jax.__version__,
    )


def sample() -> None:
    """Read the flags and write the images. Raises ValueError or OSError, almost always before anything is written."""
    from lcm_jax.sampling import png

    if OUTPUT.value is None:
        raise ValueError("--output is missing; use --output=FOLDER")
    source = FROM_PNG.value
    recorded = None if source is None else png.read(source)
    prompts = read_prompts(PROMPT.value, PROMPTS_FILE.value) or ([] if recorded is None else [recorded.prompt])
    if not prompts:
        where = {None: "", "-": " in the standard input"}.get(PROMPTS_FILE.value, f" in {PROMPTS_FILE.value}")
        raise ValueError(f"there are no prompts{where}; use --prompt=TEXT or --prompts_file=FILE (- to read a pipe)")
    for flag in (COPIES, BATCH):
        if flag.value < 1:
            raise ValueError(f"{flag.name} is {flag.value}; use 1 or more")
    prompts = [prompt for prompt in prompts for _ in range(COPIES.value)]
    total, output = len(prompts), Path(OUTPUT.value)
    digits = max(3, len(str(total - 1)))
    files = [output / f"{i:0{digits}d}.png" for i in range(total)]
    grid = output / "grid.png"
    check_output(output, [*files, *([grid] if GRID.value else [])])

    # An image is repeated in the row of a batch that it was in: a device may round differently in another one.
    batch, row, number = min(BATCH.value, total), 0, 0
    if recorded is not None:
        number = recorded.number
        if not FLAGS[BATCH.name].present:
            batch, row = recorded.batch_size, recorded.row
    settings = choose_settings(recorded)
    command.configure_jax()
    check_devices()
    tracer = None
    if PROFILE.value is not None:
        from lcm_jax.profiling.trace import Tracer

        tracer = Tracer(Path(PROFILE.value), settings.dtype or DTYPE.default)
    arguments = open_images(settings)
    pipe, settings = open_pipeline(settings)
    arguments |= {name: getattr(settings, name) for name in ARGUMENTS} | {"progress": False}

    start, kept, done = time.perf_counter(), [], 0
    rows = [prompts[0]] * row + prompts

    def generate(first: int):
        return pipe(rows[first : first + batch], batch_size=batch, first=number - row + first, **arguments).images

    try:
        with progress(total) as update, compiler.watch_cache() as cache:
            for first in range(0, len(rows), batch):
                given = rows[first : first + batch]
                images = generate(first)
                output.mkdir(parents=True, exist_ok=True)
                for i in range(row if first == 0 else 0, len(given)):
                    own = replace(settings, prompt=given[i], number=number - row + first + i, row=i, batch_size=batch)
                    if own.padding_mask_crop is None:  # otherwise the image has the size of --image
                        own = replace(own, width=images[i].width, height=images[i].height)
                    png.write(images[i], files[done], own)
                    print(files[done])
                    if source is not None and done == 0:
                        same, text = png.compare(source, own, images[i])
                        if same:
                            print(text)
                        else:
                            warnings.warn(text, stacklevel=1)
                    done += 1
                    kept += [images[i]] if GRID.value else []
                update(done)
                if first == 0 and cache.loaded:
                    print(cache)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{done} of {total} images are in {output}") from None
    seconds = time.perf_counter() - start
    if GRID.value:
        from lcm_jax.sampling.preview import make_grid

        png.write(make_grid(kept, COPIES.value if COPIES.value > 1 else min(total, 8)), grid)
        print(grid)
    print(f"{total} image{'s' * (total > 1)} in {seconds:.2f} s, compilation included: {total / seconds:.2f} images/s")
    if tracer is not None:
        tracer.start()
        generate(0)  # which the first time compiled
        print(tracer.stop(runs=1))


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
