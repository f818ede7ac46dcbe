"""Pictures for fixed prompts while a model is trained, and grids of them."""

import copy
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from lcm_jax import pipeline
from lcm_jax.diffusion.samplers import SAMPLERS
from lcm_jax.models.stable_diffusion import StableDiffusion


class Sampler:
    """Pictures for fixed prompts from fixed noise. Each sampler is compiled once, for all its numbers of steps.

    plan: the numbers of steps that will be asked for, by sampler. inpainting: for a model that takes it, a picture and
    a mask for each prompt.
    """

    def __init__(
        self,
        model: StableDiffusion,
        tokenize,
        prompts: list[str],
        size: int,
        batch: int,
        plan: Mapping[str, Sequence[int]],
        seed: int = 1,
        inpainting: pipeline.Inpainting | None = None,
    ):
        self.prompts, self._batch = prompts, min(batch, len(prompts))
        self._model, self._tokenize, self._seed = model, tokenize, seed
        side = size // model.downscale
        self._shape = (side, side, model.vae.config["latent_channels"])
        self._ids, self._empty = tokenize(prompts), tokenize([""])[0]
        self._time_ids = None if model.text_encoder_2 is None else pipeline.make_time_ids(self._batch, (size, size))
        self._inpainting = inpainting
        self._rows = {
            name: len(pipeline.sampler_table(model, name, max(every)).timesteps)
            for name, every in plan.items()
            if every
        }
        self._compiled: dict = {}

    def of(self, prompts: list[str]) -> "Sampler":
        """Other prompts for the same programs."""
        other = copy.copy(self)
        other.prompts, other._ids = prompts, self._tokenize(prompts)
        return other

    def __call__(self, params, sampler: str, steps: int, guidance_scale: float) -> tuple[np.ndarray, float]:
        """(uint8[len(prompts), H, W, 3], seconds without compilation). params: by network."""
        params = jax.block_until_ready(jax.device_put({name: params[name] for name in self._model.networks}))
        rows = self._rows[sampler]
        table = pipeline.sampler_table(self._model, sampler, steps).padded(rows)
        draws = rows if SAMPLERS[sampler].adds_noise else 1
        inputs = [self._inputs(draws, first, guidance_scale) for first in range(0, len(self.prompts), self._batch)]
        if sampler not in self._compiled:
            function = jax.jit(
                lambda params, table, *each: pipeline.generate(
                    self._model, params, *each, sampler=sampler, table=table
                )[0]
            )
            self._compiled[sampler] = function.lower(params, table, *inputs[0]).compile()
        began = time.monotonic()
        parts = [np.asarray(self._compiled[sampler](params, table, *each)) for each in inputs]
        return np.concatenate(parts)[: len(self.prompts)], time.monotonic() - began

    def _inputs(self, draws: int, first: int, guidance_scale: float):
        chosen = np.minimum(first + np.arange(self._batch), len(self.prompts) - 1)
        z, noise = pipeline.draw_noise(self._seed, self._batch, draws, self._shape, first)
        to_paint = jax.tree.map(lambda each: each[chosen], self._inpainting)
        return self._ids[chosen], self._empty, z, noise, jnp.float32(guidance_scale), self._time_ids, to_paint


def save_grid(rows: list[np.ndarray], path: Path, labels: list[str] | None = None) -> None:
    """Writes a PNG of rows of equally sized pictures, each uint8[n, H, W, 3], with a label left of each row."""
    picture = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    margin, height = (110 if labels else 0), rows[0].shape[1]
    page = Image.new("RGB", (picture.shape[1] + margin, picture.shape[0]), "white")
    page.paste(Image.fromarray(picture), (margin, 0))
    for i, label in enumerate(labels or []):
        ImageDraw.Draw(page).text((6, i * height + height // 2 - 5), label, fill="black")
    page.save(path)
