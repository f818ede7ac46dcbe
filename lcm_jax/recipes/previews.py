"""Images of the same prompts by the models that a run compares, and inputs of inpainting models."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.data.captioned import CaptionedDataset, Records
from lcm_jax.data.latents import Tokenize
from lcm_jax.data.masks import fixed_masks
from lcm_jax.diffusion.pixels import to_float
from lcm_jax.diffusion.samplers import CONSISTENCY_SCHEDULERS, SAMPLERS
from lcm_jax.evaluation.evaluate import Metric, evaluate, make_resources
from lcm_jax.evaluation.frechet import encoder_features
from lcm_jax.evaluation.metrics import METRICS, make_metrics
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.sampling.generate import effective_guidance_scale, is_consistency_model, sampler_table
from lcm_jax.sampling.inputs import Inpainting
from lcm_jax.sampling.preview import PreviewSampler, save_grid
from lcm_jax.training.state import Params

POSTERIOR_SEED = 3  # of the latents of held-out images that inpainting models paint in


@dataclass(frozen=True)
class Candidate:
    """A model that previews and reports sample from.

    name: of its rows, of its steps in previews (`config.sample.NAME_steps`) and of its plan (`config.report.NAME`), one
    of `report.MODELS`. params(trained, frozen): its parameters by network, from those that are trained and those that
    are not, as they lie on the devices.
    """

    name: str
    model: StableDiffusion
    params: Callable[[Params, Params], Params]

    @property
    def sampler(self) -> str:
        """Name of the sampler of its previews."""
        return "lcm" if self.model.scheduler["_class_name"] in CONSISTENCY_SCHEDULERS else "ddim"

    def guidance_scale(self, scale: float) -> float:
        """Return `scale`, or 1 for a latent consistency model without guidance input: its guidance is fixed."""
        return effective_guidance_scale(self.model, scale)

    def preview_steps(self, config) -> tuple[int, ...]:
        """Return the numbers of steps of its previews."""
        steps = config.sample[f"{self.name}_steps"]
        return (steps,) if isinstance(steps, int) else tuple(steps)


def check_samplers(config, candidates: Sequence[Candidate]) -> None:
    """Raise ValueError for a sampler of previews or of the report that does not support a number of steps, and if a
    candidate has no plan."""
    plans = {f"sample.{each.name}_steps": (each.model, each.sampler, each.preview_steps(config)) for each in candidates}
    if not config.report.guidance_scale:
        raise ValueError("report.guidance_scale 0 is not supported for a run; use a number of at least 1")
    for each in candidates:
        if each.name not in config.report:
            raise ValueError(f"the config has no report.{each.name}; add its steps by sampler, such as lcm=(1, 2, 4)")
        for sampler, steps in config.report[each.name].items():
            plans[f"report.{each.name}.{sampler}"] = (each.model, sampler, steps)
    for key, (model, sampler, numbers) in plans.items():
        if numbers and not SAMPLERS[sampler].consistency and is_consistency_model(model):
            raise ValueError(
                f"{key} is not supported: a latent consistency model has the samplers lcm and tcd; remove it"
            )
        for steps in numbers:
            try:
                sampler_table(model, sampler, steps)
            except ValueError as error:
                raise ValueError(f"{key} {steps} is not supported: {error}") from None


def inpainting_inputs(model: StableDiffusion, records: Records, count: int) -> Inpainting | None:
    """Return the first `count` images of `records` under the same masks each time; None if the model does not
    inpaint."""
    if not model.inpaints:
        return None
    images = np.stack([records[i]["image"] for i in range(count)])
    _, height, width, _ = images.shape
    shape = (count, height // model.downscale, width // model.downscale, model.vae.config["latent_channels"])
    masks = jnp.asarray(fixed_masks(count, height, width) > 127, jnp.float32)
    return Inpainting(to_float(images), masks, jax.random.normal(jax.random.key(POSTERIOR_SEED), shape, jnp.float32))


def preview_figures(config, student: Candidate) -> dict[str, bool]:
    """Return the student's figures in previews, `metric@steps`; True if lower is better."""
    metrics = config.metrics if config.sample.scored_prompts else ()
    return {f"{name}@{n}": METRICS[name].lower_is_better for name in metrics for n in student.preview_steps(config)}


class Previews:
    """Rows of images of a run's prompts: those of each candidate for each of its numbers of steps.

    candidates: the last one is trained; the rows of the others are generated once. Each sampler is compiled once.
    """

    def __init__(self, config, candidates: Sequence[Candidate], tokenize: Tokenize, dataset: CaptionedDataset):
        self.candidates, self.tokenize, self.dataset, self._config = candidates, tokenize, dataset, config
        self.prompts = dataset.prompts(config.sample.prompts)
        inpainting = inpainting_inputs(candidates[-1].model, dataset.held_out, len(self.prompts))
        self._samplers = {
            each.name: PreviewSampler(
                each.model, tokenize, self.prompts, config.data.size, config.sample.batch_size, inpainting=inpainting
            )
            for each in candidates
        }
        self._fixed_rows: dict[str, np.ndarray] | None = None
        self._metrics: dict[str, Metric] | None = None

    def _rows(self, candidate: Candidate, trained: Params, frozen: Params) -> dict[str, np.ndarray]:
        sampler, params = self._samplers[candidate.name], candidate.params(trained, frozen)
        scale = candidate.guidance_scale(self._config.sample.guidance_scale)
        return {
            f"{candidate.name}, {n} step{'s' * (n > 1)}": sampler(params, candidate.sampler, n, scale)[0]
            for n in candidate.preview_steps(self._config)
        }

    def rows(self, trained: Params, frozen: Params) -> dict[str, np.ndarray]:
        """Return uint8[len(prompts), H, W, 3] by label. trained, frozen: as a candidate's `params` takes them."""
        *fixed, student = self.candidates
        if self._fixed_rows is None:
            each = (self._rows(candidate, trained, frozen) for candidate in fixed)
            self._fixed_rows = {label: row for rows in each for label, row in rows.items()}
        return self._fixed_rows | self._rows(student, trained, frozen)

    def save(self, trained: Params, frozen: Params, path: Path) -> None:
        """Write `rows` as a PNG to `path`."""
        rows = self.rows(trained, frozen)
        save_grid(list(rows.values()), path, list(rows))

    def metrics(self, frozen: Params) -> dict[str, Metric]:
        """Return the metrics of the config, which compare with real images that are encoded at the first call."""
        if self._metrics is None:
            settings, size = self._config, self._config.sample.batch_size
            features = encoder_features(self.candidates[-1].model, frozen["vae"], size)
            held_out, train = self.dataset.held_out, self.dataset.train
            resources = make_resources(features, held_out, settings.report.reference, train, size)
            self._metrics = make_metrics(settings.metrics, resources)
        return self._metrics

    def figures(self, trained: Params, frozen: Params) -> dict[str, float]:
        """Return the `preview_figures` of the trained candidate's images of held-out captions."""
        settings, student = self._config.sample, self.candidates[-1]
        if not settings.scored_prompts:
            return {}
        prompts = self.dataset.prompts(settings.scored_prompts)
        inpainting = inpainting_inputs(student.model, self.dataset.held_out, len(prompts))
        sampler, scale = self._samplers[student.name], student.guidance_scale(settings.guidance_scale)
        draw = partial(
            sampler.with_prompts(prompts, inpainting).batches, student.params(trained, frozen), guidance_scale=scale
        )
        metrics, plan = self.metrics(frozen), {student.sampler: student.preview_steps(self._config)}
        rows = list(evaluate(draw, plan, prompts, metrics, resample=False))
        leading = {name: next(iter(metric.columns)) for name, metric in metrics.items()}
        return {f"{name}@{row['steps']}": row[column] for name, column in leading.items() for row in rows}

    def write(self, trained: Params, frozen: Params, path: Path) -> dict[str, float]:
        """Write a PNG to `path` and the prompts beside it; return `figures`."""
        self.save(trained, frozen, path)
        path.with_suffix(".txt").write_text("\n".join(self.prompts) + "\n", encoding="utf-8")
        return self.figures(trained, frozen)
