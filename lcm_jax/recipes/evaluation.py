"""Evaluations: models by images of the same prompts from the same noise, and images that are there already."""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from lcm_jax import locks
from lcm_jax.errors import RunError
from lcm_jax.evaluation import figures as drawings
from lcm_jax.evaluation import report
from lcm_jax.evaluation.evaluate import Metric, Resources, Rows, figures, measure_batches, speed
from lcm_jax.evaluation.fid import save_reference, small_sample_warning
from lcm_jax.evaluation.frechet import encoder_features
from lcm_jax.evaluation.image_folder import ImageFolder, open_folder, read_image, read_prompts
from lcm_jax.evaluation.made_images import MadeImages
from lcm_jax.evaluation.metrics import METRICS, make_metrics
from lcm_jax.evaluation.prompt_sets import PromptSet
from lcm_jax.evaluation.videos import open_videos
from lcm_jax.files import remove, write_text
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.pipeline import Pipeline
from lcm_jax.sampling.generate import effective_guidance_scale
from lcm_jax.sampling.preview import PreviewSampler
from lcm_jax.training import distributed
from lcm_jax.training.workdir import differences, read_object
from lcm_jax.weights.model import StoredModel, open_model, read_params
from lcm_jax.weights.preset import default_preset
from lcm_jax.weights.published import Weights
from lcm_jax.weights.stored import digest

OWN_FILES = ("settings.json", "report.json", "report.md", "quality.png", "images", "rows", "extremes")
Plan = Mapping[str, Sequence[int]]
Update = Callable[[str, int], None]  # (name of a row, sampling steps that were done for it)


class Candidate(NamedTuple):
    """A model to evaluate: its name, and the numbers of steps by sampler."""

    name: str
    stored: StoredModel
    plan: Plan


class Row(NamedTuple):
    """A row of a report that is to be made."""

    candidate: Candidate
    sampler: str
    steps: int

    @property
    def name(self) -> str:
        return f"{self.candidate.name} {self.sampler} {self.steps}"

    @property
    def folder(self) -> Path:
        """The place of its files within a folder: the model's name without what a file's name cannot have."""
        return (
            Path(re.sub(r"[^\w.=-]+", "_", self.candidate.name).strip("._") or "model") / f"{self.sampler}-{self.steps}"
        )


def make_resources(config, prompts: PromptSet, weights: Weights) -> Resources:
    """Return what the config's metrics compare with. Raises ValueError if the autoencoder cannot encode its images."""
    features, batch = None, config.report.batch_size
    if "frechet" in config.metrics:
        stored, size = open_model(config.autoencoder), config.data.size
        model = StableDiffusion.from_configs(stored.configs)
        if size % model.downscale:
            raise ValueError(
                f"data.size {size} is not supported by autoencoder {config.autoencoder}; use a multiple of "
                f"{model.downscale}"
            )
        features = encoder_features(model, read_params(stored, "vae", model.abstract_params()["vae"]), batch)
    return Resources(
        prompts.real_images,
        prompts.reference,
        train_images=prompts.train_images,
        features=features,
        weights=weights,
        settings=config.get("settings", {}),
        batch_size=batch,
        gather=distributed.gather_rows,
    )


def open_output(output: Path, settings: Mapping[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Make the folder of an evaluation, or go on in it; return its report if it is complete.

    settings: of this evaluation, kept beside what is made by them. overwrite: delete what an evaluation has left there.
    Settings by which no image was made yet, as after a mistake in them, may change. Call it while `alone`. Raises
    ValueError if the folder has an evaluation by other settings.
    """
    file, before = output / "settings.json", output / "report.json"
    settings = json.loads(json.dumps(settings))
    if overwrite and distributed.is_main():
        for name in OWN_FILES:
            if (path := output / name).is_dir():
                remove(path)
            else:
                path.unlink(missing_ok=True)
    distributed.wait_for_all("output")
    if file.exists() and (output / "images").exists():
        stored = read_object(file, "use --overwrite, which deletes the images too")
        if changed := differences(stored, settings):
            key, value, now = changed[0]
            raise ValueError(
                f"{output} has an evaluation with {key} {value}, and now it is {now}; use another --output, or "
                "--overwrite, which deletes that one"
            )
        if before.exists():
            return read_object(before, "use --overwrite")
    elif before.exists():
        raise ValueError(f"{before} exists already; use another --output, or --overwrite")
    distributed.wait_for_all("looked")
    if distributed.is_main():
        write_text(file, json.dumps(settings, indent=1) + "\n")
    distributed.wait_for_all("settings")
    return None


def check_report(output: Path, overwrite: bool) -> None:
    """Raise ValueError if a report of images cannot be written to `output`: it is a file, or has another report.

    Images may have changed since a report of them, so that none is taken for that of this command. overwrite: replace a
    report, but for one of models, which belongs to the images beside it.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output={output} is a file; use a folder")
    if (output / "settings.json").exists():
        raise ValueError(f"{output} has an evaluation of models; use another --output")
    if (output / "report.json").exists() and not overwrite:
        raise ValueError(f"{output / 'report.json'} exists already; use another --output, or --overwrite")


@contextmanager
def alone(output: Path | None) -> Iterator[None]:
    """Keep other evaluations out of the folder, which is made. Raises ValueError if it is a file, RunError if there is
    another evaluation."""
    if output is not None and output.exists() and not output.is_dir():
        raise ValueError(f"--output={output} is a file; use a folder")
    if output is None or not distributed.is_main():
        yield
        return
    output.mkdir(parents=True, exist_ok=True)
    try:
        with locks.lock(output / "lock"):
            yield
    except locks.Locked as error:
        raise RunError(
            f"another evaluation writes to {output}: {error}; wait for it, or use another --output"
        ) from None


def identify(stored: StoredModel) -> str:
    """Return a digest of a model's weights and configs, 16 hexadecimal digits."""
    parts = {name: digest(tensors) for name, tensors in sorted(stored.tensors.items())}
    text = json.dumps([parts, stored.configs], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Drawing(NamedTuple):
    """All that makes the images of a model, and the seconds that they take."""

    preview: PreviewSampler
    params: Mapping[str, Any]
    scale: float

    def make(self, row: Row, made: MadeImages | None, update: Update) -> Iterator[tuple[Any, list[int], float]]:
        """Yield (images, their numbers, seconds) of this process; those that `made` has are read, after 0 seconds."""
        numbers = distributed.part_of(len(self.preview.prompts))
        todo = list(numbers) if made is None else made.missing(numbers)
        update(row.name, row.steps * (len(numbers) - len(todo)))
        done = 0
        for images, seconds in self.preview.batches(self.params, row.sampler, row.steps, self.scale, todo):
            some = todo[done : done + len(images)]
            done += len(images)
            update(row.name, row.steps * len(images))
            if made is None:
                yield images, some, seconds
            else:
                made.write(some, images, seconds)
        if made is not None:
            for images, some in made.batches(numbers, self.preview.batch_size):
                yield images, some, 0.0


def open_drawing(candidate: Candidate, prompts: PromptSet, config, dtype: str, scale: float) -> Drawing:
    """Put a model on the devices of this process, which share each batch."""
    devices = jax.local_devices()
    mesh = Mesh(np.array(devices), ("data",)) if len(devices) > 1 else None
    pipe = Pipeline(candidate.stored, dtype, mesh=mesh)
    preview = PreviewSampler(
        pipe.model,
        pipe.tokenize,
        prompts.prompts,
        config.data.size,
        config.report.batch_size,
        seed=config.report.seed,
        mesh=pipe.mesh,
    )
    return Drawing(preview, pipe.params, scale)


def measure_row(
    row: Row,
    drawing: Drawing,
    prompts: Sequence[str],
    metrics: Mapping[str, Metric],
    output: Path | None,
    made: MadeImages | None,
    update: Update,
) -> dict[str, Any]:
    """Return a row of the report, in the main process; make its images first."""
    counts: list[int] = []
    seconds: list[float] = []

    def batches():
        for images, numbers, elapsed in drawing.make(row, made, update):
            counts.append(len(images))
            seconds.append(elapsed)
            yield images, [prompts[number] for number in numbers]

    rows = measure_batches(batches(), metrics, distributed.gather_rows)
    distributed.wait_for_all("images")
    if not distributed.is_main():
        return {}
    if made is not None:
        counts, seconds = made.timings()
    timed = speed(counts, seconds)
    if timed:
        timed["images_per_s"] = float(f"{timed['images_per_s'] * jax.process_count():.4g}")
    cost = drawing.preview.cost(drawing.params, row.sampler, row.steps, drawing.scale)
    found = figures(metrics, rows) | timed | {name: value for name, value in cost.items() if value is not None}
    if made is not None and output is not None:
        save_extremes(metrics, rows, prompts, made, output / "extremes" / f"{'-'.join(row.folder.parts)}.png")
    return {"model": row.candidate.name, "sampler": row.sampler, "steps": row.steps} | found


def save_extremes(
    metrics: Mapping[str, Metric], rows: Mapping[str, Rows], prompts: Sequence[str], made: MadeImages, path: Path
) -> None:
    """Write the worst and the best images by the first metric that has a number for each image, if there is one."""
    for name, metric in metrics.items():
        if (scores := metric.scores(rows[name])) is not None:
            order = drawings.extremes(scores)
            path.parent.mkdir(exist_ok=True)
            images = [read_image(made.path(number)) for number in order]
            drawings.save_extremes(images, scores, prompts, order, path)
            return


def compare_models(
    candidates: Sequence[Candidate],
    prompts: PromptSet,
    config,
    dtype: str,
    weights: Weights,
    output: Path | None,
    update: Update,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Return the report of all models, complete in the main process; with `output`, write it and its figures there.

    Each row is printed when it is done, with the time left. Rows and images that `output` has are not made again.
    """
    began, done_here = time.monotonic(), 0
    metrics = make_metrics(config.metrics, make_resources(config, prompts, weights))
    if "fid" in metrics and (warning := small_sample_warning(len(prompts.prompts))):
        log(warning)
    told = report.describe(metrics)
    columns = report.columns_of(told)
    todo = [Row(each, sampler, n) for each in candidates for sampler, numbers in each.plan.items() for n in numbers]
    rows: list[dict[str, Any]] = []
    scales = {}
    drawing, settings, current = None, config.report, None
    steps_left = sum(row.steps for row in todo)
    for row in todo:
        kept = None if output is None else output / "rows" / row.folder.with_suffix(".json")
        name = row.candidate.name
        stored = row.candidate.stored
        if name not in scales:
            model, preset = (
                StableDiffusion.from_configs(stored.configs),
                stored.preset or default_preset(stored.configs),
            )
            scales[name] = effective_guidance_scale(model, settings.guidance_scale or preset.guidance_scale)
        steps_left -= row.steps
        if kept is not None and distributed.any_process(distributed.is_main() and kept.exists()):
            update(row.name, row.steps * len(distributed.part_of(len(prompts.prompts))))
            if distributed.is_main():
                rows.append(read_object(kept, "delete it, and the same command makes it again"))
                log(f"{len(rows)}/{len(todo)}  {report.line(rows[-1], columns)}; measured before")
            continue
        if drawing is None or current != name:
            drawing, current = None, name  # one model at a time is on the device
            drawing = open_drawing(row.candidate, prompts, config, dtype, scales[name])
        made = None
        if output is not None:
            made = MadeImages(output / "images" / row.folder, prompts.paths, jax.process_index())
            made.folder.mkdir(parents=True, exist_ok=True)
            prompts.prepare(made.folder)
        found = measure_row(row, drawing, prompts.prompts, metrics, output, made, update)
        if not distributed.is_main():
            continue
        rows.append(found)
        done_here += row.steps
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_text(kept, json.dumps(found) + "\n")
        seconds = (time.monotonic() - began) / done_here * steps_left
        left = f"; about {seconds // 60:.0f}:{seconds % 60:02.0f} left" if steps_left else ""
        log(f"{len(rows)}/{len(todo)}  {report.line(found, columns)}{left}")
    if not distributed.is_main():
        return {}
    result = {"models": report.nest(rows)} | told | report.environment()
    result |= {"captions": len(prompts.prompts), "reference": prompts.reference, "guidance_scales": scales}
    result |= {"settings": config.to_dict(), "seconds": {"report": round(time.monotonic() - began, 1)}}
    if output is not None:
        drawings.draw_quality(rows, metrics, output / "quality.png")
        report.write(result, output)
    return result


def score_images(
    folder: Path,
    reference: Path | None,
    prompts_file: Path | None,
    metrics_names: Sequence[str],
    settings: Mapping[str, Any],
    weights: Weights,
    skip_bad: bool,
    batch_size: int,
    update: Callable[[int], None],
    save_statistics: Path | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Return the report of images that are there already: {column: value} at its top, with all that tells its meaning.

    folder: of the images; for the metric fvd, of videos. reference: the same of what is real, or a .npz file of
    statistics. prompts_file: see
    `read_prompts`; prompts are read only if a metric judges them. update(images): is called after each batch.
    save_statistics: a .npz file to write, of the reference's Inception features.
    """
    began = time.monotonic()
    videos = "fvd" in metrics_names
    images = open_videos(folder, "--images", False, skip_bad) if videos else open_folder(folder, "--images", skip_bad)
    prompts = [""] * len(images.paths)
    if isinstance(images, ImageFolder) and (
        prompts_file is not None or any(METRICS[name].reads_prompts for name in metrics_names)
    ):
        prompts = read_prompts(images, prompts_file)
    resources = reference_resources(reference, settings, weights, skip_bad, batch_size, videos)
    metrics = make_metrics(metrics_names, resources)
    if "fid" in metrics and (warning := small_sample_warning(len(images.paths))):
        log(warning)
    if save_statistics is not None:
        save_reference(resources, save_statistics)

    def batches():
        numbers = distributed.part_of(len(images.paths))
        of = dict(zip(images.paths, prompts, strict=True))
        for some, paths in images.batches(batch_size, images.paths[numbers.start : numbers.stop]):
            yield some, [of[path] for path in paths]
            update(len(paths))

    rows = measure_batches(batches(), metrics, distributed.gather_rows)
    if not distributed.is_main():
        return {}
    found = figures(metrics, rows) | report.describe(metrics) | report.environment()
    return found | {
        "images": {"folder": str(folder), "count": len(images.paths)},
        "reference": resources.reference,
        "settings": dict(settings),
        "seconds": {"report": round(time.monotonic() - began, 1)},
    }


def reference_resources(
    reference: Path | None,
    settings: Mapping[str, Any],
    weights: Weights,
    skip_bad: bool,
    batch_size: int,
    videos: bool = False,
) -> Resources:
    """Return the resources of a reference: a folder of images or videos, a .npz file of statistics, or none."""
    shared = {"weights": weights, "settings": settings, "batch_size": batch_size, "gather": distributed.gather_rows}
    if reference is None:
        return Resources(None, "", **shared)
    if reference.suffix == ".npz":
        if not reference.is_file():
            raise ValueError(f"--reference={reference} is not a file; use a .npz of statistics, or a folder of images")
        return Resources(None, str(reference), statistics=reference, **shared)
    flag, kind = "--reference", "videos" if videos else "images"
    folder = open_videos(reference, flag, True, skip_bad) if videos else open_folder(reference, flag, skip_bad)

    def real_images() -> Iterator[tuple[Any, list[str]]]:
        numbers = distributed.part_of(len(folder.paths))
        for some, paths in folder.batches(batch_size, folder.paths[numbers.start : numbers.stop]):
            yield some, [""] * len(paths)

    return Resources(real_images, f"{len(folder.paths)} {kind} of {reference}", **shared)
