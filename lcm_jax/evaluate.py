"""Measure models by images of the same prompts from the same noise, or images that are there already.

    python -m lcm_jax.evaluate --model=shapes --model=runs/shapes/export --plan=ddim:8,50 --output=runs/comparison
    python -m lcm_jax.evaluate --model=shapes-lcm --plan=lcm:4 --config.report.prompts=600
    python -m lcm_jax.evaluate --images=made --reference=real --metrics=fid --fid_flavour=clean-fid --weights_dir=w

Prints a row for each model, sampler and number of steps: the figures of the config's metrics with 95% intervals, and
speed. --config takes a bundled config (eval/shapes, eval/coco30k, ...; --list_configs of lcm_jax.main) or a file; its
keys can be set by --config.group.key=value. --output keeps the images and the report; after an interruption the same
command goes on, and makes no image twice. Several processes (--coordinator, --num_processes, --process_id) make and
measure a part each, and a process uses all of its accelerators.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from lcm_jax import command, config_files
from lcm_jax.errors import check_devices, keep_interrupts, phase

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
DTYPE = flags.DEFINE_enum(
    "dtype",
    "float32",
    ["float32", "bfloat16", "float16", "int8", "fp8"],
    "Compute dtype of the models; int8 and fp8 are quantized, and need the extra `quantized`.",
    **OWN,
)
IMAGES = flags.DEFINE_string("images", None, "A folder of images to measure, in place of models.", **OWN)
REFERENCE = flags.DEFINE_string(
    "reference", None, "Of --images: the folder of real images, or a .npz of their statistics.", **OWN
)
SAVE_STATISTICS = flags.DEFINE_string(
    "save_statistics", None, "Of --reference: a .npz file to write, which later takes the place of its images.", **OWN
)
PROMPTS = flags.DEFINE_string(
    "prompts", None, "Of --images: a text file with a line for each image; else NAME.txt beside NAME.png.", **OWN
)
SKIP_BAD = flags.DEFINE_bool("skip_bad", False, "Of --images: leave out images that cannot be read.", **OWN)
METRICS = flags.DEFINE_list("metrics", None, "Metrics, such as fid,clip_score, in place of the config's.", **OWN)
WEIGHTS_DIR = flags.DEFINE_string(
    "weights_dir",
    None,
    "Folder of feature networks' weights under their published names; else they are fetched.",
    **OWN,
)
FID_FLAVOUR = flags.DEFINE_string("fid_flavour", None, "The tool that FID equals, such as clean-fid.", **OWN)
CLIP_MODEL = flags.DEFINE_string("clip_model", None, "The towers of the CLIP score, such as ViT-L/14.", **OWN)
DETECTIONS = flags.DEFINE_string("detections", None, "Of geneval: a file of another detector's boxes.", **OWN)
OUTPUT = flags.DEFINE_string("output", None, "The folder for images, report and figures; by default none.", **OWN)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Delete the evaluation that --output has, its images too.", **OWN)
COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, for several processes.", **OWN)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes, if there are several.", **OWN)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0, if there are several.", **OWN)

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
    """Return the `Candidate` of each model; no tensor is read.

    Raises ValueError as `plan_of` does, and for unused samplers.
    """
    from lcm_jax.models.stable_diffusion import StableDiffusion
    from lcm_jax.recipes.evaluation import Candidate
    from lcm_jax.weights.model import check_complete, open_model

    models = []
    for name in names:
        stored = open_model(name, base=BASE.value if Path(name).is_file() else None)
        check_complete(stored)
        own = plan_of(name, StableDiffusion.from_configs(stored.configs), plan, size)
        models.append(Candidate(name, stored, own))
    if PLAN.value and (unused := plan.keys() - {sampler for each in models for sampler in each.plan}):
        raise ValueError(f"--plan: no model supports sampler {min(unused)!r}; remove it, or add a model that does")
    return models


def read_settings(config) -> dict[str, Any]:
    """Return the settings of metrics: those of the config, and flags that are given.

    A folder of images in GenEval's layout has its metadata, where no file is given.
    """
    given = {"fid_flavour": FID_FLAVOUR, "clip_model": CLIP_MODEL, "detections": DETECTIONS}
    settings = dict(config.get("settings", {})) | {name: flag.value for name, flag in given.items() if flag.value}
    if IMAGES.value is not None and "geneval" in (METRICS.value or ()) and not settings.get("metadata"):
        settings["metadata"] = IMAGES.value
    return settings


def check_config(config) -> None:
    """Raise ValueError for a setting of an evaluation that is not supported."""
    from lcm_jax.evaluation.prompt_sets import PROMPT_SETS
    from lcm_jax.recipes import settings

    choices = dict(settings.CHOICES) | {"data.source": tuple(PROMPT_SETS)}
    settings.check(config, groups=("autoencoder", "metrics", "data", "report"), choices=choices)
    settings.check_keys(config, [config_files.load("eval/shapes")])


def evaluate_models(config, weights) -> None:
    """Print and write the report of --model. Raises ValueError or OSError, as a rule before any work."""
    from lcm_jax.diffusion.samplers import SAMPLERS
    from lcm_jax.evaluation import report
    from lcm_jax.evaluation.prompt_sets import PROMPT_SETS
    from lcm_jax.recipes import evaluation
    from lcm_jax.training import distributed

    names, output = MODEL.value, None if OUTPUT.value is None else Path(OUTPUT.value)
    if duplicates := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"--model={duplicates[0]} is given twice; use each model once")
    check_config(config)
    plan = read_plan(PLAN.value, tuple(SAMPLERS)) if PLAN.value else config.get("plan", {})
    models = open_models(names, plan, config.data.size)
    with TemporaryDirectory() if output is None else nullcontext(output) as folder, evaluation.alone(output):
        prompts = PROMPT_SETS[config.data.source](config, distributed.part_of, Path(folder) / "index")
        if output is not None:
            digests = {each.name: evaluation.identify(each.stored) for each in models}
            made_by = {"models": digests, "dtype": DTYPE.value, "config": config.to_dict()}
            made_by["config"]["report"] = {k: v for k, v in config.report.to_dict().items() if k != "batch_size"}
            done = evaluation.open_output(output, made_by | {"plan": {m.name: m.plan for m in models}}, OVERWRITE.value)
            if done is not None:
                print(f"this evaluation is complete: {output / 'report.json'}")
                report.show(done)
                return
        steps = sum(sum(steps) for each in models for steps in each.plan.values())
        kept = f"run the same command to go on in {output}" if output else "nothing was written"
        with (
            phase("evaluating", memory="lower --config.report.batch_size, or use --dtype=bfloat16", kept=kept),
            progress(steps * len(distributed.part_of(len(prompts.prompts)))) as update,
        ):
            result = evaluation.compare_models(models, prompts, config, DTYPE.value, weights, output, update)
    if distributed.is_main():
        report.show(result)
        if output is not None:
            print(f"report in {output / 'report.md'} and {output / 'report.json'}; figure in {output / 'quality.png'}")


def evaluate_images(config, folder: Path, weights) -> None:
    """Print and write the report of --images. Raises ValueError or OSError, as a rule before any work."""
    from lcm_jax.evaluation import report
    from lcm_jax.evaluation.metrics import check_metrics
    from lcm_jax.recipes import evaluation
    from lcm_jax.training import distributed

    if not METRICS.value:
        raise ValueError("--images needs --metrics, such as --metrics=fid or --metrics=fid,clip_score")
    check_metrics(METRICS.value, None)
    output = None if OUTPUT.value is None else Path(OUTPUT.value)
    reference = None if REFERENCE.value is None else Path(REFERENCE.value)
    prompts = None if PROMPTS.value is None else Path(PROMPTS.value)
    if output is not None:
        evaluation.check_report(output, OVERWRITE.value)
    count = len(distributed.part_of(sum(1 for path in folder.rglob("*") if path.is_file())))
    with (
        phase("measuring", memory="lower --config.report.batch_size", kept="run the same command again"),
        progress(count) as update,
    ):
        result = evaluation.score_images(
            folder,
            reference,
            prompts,
            METRICS.value,
            read_settings(config),
            weights,
            SKIP_BAD.value,
            config.report.batch_size,
            lambda done: update("images", done),
            None if SAVE_STATISTICS.value is None else Path(SAVE_STATISTICS.value),
        )
    if distributed.is_main():
        report.show(result)
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            report.write(result, output)
            print(f"report in {output / 'report.md'} and {output / 'report.json'}")


def evaluate() -> None:
    """Read the flags, print the rows, and write the report. Raises ValueError or OSError, as a rule before any work."""
    from lcm_jax.training import distributed
    from lcm_jax.weights.published import Weights

    keep_interrupts()
    command.configure_jax()
    distributed.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    check_devices()
    config = CONFIG.value
    weights = Weights(None if WEIGHTS_DIR.value is None else Path(WEIGHTS_DIR.value))
    if weights.folder is not None and not weights.folder.is_dir():
        raise ValueError(f"--weights_dir={weights.folder} is not a folder; use that of the networks' weights")
    if (images := IMAGES.value) is not None:
        with distributed.ending_together():
            evaluate_images(config, Path(images), weights)
        return
    for flag in (REFERENCE, SAVE_STATISTICS, PROMPTS, DETECTIONS):
        if flag.value is not None:
            raise ValueError(f"--{flag.name} is of --images, which is not given; add it, or remove --{flag.name}")
    config = ConfigDict(config.to_dict() | {"settings": read_settings(config)})
    if METRICS.value:
        config.metrics = tuple(METRICS.value)
    with distributed.ending_together():
        evaluate_models(config, weights)


def parse(argv: list[str]) -> list[str]:
    """Read the flags; the config is eval/shapes by default. Raises ValueError that names the nearest valid key."""
    if not any(word.lstrip("-").split("=")[0] == "config" for word in argv[1:]):
        argv = [argv[0], "--config=eval/shapes", *argv[1:]]
    return config_files.parse(FLAGS, argv)


def run() -> None:
    """The command; exits as `command.run` does."""
    options = lambda: f"{__doc__}\nOptions:{FLAGS.module_help(sys.modules[__name__])}"  # noqa: E731
    command.run(evaluate, parse, options, "lower --config.report.batch_size, or use --dtype=bfloat16")


if __name__ == "__main__":
    run()
