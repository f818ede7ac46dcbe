"""The shared part of all samplers: the record, the table of steps, and the loop over the table."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.diffusion.options import Config, flag, unsupported
from lcm_jax.diffusion.schedule import Schedule, output_to_noise, output_to_x0

Network = Callable[[jax.Array, jax.Array], jax.Array]
Noise = Callable[[jax.Array], jax.Array]
NO_CLIPPING = "false: latents are not clipped"


class Table(NamedTuple):
    """Steps of a sampler, one row for each evaluation of the network.

    timesteps: int32[n], or float32[n] for timesteps between training steps. coefficients: float32[n, k], computed in
    float64. scale: float32[], the factor that turns standard normal noise into the first latents.

    A table of NumPy arrays is a constant of the program. A traced table is an argument; if it is `padded`, one program
    serves any number of steps up to n.
    """

    timesteps: np.ndarray | jax.Array
    coefficients: np.ndarray | jax.Array
    scale: np.float32 | jax.Array = np.float32(1)

    def padded(self, n: int) -> "Table":
        """Return the table with n rows; the loop ends before the added ones, whose timestep is -1."""
        added = n - len(self.timesteps)
        return self._replace(
            timesteps=np.pad(self.timesteps, (0, added), constant_values=-1),
            coefficients=np.pad(self.coefficients, ((0, added), (0, 0))),
        )


class Sampler(NamedTuple):
    """Record of a sampler.

    scheduler: the class in diffusers. make_table(schedule, config, n): the Table of n steps for the options of a
    scheduler_config.json of any class; raises ValueError for an unsupported value of an option that this sampler uses.
    sample(network, z, table, schedule, noise): final latents, float32[B, h, w, c]. adds_noise: True if `sample` needs
    `noise`, where noise(i) is the standard normal noise float32[B, h, w, c] of step i; else `noise` is None.
    """

    scheduler: str
    make_table: Callable[[Schedule, Config, int], Table]
    sample: Callable[..., jax.Array]
    adds_noise: bool = False


def stack_table(timesteps: np.ndarray, *columns: np.ndarray, scale: float = 1.0) -> Table:
    """Return the table with these columns of coefficients, each float64[n]."""
    return Table(timesteps, np.stack(columns, axis=1).astype(np.float32), np.float32(scale))


def iterate(step: Callable, carry, table: Table):
    """Return `carry` after step(carry, i, t, coefficients) for every row i of the table.

    i: int32[]; t: [B], the row's timestep; coefficients: float32[k]. The number of iterations is that of the table's
    own rows, even if the table is padded: a loop of dynamic length, which cannot be differentiated in reverse.
    """
    batch = len(jax.tree.leaves(carry)[0])
    timesteps, coefficients = jnp.asarray(table.timesteps), jnp.asarray(table.coefficients)
    constant = isinstance(table.timesteps, np.ndarray)
    rows = np.count_nonzero(table.timesteps >= 0) if constant else jnp.sum(timesteps >= 0, dtype=jnp.int32)

    def take(i, carry):
        return step(carry, i, jnp.full(batch, timesteps[i]), coefficients[i])

    return jax.lax.fori_loop(np.int32(0), np.int32(rows) if constant else rows, take, carry)


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
