"""The programs of a pipeline: one for each sampler and set of options, and in it one for each shape of the inputs."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lcm_jax.compiler import compiler_options, watch_cache
from lcm_jax.diffusion.samplers.table import Table
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.sampling.finite import Finite
from lcm_jax.sampling.generate import generate, is_classifier_free
from lcm_jax.sampling.inputs import Inputs, draw_noise, make_time_ids


class Programs:
    """Jitted programs of a model, and the devices that they run on.

    mesh: devices that share each batch; None for the default device.
    """

    def __init__(self, model: StableDiffusion, mesh: Mesh | None):
        self.model, self.mesh = model, mesh
        self.jitted: dict = {}  # by sampler and options

    def of(
        self,
        sampler: str,
        *,
        clip_skip: int = 0,
        zero_empty: bool = True,
        decode: bool = True,
        callback: Callable | None = None,
        tile: int | None = None,
    ):
        """Return `generate` with this sampler and these options, jitted once."""
        key = (sampler, clip_skip, zero_empty, decode, callback, tile)
        if key not in self.jitted:
            function = partial(
                generate,
                self.model,
                sampler=sampler,
                clip_skip=clip_skip,
                zero_empty=zero_empty,
                decode=decode,
                callback=callback,
                tile=tile,
            )
            self.jitted[key] = jax.jit(function, compiler_options=compiler_options())
        return self.jitted[key]

    def round_up(self, batch: int) -> int:
        """Return the batch that the devices of the mesh share equally."""
        devices = 1 if self.mesh is None else self.mesh.size
        return -(-batch // devices) * devices

    def place(self, inputs: Inputs, table: Table) -> tuple[Inputs, Table]:
        """Return both where a program needs them: on a mesh, each row of a batch on its device."""
        if self.mesh is None:
            return inputs, table
        split, whole = (NamedSharding(self.mesh, PartitionSpec(*axes)) for axes in ([self.mesh.axis_names], []))
        batch = len(inputs.token_ids)
        place = lambda leaf: split if np.ndim(leaf) and len(leaf) == batch else whole  # noqa: E731
        return jax.device_put((inputs, table), (jax.tree.map(place, inputs), whole))

    def run(self, program, params: Any, inputs: Inputs, table: Table) -> tuple[np.ndarray, Finite]:
        """Return the results of a program on the host."""
        inputs, table = self.place(inputs, table)
        # Waited for before the copy, which aborts the process instead of raising an error if memory has run out.
        return jax.device_get(jax.block_until_ready(program(params, inputs, table=table)))

    def compile(
        self,
        program,
        params: Any,
        empty_ids: Callable[[int], np.ndarray],
        table: Table,
        batch_sizes: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        guidance_scale: float,
    ) -> None:
        """Compile a text-to-image program of `of` for these batches and sizes; calls like these then compile nothing.

        empty_ids(batch): tokens of as many empty prompts. sizes: (height, width) in pixels. Prints a line for each.
        """
        guided = is_classifier_free(self.model, guidance_scale)
        for height, width in sizes:
            for batch in map(self.round_up, batch_sizes):
                ids, shape = empty_ids(batch), latent_shape(self.model, (height, width))
                latents, noise = draw_noise(0, np.arange(batch, dtype=np.uint32), shape)
                time_ids = None if self.model.text_encoder_2 is None else make_time_ids(batch, (height, width))
                scale = np.float32(guidance_scale)
                inputs = Inputs(ids, ids if guided else None, latents, noise, scale, time_ids)
                inputs, placed = self.place(inputs, table)
                began = time.monotonic()
                with watch_cache() as cache:
                    program.lower(params, inputs, table=placed).compile()
                verb = "loaded from the cache" if cache.loaded else "compiled"
                print(f"{height} x {width} pixels, batch of {batch}: {verb} in {time.monotonic() - began:.1f} s")

    def __getstate__(self) -> dict:
        """Return the state without compiled programs, which cannot be pickled; a call compiles them again."""
        return self.__dict__ | {"jitted": {}}


def latent_shape(model: StableDiffusion, size: tuple[int, int]) -> tuple[int, int, int]:
    """Return (h, w, c) of the latents of an image of (height, width) in pixels."""
    return size[0] // model.downscale, size[1] // model.downscale, model.vae.config["latent_channels"]
