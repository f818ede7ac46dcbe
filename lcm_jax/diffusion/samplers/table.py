"""What all samplers share: the record, the table of steps, and the scan over the table."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.diffusion.options import Config, flag, unsupported
from lcm_jax.diffusion.schedule import Schedule, output_to_noise, output_to_x0

Network = Callable[[jax.Array, jax.Array], jax.Array]
NO_CLIPPING = "false: latents are not clipped"


class Table(NamedTuple):
    """Steps of a sampler, one row for each evaluation of the network.

    timesteps: int32[n], or float32[n] for timesteps between training steps. coefficients: float32[n, k], computed in
    float64. scale: float32[], the factor that turns standard normal noise into the first latents.

    A table of NumPy arrays is a constant of the program. A traced table is an argument, and may be `padded`, so that
    one program serves any number of steps up to n.
    """

    timesteps: np.ndarray | jax.Array
    coefficients: np.ndarray | jax.Array
    scale: np.ndarray | jax.Array = np.float32(1)

    def padded(self, n: int) -> "Table":
        """Return the table with n rows; the added ones have the timestep -1 and are skipped at no cost."""
        added = n - len(self.timesteps)
        return self._replace(
            timesteps=np.pad(self.timesteps, (0, added), constant_values=-1),
            coefficients=np.pad(self.coefficients, ((0, added), (0, 0))),
        )


class Sampler(NamedTuple):
    """Record of a sampler.

    scheduler: the class in diffusers. make_table(schedule, config, n): the Table of n steps for the options of a
    scheduler_config.json of any class; raises ValueError for an unsupported value of an option that this sampler uses.
    sample(network, z, table, schedule, noise): final latents, float32[B, h, w, c]. adds_noise: True if `sample` uses
    `noise`, else it is None.
    """

    scheduler: str
    make_table: Callable[[Schedule, Config, int], Table]
    sample: Callable[..., jax.Array]
    adds_noise: bool = False


def stack_table(timesteps: np.ndarray, *columns: np.ndarray, scale: float = 1.0) -> Table:
    """Return the table with these columns of coefficients, each float64[n]."""
    return Table(timesteps, np.stack(columns, axis=1).astype(np.float32), np.float32(scale))


def step_noise(noise: jax.Array, table: Table, z: jax.Array) -> jax.Array:
    """Return the noise that each step of the table adds, none at the last: float32[n, B, h, w, c]."""
    return jnp.concatenate([noise[: len(table.timesteps) - 1], jnp.zeros_like(z)[None]])


def scan(step: Callable, carry, table: Table, *more: jax.Array):
    """Return `carry` after step(carry, t, coefficients, *more) for every row of the table; t: int32[B]."""
    batch = len(jax.tree.leaves(carry)[0])

    def take(carry, row):
        timestep, coefficients, *rest = row
        return step(carry, jnp.full(batch, timestep), coefficients, *rest)

    def take_or_pass(carry, row):
        return jax.lax.cond(row[0] >= 0, take, lambda carry, row: carry, carry, row)

    chosen = take if isinstance(table.timesteps, np.ndarray) else take_or_pass
    rows = (table.timesteps, table.coefficients, *more)
    return jax.lax.scan(lambda carry, row: (chosen(carry, row), None), carry, rows)[0]


def refuse_clipping(config: Config) -> None:
    """Raise ValueError if x0 would be clipped, as for pixels; DDIMScheduler clips unless clip_sample is false."""
    if flag(config, "clip_sample", config.get("_class_name") == "DDIMScheduler"):
        raise unsupported("clip_sample", True, NO_CLIPPING)
    if flag(config, "thresholding"):
        raise unsupported("thresholding", True, NO_CLIPPING)


def split_output(schedule: Schedule, output: jax.Array, z: jax.Array, alpha, sigma) -> tuple[jax.Array, jax.Array]:
    """Return (x0, noise) with z = alpha x0 + sigma noise, from the network's output at z."""
    kind = schedule.prediction_type
    return output_to_x0(kind, output, z, alpha, sigma), output_to_noise(kind, output, z, alpha, sigma)
