"""The noise schedule: alpha and sigma tables, and conversions between predictions.

z_t = alpha_t x0 + sigma_t e with alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t) and t an integer training step.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.diffusion.options import Config, choice, flag, is_number, number, unsupported, whole

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


@dataclass(frozen=True, eq=False)
class Schedule:
    """alphas_cumprod: float32[T], abar_t of every training step. prediction_type: the network's output.

    Raises ValueError for a prediction type that is not supported, or epsilon with a last abar of 0.
    """

    alphas_cumprod: np.ndarray
    prediction_type: str

    def __post_init__(self):
        if self.prediction_type not in PREDICTION_TYPES:
            raise unsupported("prediction_type", self.prediction_type, " or ".join(map(repr, PREDICTION_TYPES)))
        if self.prediction_type == "epsilon" and self.alphas_cumprod[-1] <= 0:
            raise ValueError(
                "prediction_type is 'epsilon', which does not determine the image at the last step of a zero-SNR "
                "schedule (rescale_betas_zero_snr); choose sample or v_prediction"
            )


def read_betas(config: Config) -> dict[str, Any]:
    """Return the options that define the betas, with the defaults of the config's class. Raises ValueError."""
    lcm = config.get("_class_name") in ("LCMScheduler", "TCDScheduler")
    return {
        "num_train_timesteps": whole(config, "num_train_timesteps", 1000, 2, 1_000_000),
        "beta_start": number(config, "beta_start", 0.00085 if lcm else 0.0001, 0, 1),
        "beta_end": number(config, "beta_end", 0.012 if lcm else 0.02, 0, 1),
        "beta_schedule": choice(config, "beta_schedule", "scaled_linear" if lcm else "linear", BETA_SCHEDULES),
    }


def make_schedule(config: Config) -> Schedule:
    """Build the schedule of a diffusers scheduler_config.json. Raises ValueError that names an unsupported value."""
    steps, start, end, kind = read_betas(config).values()
    trained = config.get("trained_betas")
    # The published tables were computed in float32: a float64 cumulative product differs in the last digits.
    if trained is not None:
        if not isinstance(trained, list | tuple) or not all(is_number(each) and 0 < each < 1 for each in trained):
            raise unsupported("trained_betas", trained, "a list of numbers between 0 and 1")
        if len(trained) != steps:
            raise ValueError(
                f"scheduler/scheduler_config.json: trained_betas has {len(trained)} numbers and num_train_timesteps is "
                f"{steps}; use the same number"
            )
        betas = np.asarray(trained, np.float32)
    elif kind == "linear":
        betas = np.linspace(start, end, steps, dtype=np.float32)
    elif kind == "scaled_linear":
        betas = np.linspace(np.float32(start**0.5), np.float32(end**0.5), steps, dtype=np.float32) ** 2
    else:
        bar = lambda u: np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2  # noqa: E731
        grid = np.arange(steps, dtype=np.float64)
        betas = np.minimum(1 - bar((grid + 1) / steps) / bar(grid / steps), 0.999).astype(np.float32)
    alphas_cumprod = np.cumprod(1.0 - betas.astype(np.float32), dtype=np.float32)
    if flag(config, "rescale_betas_zero_snr"):
        # Shift and scale sqrt(abar) so that the last step is pure noise (arXiv 2305.08891, algorithm 1).
        root = np.sqrt(alphas_cumprod)
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        alphas_cumprod = (root**2).astype(np.float32)
    return Schedule(alphas_cumprod, config.get("prediction_type", "epsilon"))


def log_snr(schedule: Schedule) -> np.ndarray:
    """Return lambda = log(alpha / sigma) of every training step, falling float32[T].

    A zero-SNR schedule ends in alpha = 0, where it is infinite: alpha^2 = 2^-24 replaces it, as in diffusers' samplers.
    """
    bar = np.maximum(schedule.alphas_cumprod.astype(np.float64), 2.0**-24)
    return (0.5 * (np.log(bar) - np.log1p(-bar))).astype(np.float32)


def timestep_at(schedule: Schedule, log_snr_at: jax.Array) -> jax.Array:
    """Return t, float32[...] between training steps, with this lambda, float32[...], that is linear in t there."""
    table = log_snr(schedule)
    return jnp.interp(log_snr_at, table[::-1], np.arange(len(table), dtype=np.float32)[::-1])


def alpha_sigma(schedule: Schedule, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (alpha_t, sigma_t), float32[...], for t: int32[...], or float32[...] between training steps.

    Between them lambda is linear in t, see `timestep_at`.
    """
    if jnp.issubdtype(jnp.result_type(t), jnp.floating):
        table = log_snr(schedule)
        twice = 2.0 * jnp.interp(t, np.arange(len(table), dtype=np.float32), table)
        return jnp.sqrt(jax.nn.sigmoid(twice)), jnp.sqrt(jax.nn.sigmoid(-twice))
    bar = jnp.asarray(schedule.alphas_cumprod)[t]
    return jnp.sqrt(bar), jnp.sqrt(1.0 - bar)


def like(x: jax.Array, z: jax.Array) -> jax.Array:
    """Reshape x: [B] or a scalar to broadcast over z: [B, ...]."""
    return x.reshape(x.shape + (1,) * (z.ndim - x.ndim)) if x.ndim else x


def _coefficients(schedule: Schedule, z: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    alpha, sigma = alpha_sigma(schedule, t)
    return like(alpha, z), like(sigma, z)


def add_noise(schedule: Schedule, z: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """Return z_t = alpha_t z + sigma_t e, float32[B, h, w, c], from z and noise of this shape and t: int32[B]."""
    alpha, sigma = _coefficients(schedule, z, t)
    return alpha * z + sigma * noise


def velocity(schedule: Schedule, z: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """Return v = alpha_t e - sigma_t x0 (arXiv 2202.00512); the arguments are those of `add_noise`."""
    alpha, sigma = _coefficients(schedule, z, t)
    return alpha * noise - sigma * z


def training_target(schedule: Schedule, z: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """Return the output that minimizes the diffusion loss at (add_noise(z, noise, t), t), float32[B, h, w, c]."""
    if schedule.prediction_type == "epsilon":
        return noise
    return z if schedule.prediction_type == "sample" else velocity(schedule, z, noise, t)


def output_to_x0(prediction_type: str, output: jax.Array, z: jax.Array, alpha, sigma) -> jax.Array:
    """Return the clean latent implied by the network's output at z = alpha x0 + sigma e, float32[B, h, w, c].

    alpha, sigma: float32[] or of a shape that broadcasts over z.
    """
    output = output.astype(jnp.float32)
    if prediction_type == "epsilon":
        return (z - sigma * output) / alpha
    return output if prediction_type == "sample" else alpha * z - sigma * output


def output_to_noise(prediction_type: str, output: jax.Array, z: jax.Array, alpha, sigma) -> jax.Array:
    """Return the noise implied by the network's output at z, float32[B, h, w, c]; see `output_to_x0`."""
    output = output.astype(jnp.float32)
    if prediction_type == "epsilon":
        return output
    return (z - alpha * output) / sigma if prediction_type == "sample" else alpha * output + sigma * z


def predict_x0(schedule: Schedule, output: jax.Array, z: jax.Array, t: jax.Array) -> jax.Array:
    """Return the clean latent implied by the network's output at z_t, float32[B, h, w, c]. t: int32[B]."""
    return output_to_x0(schedule.prediction_type, output, z, *_coefficients(schedule, z, t))


def predict_noise(schedule: Schedule, output: jax.Array, z: jax.Array, t: jax.Array) -> jax.Array:
    """Return the noise implied by the network's output at z_t, float32[B, h, w, c]. t: int32[B]."""
    return output_to_noise(schedule.prediction_type, output, z, *_coefficients(schedule, z, t))


def skipping_steps(
    index: jax.Array, num_ddim_steps: int = 50, num_train_timesteps: int = 1000
) -> tuple[jax.Array, jax.Array]:
    """Return the timesteps (s, t), int32[B]: s = (index + 1) k - 1 and t = max(s - k, 0), k = 1000 / 50 by default.

    index: int32[B] in [0, num_ddim_steps - 1]. Raises ValueError if num_ddim_steps does not divide
    num_train_timesteps, since the last step would not reach the end of the schedule.
    """
    if num_ddim_steps < 1 or num_train_timesteps % num_ddim_steps:
        raise ValueError(
            f"num_ddim_steps is {num_ddim_steps}, which does not divide num_train_timesteps = {num_train_timesteps}; "
            f"choose a divisor, such as 50"
        )
    k = num_train_timesteps // num_ddim_steps
    s = (index + 1) * k - 1
    return s, jnp.maximum(s - k, 0)
