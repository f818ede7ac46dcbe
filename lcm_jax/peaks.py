"""The peaks of the default device, measured: FLOP/s of a large matrix product and bytes per second of a large copy."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lcm_jax.compiler import compiler_options

SIDE, CPU_SIDE = 8192, 2048  # of the matrix
NBYTES = 2**28  # of the copy, more than a cache has
RUNS = 5


class Peaks(NamedTuple):
    """flops: FLOP/s of a matrix product by the dtype of its operands. bandwidth: bytes/s, read and written."""

    flops: dict[str, float]
    bandwidth: float

    def limit(self, flops: float, nbytes: float, dtype: str) -> float:
        """Return the seconds below which no kernel with this work can be: the roofline.

        dtype: of the products. The highest peak stands for one that has not been measured.
        """
        return max(flops / self.flops.get(dtype, max(self.flops.values())), nbytes / self.bandwidth)


def measure(dtypes: Sequence[str]) -> Peaks:
    """Measure the default device, in about a second besides compilation. dtypes: of the matrix products."""
    return Peaks({dtype: measure_product(dtype) for dtype in dtypes}, measure_copy())


def measure_product(dtype: str) -> float:
    """Return the FLOP/s of a square matrix product in the best of some runs."""
    side = CPU_SIDE if jax.default_backend() == "cpu" else SIDE
    x = jax.random.normal(jax.random.key(0), (side, side), dtype)
    product = jax.jit(jnp.matmul, compiler_options=compiler_options())
    return 2 * side**3 / _shortest(lambda: product(x, x))


def measure_copy() -> float:
    """Return the bytes per second that an elementwise kernel reads and writes, in the best of some runs."""
    # In place, since a CPU would spend most of the time on the pages of a new array.
    negate = jax.jit(jnp.negative, donate_argnums=0)
    x = jnp.ones(NBYTES // 4, jnp.float32)

    def run() -> jax.Array:
        nonlocal x
        x = negate(x)
        return x

    return 2 * NBYTES / _shortest(run)


def _shortest(run: Callable[[], Any]) -> float:
    """Return the seconds of the fastest run after the first, which compiles."""
    seconds = []
    for _ in range(1 + RUNS):
        began = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])
