"""From noise to latents: samplers, each a table of steps made on the host and a `lax.scan` over it.

`network(z, t)` takes z: float32[B, h, w, c] and t[B], of the table's dtype, and returns the network's output, guidance
included. Every coefficient that does not depend on z is computed on the host in float64, into a table of all steps.
`SAMPLERS` holds a record a sampler; its options are those of the scheduler's class in diffusers.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.diffusion import grids
from lcm_jax.diffusion.consistency import consistency_function
from lcm_jax.diffusion.options import Config, choice, flag, number, unsupported, whole
from lcm_jax.diffusion.schedule import Schedule, output_to_noise, output_to_x0
from lcm_jax.diffusion.solvers import ddim_step, dpm_solver_pp_2m_step

Network = Callable[[jax.Array, jax.Array], jax.Array]


class Table(NamedTuple):
    """A sampler's steps, a row for each evaluation of the network.

    timesteps: int32[n], or float32[n] if the network is asked between training steps. coefficients: float32[n, k].
    scale: float32[], by which standard normal noise is multiplied to begin from.

    A table on the host is part of the program. One that is traced is an argument of it, and may be `padded`, so that
    one program takes any number of steps up to n.
    """

    timesteps: np.ndarray | jax.Array
    coefficients: np.ndarray | jax.Array
    scale: np.ndarray | jax.Array = np.float32(1)

    def padded(self, n: int) -> "Table":
        """n rows, those added with the timestep -1: they are passed over, and cost nothing."""
        more = n - len(self.timesteps)
        return self._replace(
            timesteps=np.pad(self.timesteps, (0, more), constant_values=-1),
            coefficients=np.pad(self.coefficients, ((0, more), (0, 0))),
        )


def _table(timesteps: np.ndarray, *coefficients: np.ndarray, scale: float = 1.0) -> Table:
    return Table(timesteps, np.stack(coefficients, axis=1).astype(np.float32), np.float32(scale))


def _step_noise(noise: jax.Array, table: Table, z: jax.Array) -> jax.Array:
    """The noise that each step of the table adds; none is asked for the last, which adds none."""
    return jnp.concatenate([noise[: len(table.timesteps) - 1], jnp.zeros_like(z)[None]])


def _scan(step: Callable, carry, table: Table, *more: jax.Array):
    """`carry` after step(carry, t, coefficients, *more) for every row of the table; t: int32[B]."""
    batch = len(jax.tree.leaves(carry)[0])

    def take(carry, row):
        timestep, coefficients, *rest = row
        return step(carry, jnp.full(batch, timestep), coefficients, *rest)

    def take_or_pass(carry, row):
        return jax.lax.cond(row[0] >= 0, take, lambda carry, row: carry, carry, row)

    chosen = take if isinstance(table.timesteps, np.ndarray) else take_or_pass
    rows = (table.timesteps, table.coefficients, *more)
    return jax.lax.scan(lambda carry, row: (chosen(carry, row), None), carry, rows)[0]


NO_CLIPPING = "false: latents are not clipped"


def _refuse_clipping(config: Config) -> None:
    """Raises ValueError where x0 would be clipped, as for pixels. DDIMScheduler does it unless it is told not to."""
    if flag(config, "clip_sample", config.get("_class_name") == "DDIMScheduler"):
        raise unsupported("clip_sample", True, NO_CLIPPING)
    if flag(config, "thresholding"):
        raise unsupported("thresholding", True, NO_CLIPPING)


def _read(schedule: Schedule, output: jax.Array, z: jax.Array, alpha, sigma) -> tuple[jax.Array, jax.Array]:
    """(x0, noise) that the network's output means at z = alpha x0 + sigma noise."""
    kind = schedule.prediction_type
    return output_to_x0(kind, output, z, alpha, sigma), output_to_noise(kind, output, z, alpha, sigma)


# ---- the multistep consistency sampler ------------------------------------------------------------------------------


def consistency_table(timesteps: np.ndarray, schedule: Schedule) -> Table:
    """For `sample_consistency`: alpha and sigma of the next timestep. timesteps: int32[n], descending."""
    n = len(timesteps)
    bar = schedule.alphas_cumprod.astype(np.float64)[np.append(timesteps[1:], timesteps[-1])]
    # After the last jump nothing is added, as if it had gone to alpha = 1, sigma = 0.
    last = np.arange(n) == n - 1
    return _table(timesteps, np.where(last, 1.0, np.sqrt(bar)), np.where(last, 0.0, np.sqrt(1.0 - bar)))


def make_lcm_table(schedule: Schedule, config: Config, n: int) -> Table:
    _refuse_clipping(config)
    choice(config, "timestep_scaling", 10.0, (10.0,))
    total = len(schedule.alphas_cumprod)
    original = whole(config, "original_inference_steps", 50, 1, total)
    return consistency_table(grids.lcm_timesteps(n, 1.0, original, total), schedule)


def sample_consistency(network: Network, z: jax.Array, table: Table, schedule: Schedule, noise: jax.Array) -> jax.Array:
    """Algorithm 3 of arXiv 2310.04378: jump to x0, noise it again to the next timestep, jump again.

    z: float32[B, h, w, c], standard normal. noise: float32[n - 1 or more, B, h, w, c].
    Returns the last jump's latents, float32[B, h, w, c].
    """

    def step(z, t, coefficients, noise):
        alpha, sigma = coefficients
        return alpha * consistency_function(schedule, network(z, t), z, t) + sigma * noise

    return _scan(step, z, table, _step_noise(noise, table, z))


# ---- DDIM and its multistep kin, on training steps ------------------------------------------------------------------


def _levels(bars: np.ndarray, last: float, to: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(alpha, sigma) at the timesteps `to`; those below 0 stand for the end, where alpha^2 is `last`."""
    bar = np.where(to >= 0, bars[np.maximum(to, 0)], last)
    return np.sqrt(bar), np.sqrt(1.0 - bar)


def ddim_table(
    timesteps: np.ndarray, schedule: Schedule, set_alpha_to_one: bool = False, num_inference_steps: int | None = None
) -> Table:
    """For `sample_ddim`: alpha and sigma of where each step starts and of where it goes.

    timesteps: int32[n] descending and evenly spaced. As in diffusers each step goes to t - 1000 // n, which is the next
    timestep where n divides 1000; the last one goes to t = 0, or to alpha = 1. num_inference_steps: this n, where
    strength < 1 has left fewer timesteps.
    """
    bars = schedule.alphas_cumprod.astype(np.float64)
    to = timesteps - len(bars) // (num_inference_steps or len(timesteps))
    last = 1.0 if set_alpha_to_one else bars[0]
    return _table(timesteps, *_levels(bars, last, timesteps), *_levels(bars, last, to))


def _solver_timesteps(schedule: Schedule, config: Config, n: int) -> np.ndarray:
    total = len(schedule.alphas_cumprod)
    spacing = choice(config, "timestep_spacing", "leading", grids.SPACINGS)
    return grids.solver_timesteps(n, spacing, whole(config, "steps_offset", 0, 0, total), total)


def make_ddim_table(schedule: Schedule, config: Config, n: int) -> Table:
    _refuse_clipping(config)
    return ddim_table(_solver_timesteps(schedule, config, n), schedule, flag(config, "set_alpha_to_one", True))


def sample_ddim(network: Network, z: jax.Array, table: Table, schedule: Schedule, noise: None = None) -> jax.Array:
    """DDIM with eta 0 (arXiv 2010.02502) from z: float32[B, h, w, c] at the table's first timestep."""

    def step(z, t, coefficients):
        alpha, sigma, alpha_to, sigma_to = coefficients
        return ddim_step(*_read(schedule, network(z, t), z, alpha, sigma), alpha_to, sigma_to)

    return _scan(step, z, table)


# By row: how much of the network's output at it and at the four rows before it makes the output that a step takes.
# Row 1 is the second half of Heun's first step, and no later row looks at it.
PLMS_WEIGHTS = np.array(
    [
        [1, 0, 0, 0, 0],
        [1 / 2, 1 / 2, 0, 0, 0],
        [3 / 2, 0, -1 / 2, 0, 0],
        [23 / 12, -16 / 12, 0, 5 / 12, 0],
        [55 / 24, -59 / 24, 37 / 24, 0, -9 / 24],
        [55 / 24, -59 / 24, 37 / 24, -9 / 24, 0],
    ]
)


def make_pndm_table(schedule: Schedule, config: Config, n: int) -> Table:
    """For `sample_pndm`, n + 1 rows (1 if n is 1): alpha and sigma of where each step starts and of where it goes, 1 if
    it starts again from where the row before did, and its PLMS_WEIGHTS."""
    if not flag(config, "skip_prk_steps"):
        raise unsupported("skip_prk_steps", False, "true, or another sampler, such as ddim")
    if schedule.prediction_type == "sample":
        raise unsupported("prediction_type", "sample", "another sampler, such as ddim: PNDM averages noise")
    timesteps = _solver_timesteps(schedule, config, n)
    bars = schedule.alphas_cumprod.astype(np.float64)
    asked = np.insert(timesteps, 2, timesteps[1]) if n > 1 else timesteps
    rows, stride = np.arange(len(asked)), len(bars) // n
    again = rows == 1
    start = asked + np.where(again, stride, 0)
    last = 1.0 if flag(config, "set_alpha_to_one") else bars[0]
    weights = PLMS_WEIGHTS[np.minimum(rows, len(PLMS_WEIGHTS) - 1)].T
    return _table(asked, *_levels(bars, last, start), *_levels(bars, last, start - stride), again, *weights)


def sample_pndm(network: Network, z: jax.Array, table: Table, schedule: Schedule, noise: None = None) -> jax.Array:
    """The linear multistep part of PNDM (arXiv 2202.09778), as Stable Diffusion samples: DDIM steps with a weighted sum
    of the last outputs. z: float32[B, h, w, c] at the table's first timestep."""

    def step(carry, t, coefficients):
        z, before, outputs = carry
        alpha, sigma, alpha_to, sigma_to, again, *weights = coefficients
        outputs = (network(z, t).astype(jnp.float32), *outputs)
        output = sum(weight * each for weight, each in zip(weights, outputs, strict=True))
        start = jnp.where(again > 0, before, z)
        return ddim_step(*_read(schedule, output, start, alpha, sigma), alpha_to, sigma_to), z, outputs[:-1]

    return _scan(step, (z, z, (jnp.zeros_like(z),) * 4), table)[0]


# ---- solvers in sigma / alpha, which may stand between training steps -----------------------------------------------


def sigma_table(schedule: Schedule) -> np.ndarray:
    """sigma / alpha of every training step, float32[T], rising.

    A zero-SNR table ends in alpha = 0, where it is infinite: alpha^2 = 2^-24 stands in for it, as in diffusers.
    """
    bar = np.maximum(schedule.alphas_cumprod, np.float32(2.0**-24))
    return np.sqrt((1 - bar) / bar)


SIGMAS = {
    "use_karras_sigmas": grids.karras_sigmas,
    "use_lu_lambdas": grids.exponential_sigmas,
    "use_exponential_sigmas": grids.exponential_sigmas,
    "use_beta_sigmas": grids.beta_sigmas,
}


def _chosen_sigmas(config: Config, options: tuple[str, ...], high: float, low: float, n: int):
    """(sigmas float64[n] of the one option of `options` that is on, its name), or (None, None). Raises ValueError."""
    chosen = [option for option in options if flag(config, option)]
    if len(chosen) > 1:
        raise ValueError(f"scheduler/scheduler_config.json: {' and '.join(chosen)} exclude each other; use one of them")
    if not chosen:
        return None, None
    low, high = (number(config, name, None, 0) or bound for name, bound in (("sigma_min", low), ("sigma_max", high)))
    return SIGMAS[chosen[0]](high, low, n), chosen[0]


def _timesteps_at(sigmas: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Where between the training steps of `sigma_table` the sigmas stand, by their logarithms: float64[n]."""
    return np.interp(np.log(sigmas), np.log(table), np.arange(len(table)))


def _with_last(sigmas: np.ndarray, config: Config, table: np.ndarray) -> np.ndarray:
    """sigmas, and behind them the one that the last step ends at. Raises ValueError unless they fall."""
    if not (np.diff(sigmas) < 0).all():
        raise ValueError(
            f"the noise levels of {len(sigmas)} steps do not fall; use fewer, or sigma_min below sigma_max"
        )
    final = choice(config, "final_sigmas_type", "zero", ("zero", "sigma_min"))
    return np.append(sigmas, table[0] if final == "sigma_min" else 0.0)


def _split(ratio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """sigma / alpha -> (alpha, sigma), with alpha^2 + sigma^2 = 1."""
    alpha = 1.0 / np.sqrt(1.0 + ratio**2)
    return alpha, ratio * alpha


def make_euler_table(schedule: Schedule, config: Config, n: int) -> Table:
    """For `sample_euler`: alpha and sigma of where each step starts, alpha of where it goes, and sigma / alpha that it
    goes down to and that it adds, which is 0."""
    choice(config, "interpolation_type", "linear", ("linear",))
    choice(config, "timestep_type", "discrete", ("discrete",))
    timesteps, scaled = _euler_timesteps(schedule, config, n)
    table = sigma_table(schedule)
    sigmas = np.interp(timesteps, np.arange(len(table)), table)
    options = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
    chosen, _ = _chosen_sigmas(config, options, sigmas[0], sigmas[-1], n)
    if chosen is not None:
        sigmas, timesteps = chosen, _timesteps_at(chosen, table)
    return _euler_table(timesteps, _with_last(sigmas, config, table), scaled, np.zeros(n))


def make_euler_ancestral_table(schedule: Schedule, config: Config, n: int) -> Table:
    """For `sample_euler`, as `make_euler_table`: each step goes down further and adds noise, as SDXL-Turbo samples.

    diffusers' class has no other noise levels than those of its timesteps, and always ends at no noise.
    """
    timesteps, scaled = _euler_timesteps(schedule, config, n)
    table = sigma_table(schedule)
    sigmas = _with_last(np.interp(timesteps, np.arange(len(table)), table), {}, table)
    up = sigmas[1:] * np.sqrt(np.maximum(sigmas[:-1] ** 2 - sigmas[1:] ** 2, 0.0)) / sigmas[:-1]
    return _euler_table(timesteps, sigmas, scaled, up)


def _euler_timesteps(schedule: Schedule, config: Config, n: int) -> tuple[np.ndarray, bool]:
    """(timesteps float64[n], whether the first latents are sigma noise, and no x0, rather than noise)."""
    total = len(schedule.alphas_cumprod)
    spacing = choice(config, "timestep_spacing", "linspace", grids.SPACINGS)
    timesteps = grids.spaced(n, spacing, whole(config, "steps_offset", 0, 0, total), total)
    return timesteps.astype(np.float32).astype(np.float64), spacing != "leading"


def _euler_table(timesteps: np.ndarray, sigmas: np.ndarray, scaled: bool, up: np.ndarray) -> Table:
    alpha, sigma = _split(sigmas)
    down = np.sqrt(sigmas[1:] ** 2 - up**2)
    scale = sigma[0] if scaled else 1.0
    alpha_to = np.append(alpha[1:-1], 1.0)  # diffusers does not scale what it ends at, even if noise is left in it
    return _table(timesteps.astype(np.float32), alpha[:-1], sigma[:-1], alpha_to, down, up, scale=scale)


def sample_euler(
    network: Network, z: jax.Array, table: Table, schedule: Schedule, noise: jax.Array | None = None
) -> jax.Array:
    """Euler steps of the probability-flow equation in sigma / alpha (arXiv 2206.00364).

    z: float32[B, h, w, c], standard normal; noise: for an ancestral table, float32[n - 1 or more, B, h, w, c].
    """

    def step(z, t, coefficients, *fresh):
        alpha, sigma, alpha_to, down, up = coefficients
        x0, direction = _read(schedule, network(z, t), z, alpha, sigma)
        return alpha_to * (x0 + down * direction + sum(up * each for each in fresh))

    return _scan(step, table.scale * z, table, *([] if noise is None else [_step_noise(noise, table, z)]))


def make_dpm_solver_pp_table(schedule: Schedule, config: Config, n: int) -> Table:
    """For `sample_dpm_solver_pp`: alpha and sigma of where each step starts, and ratio, first and second of
    `dpm_solver_pp_2m_step`.

    With lambda = log(alpha / sigma) and h the step in lambda: ratio = sigma_to / sigma,
    first = alpha_to (1 - e^-h), second = first h / (2 h_before), or Heun's alpha_to (1 - (1 - e^-h) / h) h / h_before.
    The first step is of first order; so is the last if it ends at sigma = 0, or there are few.
    """
    if flag(config, "thresholding"):
        raise unsupported("thresholding", True, NO_CLIPPING)
    order = choice(config, "solver_order", 2, (1, 2))
    choice(config, "algorithm_type", "dpmsolver++", ("dpmsolver++",))
    # The last three are other classes' solvers, for which diffusers takes the midpoint.
    heun = choice(config, "solver_type", "midpoint", ("midpoint", "heun", "bh1", "bh2", "logrho")) == "heun"
    choice(config, "variance_type", None, (None,))
    if flag(config, "use_flow_sigmas"):
        raise unsupported("use_flow_sigmas", True, "false, or another sampler")
    timesteps, sigmas = _dpm_solver_grid(schedule, config, n)
    alpha, sigma = _split(sigmas)
    with np.errstate(divide="ignore", invalid="ignore"):
        h = -np.diff(np.log(sigmas))
        ratio, first = sigma[1:] / sigma[:-1], -alpha[1:] * np.expm1(-h)
        half = alpha[1:] * (1 + np.expm1(-h) / h) if heun else first / 2
        second = np.append(0.0, np.where(h[1:] > 0, half[1:] * h[1:] / h[:-1], 0.0))
    lower_final = flag(config, "lower_order_final", True) and n < 15
    if flag(config, "euler_at_final") or lower_final or sigmas[-1] == 0:
        second[-1] = 0.0
    return _table(timesteps, alpha[:-1], sigma[:-1], ratio, first, second * (order == 2))


def _dpm_solver_grid(schedule: Schedule, config: Config, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(timesteps int32[n], sigma / alpha there and at the end, float64[n + 1])."""
    table = sigma_table(schedule)
    number(config, "lambda_min_clipped", -math.inf, -math.inf, -float(np.log(table[-1])))  # it would clip some steps
    spacing = choice(config, "timestep_spacing", "linspace", grids.SPACINGS)
    offset = whole(config, "steps_offset", 0, 0, len(table))
    timesteps = np.round(grids.spaced(n, spacing, offset, len(table), skip_last=True))
    sigmas, option = _chosen_sigmas(config, tuple(SIGMAS), float(table[-1]), float(table[0]), n)
    if option is None:
        sigmas = table[timesteps.astype(int)].astype(np.float64)
    else:
        timesteps = _timesteps_at(sigmas, table)
        # diffusers rounds some and cuts the others.
        if option in ("use_karras_sigmas", "use_lu_lambdas") and config.get("beta_schedule") != "squaredcos_cap_v2":
            timesteps = np.round(timesteps)
    return timesteps.astype(np.int32), _with_last(sigmas, config, table)


def sample_dpm_solver_pp(
    network: Network, z: jax.Array, table: Table, schedule: Schedule, noise: None = None
) -> jax.Array:
    """DPM-Solver++ (2M), arXiv 2211.01095, from z: float32[B, h, w, c] at the table's first timestep."""

    def step(carry, t, coefficients):
        z, x0_before = carry
        alpha, sigma, *update = coefficients
        x0 = output_to_x0(schedule.prediction_type, network(z, t), z, alpha, sigma)
        return dpm_solver_pp_2m_step(z, x0, x0_before, *update), x0

    return _scan(step, (z, jnp.zeros_like(z)), table)[0]


# ---- the table of samplers ------------------------------------------------------------------------------------------


class Sampler(NamedTuple):
    """scheduler: its class in diffusers. make_table(schedule, config, n): its Table for n steps by the options of a
    scheduler_config.json, of any class, which raises ValueError for a value of its own options that is not supported.
    sample(network, z, table, schedule, noise): latents. adds_noise: `sample` takes noise, for each row but the last."""

    scheduler: str
    make_table: Callable[[Schedule, Config, int], Table]
    sample: Callable[..., jax.Array]
    adds_noise: bool = False


SAMPLERS = {
    "lcm": Sampler("LCMScheduler", make_lcm_table, sample_consistency, adds_noise=True),
    "ddim": Sampler("DDIMScheduler", make_ddim_table, sample_ddim),
    "pndm": Sampler("PNDMScheduler", make_pndm_table, sample_pndm),
    "dpmpp_2m": Sampler("DPMSolverMultistepScheduler", make_dpm_solver_pp_table, sample_dpm_solver_pp),
    "euler": Sampler("EulerDiscreteScheduler", make_euler_table, sample_euler),
    "euler_ancestral": Sampler(
        "EulerAncestralDiscreteScheduler", make_euler_ancestral_table, sample_euler, adds_noise=True
    ),
}
