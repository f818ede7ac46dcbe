"""One trained model, sampled at several guidance scales: its quality and its diversity."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lcm_jax.data.sources import load_dataset
from lcm_jax.evaluation.diversity import Diversity
from lcm_jax.evaluation.evaluate import evaluate, make_resources
from lcm_jax.evaluation.frechet import encoder_features
from lcm_jax.evaluation.metrics import check_metrics, make_metrics
from lcm_jax.files import write_text
from lcm_jax.pipeline import Pipeline
from lcm_jax.ranges import GUIDANCE, MANY_STEPS, POSITIVE, Range, check_fields, setting
from lcm_jax.sampling.generate import default_sampler
from lcm_jax.sampling.preview import PreviewSampler
from lcm_jax.training.workdir import read_object
from lcm_jax.weights.model import open_model

SCALES = Range(GUIDANCE.low, GUIDANCE.high, real=True, many=True, flat=True)


@dataclass(frozen=True)
class Sampling:
    """Settings of the images of each guidance scale: `images_per_caption` of each of `captions` held-out captions.

    metrics: of the table of metrics, beside `Diversity`. Raises ValueError that names a setting out of its range.
    """

    guidance_scales: tuple[float, ...] = setting((), SCALES)
    steps: tuple[int, ...] = setting((4,), MANY_STEPS)
    captions: int = setting(36, POSITIVE)
    images_per_caption: int = setting(4, Range(2))
    batch_size: int = setting(36, POSITIVE)
    seed: int = setting(2, Range(0, 2**31 - 1))
    metrics: tuple[str, ...] = ("frechet",)

    def __post_init__(self):
        check_fields(self, "sampling")
        for name in ("guidance_scales", "steps"):
            if not getattr(self, name):
                raise ValueError(f"sampling.{name} is empty; use a tuple of numbers, such as (2, 4, 8)")

    def check(self, config) -> None:
        """Raise ValueError if a run of `config` cannot be sampled so."""
        check_metrics(self.metrics, config.data.source)
        if config.objective.name != "lcd" or "lora" in config:
            raise ValueError("sampling is not supported for a run without an input for w; use a base config of LCD")
        if max(self.steps) > config.objective.num_ddim_steps:
            raise ValueError(
                f"sampling.steps has {max(self.steps)}, and a student samples in at most objective.num_ddim_steps = "
                f"{config.objective.num_ddim_steps} steps; lower it"
            )


def sample_scales(
    sampling: Sampling, config, folder: Path, log: Callable[[str], None] = print
) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of each guidance scale: {"guidance_scale", and what `evaluate` yields} for each number of steps.

    folder: of a complete run with this config. Rows are stored in `folder`/guidance, and those that are there with the
    same settings are not measured again.
    """
    settings = json.loads(json.dumps({name: getattr(sampling, name) for name in Sampling.__dataclass_fields__}))
    del settings["guidance_scales"]
    measure = None
    for scale in sampling.guidance_scales:
        path = folder / "guidance" / f"{scale:g}.json"
        if path.exists():
            stored = read_object(path, "delete it, and the same command measures it again")
            if stored.get("settings") == settings:
                yield stored["rows"]
                continue
        measure = measure or _make_measure(sampling, config, folder)
        log(f"guidance scale {scale:g}: {sampling.captions * sampling.images_per_caption} images")
        rows = [{"guidance_scale": scale} | row for row in measure(scale)]
        path.parent.mkdir(exist_ok=True)
        write_text(path, json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
        yield rows


def _make_measure(sampling: Sampling, config, folder: Path) -> Callable[[float], Iterator[dict[str, Any]]]:
    pipe = Pipeline(open_model(folder / "export"))
    dataset = load_dataset(config, folder)
    prompts = [prompt for prompt in dataset.prompts(sampling.captions) for _ in range(sampling.images_per_caption)]
    batch, size = sampling.batch_size, config.data.size
    features = encoder_features(pipe.model, pipe.params["vae"], batch)
    resources = make_resources(features, dataset.held_out, config.report.reference, dataset.train, batch)
    metrics = make_metrics(sampling.metrics, resources) | {"diversity": Diversity.create(resources)}
    preview = PreviewSampler(pipe.model, pipe.tokenize, prompts, size, batch, seed=sampling.seed)
    plan = {default_sampler(pipe.model): sampling.steps}

    def measure(scale: float) -> Iterator[dict[str, Any]]:
        return evaluate(partial(preview.batches, pipe.params, guidance_scale=scale), plan, prompts, metrics)

    return measure
