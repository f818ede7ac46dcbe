"""Compiled train steps, one for each shape of batch, and errors of compiling that name the step and the remedy."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from lcm_jax.compiler import compiler_options, watch_cache
from lcm_jax.cost import count_flops
from lcm_jax.errors import RunError, first_line, memory_shortage

STEP_MEMORY = "lower train.batch_size, raise train.accumulate or mesh.fsdp, or set train.remat=block"


class Program(NamedTuple):
    """A compiled step, run(state, frozen, batch) -> (state, metrics), and its FLOPs without recomputed activations."""

    run: Callable
    flops: int


class Programs:
    """Compiled programs by the shapes of the batches that they are for."""

    def __init__(self, compile: Callable[[Mapping[str, Any]], Program]):
        self._compile, self._programs = compile, {}

    def of(self, batch: Mapping[str, Any]) -> Program:
        """Return the program for batches like this one, arrays or their shapes; it is compiled at the first call."""
        shapes = tuple((name, *each.shape) for name, each in sorted(batch.items()))
        if shapes not in self._programs:
            self._programs[shapes] = self._compile(
                {name: jax.ShapeDtypeStruct(each.shape, each.dtype) for name, each in batch.items()}
            )
        return self._programs[shapes]


def compile_step(step: Callable, arguments: tuple, title: str, mesh: jax.sharding.Mesh) -> Program:
    """Trace a jitted step for arguments of these shapes and dtypes, and compile it for the devices of `mesh`.

    Raises RunError that names the step, the devices and the remedy if that fails.
    """
    devices = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
    print(f"compiling the {title} step for {devices}")
    began, stage = time.monotonic(), "traced"
    try:
        traced = step.trace(*arguments)
        stage = "compiled"
        with watch_cache() as cache:
            compiled = traced.lower().compile(compiler_options=compiler_options(mesh.devices.flat[0].platform))
    except Exception as error:  # whatever JAX, Flax, XLA or a kernel raises
        text = first_line(error)
        if memory_shortage(error) is not None:
            remedy = f"; {STEP_MEMORY}"
        elif isinstance(error, ValueError):  # a setting, whose text contains its remedy
            remedy = ""
        else:
            remedy = (
                "; use --config.train.dtype=float32, which uses no fused kernels, or JAX_PLATFORMS=cpu, and report this"
            )
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise RunError(f"the {title} step cannot be {stage} for {devices}: {kind}{text}{remedy}") from error
    needed = ""
    if (memory := compiled.memory_analysis()) is not None:  # some backends have none
        total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        needed = f"; it takes {(total - memory.alias_size_in_bytes) / 1e9:.2f} GB of memory per device"
    verb = "loaded from the cache" if cache.loaded else "compiled"
    print(f"{verb} in {time.monotonic() - began:.0f} s{needed}")
    return Program(compiled, count_flops(traced.jaxpr.jaxpr, recomputed=False))
