"""The noise schedule: alpha and sigma tables, conversions between predictions, and grids of timesteps.

z_t = alpha_t x0 + sigma_t e with alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t) and t an integer training step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


@dataclass(frozen=True, eq=False)
class Schedule:
    """alphas_cumprod: float32[T], abar_t of every training step. prediction_type: what the network's output means."""

    alphas_cumprod: np.ndarray
    prediction_type: str

    def __post_init__(self):
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type is {self.prediction_type!r}; choose {', '.join(PREDICTION_TYPES)}")
        if self.prediction_type == "epsilon" and self.alphas_cumprod[-1] <= 0:
            raise ValueError(
                "prediction_type is 'epsilon', which says nothing of the picture at the last step of a zero-SNR table "
                "(rescale_betas_zero_snr); choose sample or v_prediction"
            )


def make_schedule(config: Mapping[str, Any]) -> Schedule:
    """The schedule of a diffusers scheduler_config.json. Raises ValueError that names an unsupported value."""
    steps = config.get("num_train_timesteps", 1000)
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    kind = config.get("beta_schedule", "linear")
    # float32 throughout, as the published tables were made: the cumulative product would differ in its last digits.
    if config.get("trained_betas") is not None:
        betas = np.asarray(config["trained_betas"], np.float32)
    elif kind == "linear":
        betas = np.linspace(start, end, steps, dtype=np.float32)
    elif kind == "scaled_linear":
        betas = np.linspace(np.float32(start**0.5), np.float32(end**0.5), steps, dtype=np.float32) ** 2
    elif kind == "squaredcos_cap_v2":
        bar = lambda u: np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2  # noqa: E731
        grid = np.arange(steps, dtype=np.float64)
        betas = np.minimum(1 - bar((grid + 1) / steps) / bar(grid / steps), 0.999).astype(np.float32)
    else:
        raise ValueError(f"beta_schedule is {kind!r}; choose linear, scaled_linear or squaredcos_cap_v2")
    alphas_cumprod = np.cumprod(1.0 - betas.astype(np.float32), dtype=np.float32)
    if config.get("rescale_betas_zero_snr", False):
        # Shift and scale sqrt(abar) so that the last step is pure noise (arXiv 2305.08891, algorithm 1).
        root = np.sqrt(alphas_cumprod)
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        alphas_cumprod = (root**2).astype(np.float32)
    return Schedule(alphas_cumprod, config.get("prediction_type", "epsilon"))


def lcm_scheduler(config: Mapping[str, Any], num_ddim_steps: int) -> dict[str, Any]:
    """The LCMScheduler of a student whose teacher has this scheduler_config.json: it samples on the grid of
    `num_ddim_steps` timesteps that it was trained on."""
    kept = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
            "rescale_betas_zero_snr", "steps_offset")  # fmt: skip
    return {name: config[name] for name in kept if name in config} | {
        "_class_name": "LCMScheduler", "original_inference_steps": num_ddim_steps, "timestep_scaling": 10.0,
        "set_alpha_to_one": False, "clip_sample": False,
    }  # fmt: skip


def alpha_sigma(schedule: Schedule, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """t: int32[...] -> (alpha, sigma), float32[...]."""
    bar = jnp.asarray(schedule.alphas_cumprod)[t]
    return jnp.sqrt(bar), jnp.sqrt(1.0 - bar)


def like(x: jax.Array, z: jax.Array) -> jax.Array:
    """x: [B] or a scalar -> shaped to broadcast over z: [B, ...]."""
    return x.reshape(x.shape + (1,) * (z.ndim - x.ndim)) if x.ndim else x


def _coefficients(schedule: Schedule, z: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    alpha, sigma = alpha_sigma(schedule, t)
    return like(alpha, z), like(sigma, z)


def add_noise(schedule: Schedule, z: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """z_t = alpha_t z + sigma_t e: float32[B, h, w, c] from z and noise of that shape and t: int32[B]."""
    alpha, sigma = _coefficients(schedule, z, t)
    return alpha * z + sigma * noise


def velocity(schedule: Schedule, z: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """v = alpha_t e - sigma_t x0 (arXiv 2202.00512)."""
    alpha, sigma = _coefficients(schedule, z, t)
    return alpha * noise - sigma * z


def training_target(schedule: Schedule, z: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """What the network should output at (add_noise(z, noise, t), t)."""
    if schedule.prediction_type == "epsilon":
        return noise
    return z if schedule.prediction_type == "sample" else velocity(schedule, z, noise, t)


def predict_x0(schedule: Schedule, output: jax.Array, z: jax.Array, t: jax.Array) -> jax.Array:
    """The clean latent that the network's output means at z_t: float32[B, h, w, c]."""
    alpha, sigma = _coefficients(schedule, z, t)
    output = output.astype(jnp.float32)
    if schedule.prediction_type == "epsilon":
        return (z - sigma * output) / alpha
    return output if schedule.prediction_type == "sample" else alpha * z - sigma * output


def predict_noise(schedule: Schedule, output: jax.Array, z: jax.Array, t: jax.Array) -> jax.Array:
    """The noise that the network's output means at z_t: float32[B, h, w, c]."""
    alpha, sigma = _coefficients(schedule, z, t)
    output = output.astype(jnp.float32)
    if schedule.prediction_type == "epsilon":
        return output
    return (z - alpha * output) / sigma if schedule.prediction_type == "sample" else alpha * output + sigma * z


def skipping_steps(
    index: jax.Array, num_ddim_steps: int = 50, num_train_timesteps: int = 1000
) -> tuple[jax.Array, jax.Array]:
    """index: int32[B] in 0..num_ddim_steps-1 -> (s, t): s = (index + 1) k - 1 and t = max(s - k, 0), k = 1000 / 50.

    Raises ValueError unless num_ddim_steps divides num_train_timesteps: the last step would miss the table's end.
    """
    if num_ddim_steps < 1 or num_train_timesteps % num_ddim_steps:
        raise ValueError(
            f"num_ddim_steps is {num_ddim_steps}, which does not divide num_train_timesteps = {num_train_timesteps}; "
            f"choose a divisor, such as 50"
        )
    k = num_train_timesteps // num_ddim_steps
    s = (index + 1) * k - 1
    return s, jnp.maximum(s - k, 0)


def lcm_timesteps(
    num_inference_steps: int, strength: float = 1.0, original_steps: int = 50, num_train_timesteps: int = 1000
) -> np.ndarray:
    """The n timesteps of the few-step sampler, descending int32[n], out of the grid that distillation used.

    strength < 1 begins further down, for image to image. Raises ValueError when n is not in 1..int(50 strength).
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}; choose a number above 0 and at most 1")
    grid = (np.arange(1, int(original_steps * strength) + 1) * (num_train_timesteps // original_steps) - 1)[::-1]
    if not 1 <= num_inference_steps <= len(grid):
        raise ValueError(
            f"num_inference_steps is {num_inference_steps}; choose 1 to {len(grid)}"
            f"{f' (at strength {strength})' if strength < 1 else ''}, best 2 to 8"
        )
    indices = np.floor(np.linspace(0, len(grid), num_inference_steps, endpoint=False)).astype(int)
    return grid[indices].astype(np.int32)


def solver_timesteps(
    num_inference_steps: int, spacing: str = "trailing", steps_offset: int = 0, num_train_timesteps: int = 1000,
    strength: float = 1.0,
) -> np.ndarray:  # fmt: skip
    """The n timesteps of a many-step solver, descending int32[n], at diffusers' DDIM spacing `trailing` or `leading`.

    strength < 1 keeps the last int(n strength) of them, for image to image.
    Raises ValueError when n is not in 1..num_train_timesteps, the spacing is another, or strength leaves no step.
    """
    n = num_inference_steps
    if not 1 <= n <= num_train_timesteps:
        raise ValueError(f"num_inference_steps is {n}; choose 1 to {num_train_timesteps}")
    if spacing == "trailing":
        grid = np.round(np.arange(num_train_timesteps, 0, -num_train_timesteps / n)) - 1
    elif spacing == "leading":
        grid = np.round(np.arange(n) * (num_train_timesteps // n))[::-1] + steps_offset
    else:
        raise ValueError(f"timestep_spacing is {spacing!r}; choose trailing or leading")
    if not 1 <= int(n * strength) <= n:
        raise ValueError(f"strength is {strength} with {n} steps; choose a number from {1 / n:.3g} to 1")
    return grid[n - int(n * strength) :].astype(np.int32)
