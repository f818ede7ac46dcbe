"""From noise to latents: the multistep consistency sampler, DDIM, Euler and DPM-Solver++, each a `lax.scan`.

`network(z, t)` takes z: float32[B, h, w, c] and t: int32[B] and returns the network's output, guidance included.
Every coefficient that depends on the timesteps alone is computed on the host in float64.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.diffusion.consistency import consistency_function
from lcm_jax.diffusion.schedule import Schedule, predict_noise, predict_x0
from lcm_jax.diffusion.solvers import ddim_step, dpm_solver_pp_2m_step

Network = Callable[[jax.Array, jax.Array], jax.Array]


def sample_consistency(
    network: Network, z: jax.Array, timesteps: np.ndarray, noise: jax.Array, schedule: Schedule
) -> jax.Array:
    """Algorithm 3 of arXiv 2310.04378: jump to x0, noise it again to the next timestep, jump again.

    z: float32[B, h, w, c], standard normal. timesteps: int32[n], descending. noise: float32[n - 1 or more, B, h, w, c].
    Returns the last jump's latents, float32[B, h, w, c].
    """
    n = len(timesteps)
    bar = schedule.alphas_cumprod.astype(np.float64)[np.append(timesteps[1:], timesteps[-1])]
    # After the last jump nothing is added, as if it had gone to alpha = 1, sigma = 0.
    alpha = np.where(np.arange(n) < n - 1, np.sqrt(bar), 1.0).astype(np.float32)
    sigma = np.where(np.arange(n) < n - 1, np.sqrt(1.0 - bar), 0.0).astype(np.float32)
    noise = jnp.concatenate([noise[: n - 1], jnp.zeros_like(z)[None]])

    def step(z, inputs):
        t, alpha, sigma, noise = inputs
        t = jnp.full(z.shape[:1], t)
        denoised = consistency_function(schedule, network(z, t), z, t)
        return alpha * denoised + sigma * noise, None

    return jax.lax.scan(step, z, (jnp.asarray(timesteps), alpha, sigma, noise))[0]


def sample_ddim(
    network: Network, z: jax.Array, timesteps: np.ndarray, schedule: Schedule, set_alpha_to_one: bool = False,
    num_inference_steps: int | None = None,
) -> jax.Array:  # fmt: skip
    """DDIM with eta 0 (arXiv 2010.02502) from z: float32[B, h, w, c] at timesteps[0] to t = 0 (or to alpha = 1).

    timesteps: int32[n] descending and evenly spaced. As in diffusers each step goes to t - 1000 // n, which is the next
    timestep where n divides 1000. num_inference_steps: this n, where strength < 1 has left fewer timesteps.
    """
    before = timesteps - len(schedule.alphas_cumprod) // (num_inference_steps or len(timesteps))
    table = schedule.alphas_cumprod.astype(np.float64)
    final = 1.0 if set_alpha_to_one else table[0]
    bar = np.where(before >= 0, table[np.maximum(before, 0)], final)
    alpha, sigma = np.sqrt(bar).astype(np.float32), np.sqrt(1.0 - bar).astype(np.float32)

    def step(z, inputs):
        t, alpha, sigma = inputs
        t = jnp.full(z.shape[:1], t)
        output = network(z, t)
        return ddim_step(predict_x0(schedule, output, z, t), predict_noise(schedule, output, z, t), alpha, sigma), None

    return jax.lax.scan(step, z, (jnp.asarray(timesteps), alpha, sigma))[0]


def _positive(bar: np.ndarray) -> np.ndarray:
    """A zero-SNR table ends in 0, where sigma / alpha is infinite: 2^-24 stands in for it, as in diffusers."""
    return np.maximum(bar, 2.0**-24)


def sample_euler(
    network: Network, z: jax.Array, timesteps: np.ndarray, schedule: Schedule, noise: jax.Array | None = None
) -> jax.Array:
    """Euler steps of the probability-flow equation in sigma / alpha (arXiv 2206.00364) from timesteps[0] to no noise.

    z: float32[B, h, w, c], standard normal; timesteps: int32[n] descending. noise: float32[n - 1 or more, B, h, w, c]
    makes the steps ancestral: each goes down further and adds noise, as SDXL-Turbo samples.
    """
    bar = _positive(schedule.alphas_cumprod.astype(np.float64)[timesteps])
    sigma = np.append(np.sqrt((1.0 - bar) / bar), 0.0)
    ahead, up = sigma[1:], np.zeros(len(timesteps))
    if noise is not None:
        up = ahead * np.sqrt(np.maximum(sigma[:-1] ** 2 - ahead**2, 0.0)) / sigma[:-1]
    down, alpha = np.sqrt(ahead**2 - up**2), 1.0 / np.sqrt(1.0 + ahead**2)
    steps = len(timesteps) - 1
    fresh = (
        jnp.zeros((steps + 1, *z.shape)) if noise is None else jnp.concatenate([noise[:steps], jnp.zeros_like(z)[None]])
    )

    def step(z, inputs):
        t, alpha, down, up, fresh = inputs
        t = jnp.full(z.shape[:1], t)
        output = network(z, t)
        x0, direction = predict_x0(schedule, output, z, t), predict_noise(schedule, output, z, t)
        return alpha * (x0 + down * direction + up * fresh), None

    table = tuple(np.stack([alpha, down, up]).astype(np.float32))
    return jax.lax.scan(step, z, (jnp.asarray(timesteps), *table, fresh))[0]


def dpm_solver_pp_coefficients(timesteps: np.ndarray, schedule: Schedule) -> np.ndarray:
    """float32[n, 3]: ratio, first, second of `dpm_solver_pp_2m_step` for each step, ending at sigma = 0.

    With lambda = log(alpha / sigma) and h the step in lambda: ratio = sigma_next / sigma,
    first = alpha_next (1 - e^-h), second = first h / (2 h_before).
    The first step is of first order; so is the last, since it ends at sigma = 0.
    """
    bar = _positive(schedule.alphas_cumprod.astype(np.float64)[timesteps])
    alpha, sigma = np.append(np.sqrt(bar), 1.0), np.append(np.sqrt(1.0 - bar), 0.0)
    with np.errstate(divide="ignore"):
        lam = np.log(alpha) - np.log(sigma)
    h = np.diff(lam)
    ratio, first = sigma[1:] / sigma[:-1], -alpha[1:] * np.expm1(-h)
    second = np.zeros_like(first)
    second[1:-1] = first[1:-1] * h[1:-1] / (2 * h[:-2])
    return np.stack([ratio, first, second], axis=1).astype(np.float32)


def sample_dpm_solver_pp(network: Network, z: jax.Array, timesteps: np.ndarray, schedule: Schedule) -> jax.Array:
    """DPM-Solver++ (2M), arXiv 2211.01095, from z: float32[B, h, w, c] at timesteps[0] to sigma = 0.

    timesteps: int32[n] descending; the last step needs timesteps[-1] > 0 or sigma > 0 there.
    """

    def step(carry, inputs):
        z, x0_before = carry
        t, (ratio, first, second) = inputs
        t = jnp.full(z.shape[:1], t)
        x0 = predict_x0(schedule, network(z, t), z, t)
        return (dpm_solver_pp_2m_step(z, x0, x0_before, ratio, first, second), x0), None

    coefficients = dpm_solver_pp_coefficients(timesteps, schedule)
    return jax.lax.scan(step, (z, jnp.zeros_like(z)), (jnp.asarray(timesteps), tuple(coefficients.T)))[0][0]
