"""Images of the same prompts by teacher and student while the student is trained, and inputs of inpainting models."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.data.captioned import CaptionedDataset, Records
from lcm_jax.data.latents import Tokenize
from lcm_jax.data.masks import fixed_masks
from lcm_jax.diffusion.pixels import to_float
from lcm_jax.evaluation import verifier
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.sampling.generate import sampler_table
from lcm_jax.sampling.inputs import Inpainting
from lcm_jax.sampling.preview import PreviewSampler, save_grid
from lcm_jax.training.state import Params

POSTERIOR_SEED = 3  # of the latents of held-out images that inpainting models paint in


def check_samplers(config, teacher: StableDiffusion, student: StableDiffusion) -> None:
    """Raise ValueError for a sampler of previews or of the report that does not support a number of steps."""
    plans = {
        "sample.teacher_steps": (teacher, "ddim", (config.sample.teacher_steps,)),
        "sample.student_steps": (student, "lcm", config.sample.student_steps),
    }
    for who, model in (("teacher", teacher), ("student", student)):
        for sampler, steps in config.report[who].items():
            plans[f"report.{who}.{sampler}"] = (model, sampler, steps)
    for key, (model, sampler, numbers) in plans.items():
        if numbers and sampler != "lcm" and model.guidance_embedding_dim is not None:
            raise ValueError(f"{key} is not supported: a latent consistency model has the sampler lcm alone; remove it")
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


class Previews:
    """Rows of images of a run's prompts: the teacher's, and the student's for each of its numbers of steps.

    The teacher's row is generated once. Each sampler is compiled once.
    """

    def __init__(
        self, config, teacher: StableDiffusion, student: StableDiffusion, tokenize: Tokenize, dataset: CaptionedDataset
    ):
        self.teacher, self.student, self.tokenize, self.dataset = teacher, student, tokenize, dataset
        self.prompts = dataset.prompts(config.sample.prompts)
        self.scored, self._settings = "verifier" in config.metrics, config.sample
        inpainting = inpainting_inputs(student, dataset.held_out, len(self.prompts))
        self._samplers = {
            name: PreviewSampler(
                model, tokenize, self.prompts, config.data.size, config.sample.batch_size, inpainting=inpainting
            )
            for name, model in (("teacher", teacher), ("student", student))
        }
        self._teacher_row: np.ndarray | None = None

    def rows(self, ema: Params, frozen: Params) -> dict[str, np.ndarray]:
        """Return uint8[len(prompts), H, W, 3] by label. ema: the trained networks; frozen: all of the teacher's."""
        settings, scale = self._settings, self._settings.guidance_scale
        if self._teacher_row is None:
            self._teacher_row, _ = self._samplers["teacher"](frozen, "ddim", settings.teacher_steps, scale)
        rows = {f"teacher, {settings.teacher_steps} steps": self._teacher_row}
        for n in settings.student_steps:
            images, _ = self._samplers["student"]({**frozen, **ema}, "lcm", n, scale)
            rows[f"student, {n} step{'s' * (n > 1)}"] = images
        return rows

    def save(self, ema: Params, frozen: Params, path: Path) -> dict[str, np.ndarray]:
        """Write `rows` as a PNG to `path`, and return them."""
        rows = self.rows(ema, frozen)
        save_grid(list(rows.values()), path, list(rows))
        return rows

    def write(self, ema: Params, frozen: Params, path: Path) -> dict[str, float]:
        """Write a PNG to `path` and the prompts beside it; return the verifier's scores if it is among the metrics."""
        rows = self.save(ema, frozen, path)
        path.with_suffix(".txt").write_text("\n".join(self.prompts) + "\n", encoding="utf-8")
        if not self.scored:
            return {}
        names = ["teacher", *(f"{n}_steps" for n in self._settings.student_steps)]
        return {
            f"verifier/{name}": verifier.score(row, self.prompts)["overall"]
            for name, row in zip(names, rows.values(), strict=True)
        }
