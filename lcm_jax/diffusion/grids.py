"""Grids of timesteps, and of noise levels sigma / alpha between them, as diffusers spaces them."""

import math

import numpy as np

SPACINGS = ("leading", "trailing", "linspace")


def steps_within(n: int, strength: float) -> int:
    """Return int(n * strength), the number of n steps that image-to-image takes.

    Raises ValueError if strength is not in (0, 1] or leaves no step.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}; choose a number above 0 and at most 1")
    if int(n * strength) < 1:
        smallest = math.ceil(1000 / n) / 1000
        raise ValueError(f"strength is {strength}, which leaves none of {n} steps; choose {smallest:g} to 1")
    return int(n * strength)


def skipped_steps(n: int, strength: float) -> int:
    """Return the number of n steps that image-to-image skips, the noisiest. Raises ValueError as `steps_within`."""
    return n - steps_within(n, strength)


def lcm_timesteps(
    num_inference_steps: int, strength: float = 1.0, original_steps: int = 50, num_train_timesteps: int = 1000
) -> np.ndarray:
    """Return the n timesteps of the few-step sampler, descending int32[n], a subset of the grid of distillation.

    strength: below 1 for image-to-image, which skips the noisiest part of the grid. Raises ValueError if n is not in
    [1, int(original_steps * strength)], or strength is not in [1 / original_steps, 1].
    """
    stride = num_train_timesteps // original_steps
    grid = (np.arange(1, steps_within(original_steps, strength) + 1) * stride - 1)[::-1]
    if not 1 <= num_inference_steps <= len(grid):
        remedy = f"1 to {len(grid)}{f' (at strength {strength})' if strength < 1 else ''}"
        best = ", best 2 to 8" if len(grid) >= 8 else ""
        raise ValueError(f"num_inference_steps is {num_inference_steps}; choose {remedy}{best}")
    indices = np.floor(np.linspace(0, len(grid), num_inference_steps, endpoint=False)).astype(int)
    return grid[indices].astype(np.int32)


def spaced(n: int, spacing: str, steps_offset: int, num_train_timesteps: int, skip_last: bool = False) -> np.ndarray:
    """Return n timesteps of one of SPACINGS, descending float64[n]; `linspace` timesteps are not rounded.

    skip_last: drop the last of n + 1 timesteps unless the spacing is trailing, as DPM-Solver does.
    Raises ValueError if the schedule does not have this many timesteps.
    """
    total = num_train_timesteps
    points = n + (skip_last and spacing != "trailing")
    if n < 1 or points > total:
        raise ValueError(f"num_inference_steps is {n}; choose 1 to {total + n - points}")
    if spacing == "trailing":
        return np.round(np.arange(total, 0, -total / n))[:n] - 1
    if spacing == "linspace":
        return np.linspace(0, total - 1, points)[::-1][:n]
    grid = (np.arange(points) * (total // points))[::-1][:n] + float(steps_offset)
    if grid[0] >= total:
        raise ValueError(
            f"num_inference_steps is {n}, whose first timestep is {grid[0]:g} with steps_offset {steps_offset}; "
            f"use fewer steps, so that it is below {total}"
        )
    return grid


def solver_timesteps(
    num_inference_steps: int, spacing: str = "trailing", steps_offset: int = 0, num_train_timesteps: int = 1000
) -> np.ndarray:
    """Return the n timesteps of a many-step solver, descending int32[n], with diffusers' DDIM spacing.

    spacing: one of SPACINGS. Raises ValueError if n is not in [1, num_train_timesteps].
    """
    return np.round(spaced(num_inference_steps, spacing, steps_offset, num_train_timesteps)).astype(np.int32)


# ---- noise levels, descending float64[n] from `high` to `low` -------------------------------------------------------


def karras_sigmas(high: float, low: float, n: int) -> np.ndarray:
    """Return noise levels evenly spaced in sigma^(1/7) (arXiv 2206.00364, equation 5)."""
    return np.linspace(high ** (1 / 7), low ** (1 / 7), n) ** 7


def exponential_sigmas(high: float, low: float, n: int) -> np.ndarray:
    """Return noise levels evenly spaced in log sigma."""
    return np.exp(np.linspace(np.log(high), np.log(low), n))


def beta_sigmas(high: float, low: float, n: int) -> np.ndarray:
    """Return noise levels spaced as the quantiles of Beta(0.6, 0.6) (arXiv 2407.12173)."""
    from scipy.special import betaincinv  # late, since it takes 0.2 s and few samplers use it

    return low + betaincinv(0.6, 0.6, np.linspace(1, 0, n)) * (high - low)
