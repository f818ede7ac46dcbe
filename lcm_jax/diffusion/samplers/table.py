"""The shared part of all samplers: the record, the table of steps, and the loop over the table."""

from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.diffusion.options import Config, flag, unsupported
from lcm_jax.diffusion.schedule import Schedule, output_to_noise, output_to_x0

Network = Callable[[jax.Array, jax.Array], jax.Array]
Noise = Callable[[jax.Array], jax.Array]
OnStep = Callable[[jax.Array, jax.Array], jax.Array]
NO_CLIPPING = "false: latents are not clipped"


class Table(NamedTuple):
    """Steps of a sampler, one row for each evaluation of the network.

    timesteps: int32[n], or float32[n] for timesteps between training steps. coefficients: float32[n, k], computed in
    float64. levels: float32[n + 1, 2], the factors of x0 and of noise in z before each row and, (1, 0), after the last:
    an image at levels[i + 1] can replace a part of z after row i. start: float32[2], the factors of x0 and of standard
    normal noise that make the first z.

    A table of NumPy arrays is a constant of the program. A traced table is an argument; if it is `padded`, one program
    serves any number of steps up to n.
    """

    timesteps: np.ndarray | jax.Array
    coefficients: np.ndarray | jax.Array
    levels: np.ndarray | jax.Array
    start: np.ndarray | jax.Array

    def padded(self, n: int) -> "Table":
        """Return the table with n rows; the loop ends before the added ones, whose timestep is -1."""
        added = n - len(self.timesteps)
        return self._replace(
            timesteps=np.pad(self.timesteps, (0, added), constant_values=-1),
            coefficients=np.pad(self.coefficients, ((0, added), (0, 0))),
            levels=np.pad(self.levels, ((0, added), (0, 0)), mode="edge"),
        )

    def from_image(self) -> "Table":
        """Return the table whose first z is an image with noise, for image-to-image, instead of noise alone."""
        return self._replace(start=self.levels[0])

    def skip(self, rows: int) -> "Table":
        """Return the table without its first rows, as image-to-image shortens it."""
        return self._replace(
            timesteps=self.timesteps[rows:], coefficients=self.coefficients[rows:], levels=self.levels[rows:]
        )


class Sampler(NamedTuple):
    """Record of a sampler.

    name: in SAMPLERS. scheduler: the class in diffusers. build(schedule, config, n, strength), with eta as a fifth
    argument if `eta` is not None: see `make_table`.
    sample(network, z, table, schedule, noise, on_step=None): final latents, float32[B, h, w, c], from z of that shape
    at the table's first timestep, which is start[0] x0 + start[1] noise. on_step(i, z): replaces z after row i:
    int32[]. adds_noise: True if `sample` needs `noise`, where noise(i) is the standard normal noise
    float32[B, h, w, c] of step i; else `noise` is None. eta: the default share of noise that each step renews, or None
    for a sampler without this choice. consistency: True if the sampler jumps along the trajectory, as only a
    consistency model does.
    """

    name: str
    scheduler: str
    build: Callable[..., Table]
    sample: Callable[..., jax.Array]
    adds_noise: bool = False
    eta: float | None = None
    consistency: bool = False

    def make_table(
        self, schedule: Schedule, config: Config, n: int, strength: float = 1.0, eta: float | None = None
    ) -> Table:
        """Return the Table of n steps for the options of a scheduler_config.json of any class.

        strength: below 1 for image-to-image, which starts later: at 0.5 about halfway. eta: in [0, 1]; the sampler's
        default if it is None. Raises ValueError for an unsupported value of an argument, or of an option that this
        sampler uses.
        """
        if self.eta is None:
            if eta is not None:
                raise ValueError(f"eta is {eta!r}, but sampler {self.name!r} has no eta; omit it, or use ddim or tcd")
            return self.build(schedule, config, n, strength)
        eta = self.eta if eta is None else eta
        if not isinstance(eta, Real) or isinstance(eta, bool) or not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta!r}; use a number from 0 to 1")
        return self.build(schedule, config, n, strength, eta)


def stack_table(
    timesteps: np.ndarray, levels: tuple[np.ndarray, np.ndarray], *columns: np.ndarray, scale: float = 1.0
) -> Table:
    """Return the table with these columns of coefficients, each float64[n].

    levels: alpha and sigma of z before each row, float64[n]. scale: the factor of the noise that sampling starts from.
    """
    ended = np.stack([np.append(levels[0], 1.0), np.append(levels[1], 0.0)], axis=1)
    start = np.array([0.0, scale], np.float32)
    return Table(timesteps, np.stack(columns, axis=1).astype(np.float32), ended.astype(np.float32), start)


def iterate(step: Callable, z: jax.Array, table: Table, on_step: OnStep | None = None, memory: Any = None) -> jax.Array:
    """Return z after z, memory = step(z, memory, i, t, coefficients), then z = on_step(i, z), for every row i.

    z: float32[B, h, w, c]; memory: a pytree, what a multistep sampler keeps; i: int32[]; t: [B], the row's timestep;
    coefficients: float32[k]. The number of iterations is that of the table's own rows, even if the table is padded: a
    loop of dynamic length, which cannot be differentiated in reverse.
    """
    batch = len(z)
    timesteps, coefficients = jnp.asarray(table.timesteps), jnp.asarray(table.coefficients)
    constant = isinstance(table.timesteps, np.ndarray)
    rows = np.count_nonzero(table.timesteps >= 0) if constant else jnp.sum(timesteps >= 0, dtype=jnp.int32)

    def take(i, carry):
        z, memory = step(*carry, i, jnp.full(batch, timesteps[i]), coefficients[i])
        return z if on_step is None else on_step(i, z), memory

    return jax.lax.fori_loop(np.int32(0), np.int32(rows) if constant else rows, take, (z, memory))[0]


def add_scaled(z: jax.Array, scale: jax.Array, noise: Noise, i: jax.Array) -> jax.Array:
    """Return z + scale noise(i), float32[B, h, w, c]. scale: float32[]; no noise is drawn where it is 0."""
    return jax.lax.cond(scale > 0, lambda: z + scale * noise(i), lambda: z)


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
