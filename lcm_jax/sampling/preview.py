"""Images of fixed prompts while a model is trained, and grids of them."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image, ImageDraw

from lcm_jax.compiler import compiler_options
from lcm_jax.cost import count_flops
from lcm_jax.diffusion.samplers.table import Table
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.sampling.finite import check_finite
from lcm_jax.sampling.generate import generate, is_classifier_free, sampler_table
from lcm_jax.sampling.inputs import Inpainting, Inputs, draw_noise, make_time_ids


class PreviewSampler:
    """Generator of images of size x size pixels for fixed prompts from fixed noise.

    tokenize(prompts): token ids, as `Inputs` has them. inpainting: for an inpainting model, an image and a mask for
    each prompt. mesh: devices that share each batch, on which the parameters are. Each sampler is compiled once, for
    any number of steps.
    """

    def __init__(
        self,
        model: StableDiffusion,
        tokenize: Callable[[Sequence[str]], np.ndarray],
        prompts: Sequence[str],
        size: int,
        batch_size: int,
        *,
        seed: int = 1,
        inpainting: Inpainting | None = None,
        mesh: Mesh | None = None,
    ):
        self.model, self.tokenize, self.prompts = model, tokenize, list(prompts)
        devices = 1 if mesh is None else mesh.size
        self.batch_size = -(-min(batch_size, len(prompts)) // devices) * devices
        self._size, self._seed, self._mesh = size, seed, mesh
        self._token_ids, self._negative_ids, self._inpainting = tokenize(self.prompts), tokenize([""]), inpainting
        self._programs: dict = {}

    def with_prompts(self, prompts: Sequence[str], inpainting: Inpainting | None = None) -> "PreviewSampler":
        """Return a sampler of other prompts, with an inpainting of their own, that shares the compiled programs."""
        other = copy.copy(self)
        other.prompts, other._token_ids, other._inpainting = list(prompts), self.tokenize(prompts), inpainting
        return other

    def __call__(
        self, params: Mapping[str, Any], sampler: str, steps: int, guidance_scale: float
    ) -> tuple[np.ndarray, float]:
        """Return (uint8[N, size, size, 3], seconds without compilation) for the N prompts.

        params: by network, on the host or on devices; those on devices are used where they are.
        """
        images, seconds = zip(*self.batches(params, sampler, steps, guidance_scale), strict=True)
        return np.concatenate(images), sum(seconds)

    def batches(
        self,
        params: Mapping[str, Any],
        sampler: str,
        steps: int,
        guidance_scale: float,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[tuple[np.ndarray, float]]:
        """Yield what a call returns a batch at a time, for more images than the host's memory holds.

        numbers: of the prompts, whose images are the same whatever others are made with them; all by default. Raises
        ModelError for a network that gives NaN or infinity, as `Pipeline` does.
        """
        params = self._place(params)
        table = sampler_table(self.model, sampler, steps)
        chosen = range(len(self.prompts)) if numbers is None else numbers
        for start in range(0, len(chosen), self.batch_size):
            rows = np.array(chosen[start : start + self.batch_size])
            inputs = jax.block_until_ready(self._inputs(rows, guidance_scale))
            program = self._program(sampler, params, inputs, table)
            began = time.monotonic()
            images, finite = jax.device_get(program(params, inputs, table=table))
            elapsed = time.monotonic() - began
            check_finite(finite, params, self.model.unet.dtype, f"{sampler} at {steps} steps")
            yield images[: len(rows)], elapsed

    def cost(
        self, params: Mapping[str, Any], sampler: str, steps: int, guidance_scale: float
    ) -> dict[str, float | None]:
        """Return {"peak_memory_gb": of the program, its arguments and results, "tflop_per_image": of its matrix work}.

        The memory is the compiler's own figure for each device, in 10^9 bytes, or None where it gives none.
        """
        params = self._place(params)
        inputs, table = self._inputs(np.zeros(1, int), guidance_scale), sampler_table(self.model, sampler, steps)
        memory = self._program(sampler, params, inputs, table).memory_analysis()
        used = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
        rows = int((table.timesteps >= 0).sum())
        exact = Table(table.timesteps[:rows], table.coefficients[:rows], table.levels[: rows + 1], table.start)
        program = jax.make_jaxpr(partial(generate, self.model, sampler=sampler, table=exact))(params, inputs)
        return {
            "peak_memory_gb": sum(getattr(memory, name) for name in used) / 1e9 if memory else None,
            "tflop_per_image": float(f"{count_flops(program.jaxpr) / self.batch_size / 1e12:.4g}"),
        }

    def _place(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return jax.block_until_ready(jax.device_put({name: params[name] for name in self.model.networks}))

    def _inputs(self, numbers: np.ndarray, guidance_scale: float) -> Inputs:
        """Return the inputs of a batch: of the prompts with these numbers, the last repeated as often as it takes."""
        rows = np.pad(numbers, (0, self.batch_size - len(numbers)), mode="edge")
        side = self._size // self.model.downscale
        shape = (side, side, self.model.vae.config["latent_channels"])
        guided = is_classifier_free(self.model, guidance_scale)
        latents, noise = draw_noise(self._seed, rows.astype(np.uint32), shape)
        inputs = Inputs(
            token_ids=self._token_ids[rows],
            negative_ids=np.repeat(self._negative_ids, len(rows), axis=0) if guided else None,
            latents=latents,
            noise=noise,
            guidance_scale=np.float32(guidance_scale),
            time_ids=None if self.model.text_encoder_2 is None else make_time_ids(len(rows), (self._size, self._size)),
            inpainting=jax.tree.map(lambda each: each[rows], self._inpainting),
        )
        if self._mesh is None:
            return inputs
        split, whole = (NamedSharding(self._mesh, PartitionSpec(*axes)) for axes in ([self._mesh.axis_names], []))
        place = lambda leaf: split if np.ndim(leaf) else whole  # noqa: E731
        return jax.device_put(inputs, jax.tree.map(place, inputs))

    def _program(self, sampler: str, params, inputs: Inputs, table):
        """Return the compiled program for parameters that are placed, and inputs that are guided, as these are."""
        key = (sampler, inputs.negative_ids is None, *(leaf.sharding for leaf in jax.tree.leaves(params)))
        if key not in self._programs:
            function = jax.jit(partial(generate, self.model, sampler=sampler), compiler_options=compiler_options())
            self._programs[key] = function.lower(params, inputs, table=table).compile()
        return self._programs[key]


def save_grid(rows: Sequence[np.ndarray], path: Path, labels: Sequence[str] = ()) -> None:
    """Write a PNG of rows of images of one size, each uint8[n, H, W, 3], with a label left of each row, if any."""
    grid = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    margin, height = (110 if labels else 0), rows[0].shape[1]
    page = Image.new("RGB", (grid.shape[1] + margin, grid.shape[0]), "white")
    page.paste(Image.fromarray(grid), (margin, 0))
    for i, label in enumerate(labels):
        ImageDraw.Draw(page).text((6, i * height + height // 2 - 5), label, fill="black")
    page.save(path)


def make_grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Return one image of PIL images of one size, row by row."""
    width, height = images[0].size
    grid = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height), "white")
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * width, i // columns * height))
    return grid
