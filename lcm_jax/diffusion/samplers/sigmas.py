"""Noise levels sigma / alpha of the samplers whose steps may lie between training steps."""

import numpy as np

from lcm_jax.diffusion import grids
from lcm_jax.diffusion.options import Config, choice, flag, number
from lcm_jax.diffusion.schedule import Schedule

GRIDS = {
    "use_karras_sigmas": grids.karras_sigmas,
    "use_lu_lambdas": grids.exponential_sigmas,
    "use_exponential_sigmas": grids.exponential_sigmas,
    "use_beta_sigmas": grids.beta_sigmas,
}


def with_karras(config: Config) -> Config:
    """Return the config with Karras' noise levels, in place of those that it selects."""
    return {name: value for name, value in config.items() if name not in GRIDS} | {"use_karras_sigmas": True}


def training_sigmas(schedule: Schedule) -> np.ndarray:
    """Return sigma / alpha of every training step, rising float32[T].

    A zero-SNR schedule ends in alpha = 0, where the ratio is infinite: alpha^2 = 2^-24 replaces it, as in diffusers.
    """
    bar = np.maximum(schedule.alphas_cumprod, np.float32(2.0**-24))
    return np.sqrt((1 - bar) / bar)


def select_sigmas(
    config: Config, options: tuple[str, ...], high: float, low: float, n: int
) -> tuple[np.ndarray | None, str | None]:
    """Return (sigmas float64[n], option) for the one option of GRIDS that is set, or (None, None). Raises ValueError.

    options: the options of GRIDS that the sampler has. high, low: the bounds unless the config has its own.
    """
    enabled = [option for option in options if flag(config, option)]
    if len(enabled) > 1:
        raise ValueError(
            f"scheduler/scheduler_config.json: {' and '.join(enabled)} exclude each other; use one of them"
        )
    if not enabled:
        return None, None
    low, high = (number(config, name, None, 0) or bound for name, bound in (("sigma_min", low), ("sigma_max", high)))
    return GRIDS[enabled[0]](high, low, n), enabled[0]


def timesteps_at(sigmas: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Return the timesteps of `sigmas` between those of `training_sigmas`, linear in log sigma: float64[n]."""
    return np.interp(np.log(sigmas), np.log(table), np.arange(len(table)))


def append_final(sigmas: np.ndarray, config: Config, table: np.ndarray) -> np.ndarray:
    """Return sigmas with the end of the last step appended, float64[n + 1]. Raises ValueError unless they fall."""
    if not (np.diff(sigmas) < 0).all():
        raise ValueError(
            f"the noise levels of {len(sigmas)} steps do not fall; use fewer, or sigma_min below sigma_max"
        )
    final = choice(config, "final_sigmas_type", "zero", ("zero", "sigma_min"))
    return np.append(sigmas, table[0] if final == "sigma_min" else 0.0)


def to_alpha_sigma(ratio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (alpha, sigma) with sigma / alpha = ratio and alpha^2 + sigma^2 = 1."""
    alpha = 1.0 / np.sqrt(1.0 + ratio**2)
    return alpha, ratio * alpha
