"""Compare models by metrics, with images of the same held-out captions from the same noise.

Prints a row for each model, sampler and number of steps: speed, the verifier's score and the Frechet distance to real
images. --config takes a bundled config (`eval/shapes`) or a file; its keys can be set by --config.group.key=value.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from lcm_jax import command, config_files
from lcm_jax.errors import check_devices

FLAGS = flags.FlagValues()  # of this command alone, so that others can be imported beside it
OWN: dict[str, Any] = {"flag_values": FLAGS}
MODEL = flags.DEFINE_multi_string(
    "model",
    ["shapes", "shapes-lcm"],
    "A model as lcm_jax.sample opens it: a folder, hub id, bundled name, file or run; repeat the flag for more.",
    **OWN,
)
BASE = flags.DEFINE_string(
    "base", None, "Model in diffusers layout that supplies the tokenizer and configs of single files.", **OWN
)
PLAN = flags.DEFINE_multi_string(
    "plan",
    [],
    "SAMPLER:STEPS, such as ddim:8,50, for the models that support the sampler; repeat the flag for more samplers. "
    "A model that supports none of them has its own sampler's plan: lcm:1,2,4,8, others 4,8,50.",
    **OWN,
)
CONFIG = config_flags.DEFINE_config_file("config", None, "A bundled config or a file; by default eval/shapes.", **OWN)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "Compute dtype of the models.", **OWN)
OUTPUT = flags.DEFINE_string("output", None, "The folder for report.json and report.md; by default none.", **OWN)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace reports that exist already.", **OWN)

EXAMPLE = """Example:

    python -m lcm_jax.evaluate --model=shapes --model=runs/shapes/export --plan=ddim:8,50 --output=runs/comparison
    python -m lcm_jax.evaluate --model=shapes-lcm --plan=lcm:4 --config.report.prompts=600"""

Plan = Mapping[str, Sequence[int]]
DEFAULT_STEPS = {"lcm": (1, 2, 4, 8), "tcd": (1, 2, 4, 8)}
OTHER_STEPS = (4, 8, 50)


def read_plan(entries: Sequence[str], samplers: Sequence[str]) -> Plan:
    """Return {sampler: steps} of the entries of --plan. Raises ValueError for one that is not supported."""
    plan: dict[str, tuple[int, ...]] = {}
    for entry in entries:
        sampler, _, numbers = entry.partition(":")
        if sampler not in samplers:
            raise ValueError(f"--plan={entry}: sampler {sampler!r} is not supported; use one of {', '.join(samplers)}")
        if sampler in plan:
            raise ValueError(f"--plan={entry}: sampler {sampler!r} is given twice; use one flag for all its steps")
        steps = numbers.split(",")
        if not all(number.isdecimal() for number in steps):
            raise ValueError(f"--plan={entry} is not supported; use SAMPLER:STEPS, such as ddim:8,50")
        plan[sampler] = tuple(map(int, steps))
    return plan


def plan_of(name: str, model, plan: Plan, size: int) -> Plan:
    """Return the part of the plan that a StableDiffusion supports, or its default plan if there is none.

    Raises ValueError, which names the model, if it cannot sample by this plan or images of this size.
    """
    from lcm_jax.diffusion.samplers import SAMPLERS
    from lcm_jax.sampling.generate import default_sampler, is_consistency_model, sampler_table

    if model.inpaints:
        raise ValueError(f"{name} is an inpainting model, which is not supported; use a text-to-image model")
    if size % model.downscale:
        raise ValueError(f"data.size {size} is not supported by {name}; use a multiple of {model.downscale}")
    few_steps = is_consistency_model(model)
    own = {sampler: steps for sampler, steps in plan.items() if SAMPLERS[sampler].consistency == few_steps}
    try:
        if not own:
            sampler = default_sampler(model)
            own = {sampler: DEFAULT_STEPS.get(sampler, OTHER_STEPS)}
        for sampler, numbers in own.items():
            for steps in numbers:
                sampler_table(model, sampler, steps)
    except ValueError as error:
        raise ValueError(f"{name} cannot sample by this plan: {error}; use --plan") from None
    return own


def check_output(output: Path | None) -> None:
    """Raise ValueError if the output is a file, or has a report without --overwrite."""
    if output is None:
        return
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output={output} is a file; use a folder")
    for file in (output / "report.json", output / "report.md"):
        if file.exists() and not OVERWRITE.value:
            raise ValueError(f"{file} exists already; use another --output, or --overwrite")


@contextmanager
def progress(total: int) -> Iterator[Callable[[str, int], None]]:
    """Show a bar with the time left on stderr if it is a terminal.

    total: of sampling steps for all images. Yields a function of a row's name and of the steps that were done for it.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    # A bar and the rows share a terminal only if rich prints both.
    redirect = {"redirect_stdout": sys.stdout.isatty(), "disable": not console.is_terminal, "transient": True}
    with Progress(*columns, console=console, **redirect) as bar:
        task = bar.add_task("", total=total)
        yield lambda row, steps: bar.update(task, advance=steps, description=row)


def open_models(names: Sequence[str], plan: Plan, size: int) -> list:
    """Return (name, stored model, its plan) of each model; no tensor is read.

    Raises ValueError as `plan_of` does, and for unused samplers.
    """
    from lcm_jax.models.stable_diffusion import StableDiffusion
    from lcm_jax.weights.model import check_complete, open_model

    models = []
    for name in names:
        stored = open_model(name, base=BASE.value if Path(name).is_file() else None)
        check_complete(stored)
        models.append((name, stored, plan_of(name, StableDiffusion.from_configs(stored.configs), plan, size)))
    if unused := plan.keys() - {sampler for _, _, own in models for sampler in own}:
        raise ValueError(f"--plan: no model supports sampler {min(unused)!r}; remove it, or add a model that does")
    return models


def prepare_metrics(config) -> dict:
    """Return the metrics that the config names, with real images of `shapes`, encoded by `config.autoencoder`."""
    from lcm_jax.data.shapes import Shapes
    from lcm_jax.evaluation.evaluate import MAX_TRAIN_IMAGES, make_resources
    from lcm_jax.evaluation.frechet import encoder_features
    from lcm_jax.evaluation.metrics import make_metrics
    from lcm_jax.models.stable_diffusion import StableDiffusion
    from lcm_jax.weights.model import open_model, read_params

    stored, size, batch = open_model(config.autoencoder), config.data.size, config.report.batch_size
    model = StableDiffusion.from_configs(stored.configs)
    if size % model.downscale:
        raise ValueError(
            f"data.size {size} is not supported by autoencoder {config.autoencoder}; use a multiple of "
            f"{model.downscale}"
        )
    reference, style = config.report.reference, config.data.get("style", "fill")
    held_out, train = Shapes("test", reference, size, style=style), Shapes("train", MAX_TRAIN_IMAGES, size, style=style)
    features = encoder_features(model, read_params(stored, "vae", model.abstract_params()["vae"]), batch)
    return make_metrics(config.metrics, make_resources(features, held_out, reference, train, batch))


def measure_models(
    models: Sequence, prompts: Sequence[str], metrics: Mapping, config
) -> tuple[list[dict], dict[str, float]]:
    """Return the rows of all models, and their guidance scales.

    Each row is printed when it is done, with the time left by its speed.
    """
    from lcm_jax.evaluation import report
    from lcm_jax.evaluation.evaluate import evaluate
    from lcm_jax.pipeline import Pipeline
    from lcm_jax.sampling.generate import effective_guidance_scale
    from lcm_jax.sampling.preview import PreviewSampler

    rows: list[dict] = []
    scales = {}
    steps_left = sum(sum(steps) for _, _, plan in models for steps in plan.values())
    total = sum(len(steps) for _, _, plan in models for steps in plan.values())
    all_steps, began = steps_left, time.monotonic()
    settings = config.report
    with progress(steps_left * len(prompts)) as update:
        for name, stored, plan in models:
            pipe = Pipeline(stored, DTYPE.value)  # one model at a time is on the device
            preview = PreviewSampler(
                pipe.model, pipe.tokenize, prompts, config.data.size, settings.batch_size, seed=settings.seed
            )

            scale = settings.guidance_scale or pipe.preset.guidance_scale
            scale = scales[name] = effective_guidance_scale(pipe.model, scale)

            def draw(sampler, steps, name=name, preview=preview, params=pipe.params, scale=scale):
                update(f"{name} {sampler} {steps}", 0)
                for images, seconds in preview.batches(params, sampler, steps, scale):
                    yield images, seconds
                    update(f"{name} {sampler} {steps}", steps * len(images))

            for row in evaluate(draw, plan, prompts, metrics):
                rows.append({"model": name} | row)
                steps_left -= row["steps"]
                seconds = (time.monotonic() - began) / (all_steps - steps_left) * steps_left
                left = f"; about {seconds // 60:.0f}:{seconds % 60:02.0f} left" if steps_left else ""
                print(
                    f"{len(rows)}/{total}  {report.line(rows[-1], report.columns_of(report.describe(metrics)))}{left}"
                )
    return rows, scales


def evaluate() -> None:
    """Read the flags, print the rows, and write the report. Raises ValueError or OSError, as a rule before any work."""
    config, names = CONFIG.value, MODEL.value
    output = None if OUTPUT.value is None else Path(OUTPUT.value)
    check_output(output)
    if duplicates := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"--model={duplicates[0]} is given twice; use each model once")

    command.configure_jax()
    check_devices()
    from lcm_jax.data.shapes import evaluation_prompts
    from lcm_jax.diffusion.samplers import SAMPLERS
    from lcm_jax.evaluation import report
    from lcm_jax.recipes import settings

    settings.check(config, groups=("autoencoder", "metrics", "data", "report"))
    settings.check_keys(config, [config_files.load("eval/shapes")])
    if config.data.source != "shapes":
        raise ValueError(f"data.source {config.data.source!r} is not supported; use shapes")
    models = open_models(names, read_plan(PLAN.value, tuple(SAMPLERS)), config.data.size)
    start = time.monotonic()
    prompts = evaluation_prompts("test", config.report.prompts)
    metrics = prepare_metrics(config)
    rows, scales = measure_models(models, prompts, metrics, config)
    result = {"models": report.nest(rows)} | report.describe(metrics) | report.environment()
    result |= {"captions": len(prompts), "guidance_scales": scales, "settings": config.to_dict()}
    result |= {"seconds": {"report": round(time.monotonic() - start, 1)}}
    report.show(result)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        report.write(result, output)
        print(f"report in {output / 'report.md'} and {output / 'report.json'}")


def parse(argv: list[str]) -> list[str]:
    """Read the flags; the config is eval/shapes by default. Raises ValueError that names the nearest valid key."""
    if not any(word.lstrip("-").split("=")[0] == "config" for word in argv[1:]):
        argv = [argv[0], "--config=eval/shapes", *argv[1:]]
    return config_files.parse(FLAGS, argv)


def run() -> None:
    """The command; exits as `command.run` does."""
    command.run(
        evaluate,
        parse,
        lambda: f"{__doc__}\nOptions:{FLAGS.module_help(sys.modules[__name__])}\n{EXAMPLE}",
        "lower --config.report.batch_size, or use --dtype=bfloat16",
    )


if __name__ == "__main__":
    run()
