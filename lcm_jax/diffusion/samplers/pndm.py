"""PNDM (arXiv 2202.09778) without its Runge-Kutta steps, the sampler of the first Stable Diffusion."""

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.diffusion import grids
from lcm_jax.diffusion.options import Config, flag, unsupported
from lcm_jax.diffusion.samplers.ddim import noise_levels, training_timesteps
from lcm_jax.diffusion.samplers.table import Network, OnStep, Sampler, Table, iterate, split_output, stack_table
from lcm_jax.diffusion.schedule import Schedule
from lcm_jax.diffusion.solvers import ddim_step

# Row by row, the weights of the network's output at this row and at the four rows before it.
# Row 1 is the second half of Heun's first step, and no later row uses its output.
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


def make_pndm_table(schedule: Schedule, config: Config, n: int, strength: float) -> Table:
    """Return the table of n steps, which has n + 1 rows (1 if n is 1). Raises ValueError.

    The first rows are skipped as in diffusers: the row that the second one repeats counts as a step, and the repetition
    is always that of the second row that is left.

    Coefficients: alpha and sigma of each step's start and end, 1 if the step restarts where the row before started
    (else 0), and PLMS_WEIGHTS.
    """
    if not flag(config, "skip_prk_steps"):
        raise unsupported("skip_prk_steps", False, "true, or another sampler, such as ddim")
    if schedule.prediction_type == "sample":
        raise unsupported("prediction_type", "sample", "another sampler, such as ddim: PNDM averages noise")
    timesteps = training_timesteps(schedule, config, n)
    bars = schedule.alphas_cumprod.astype(np.float64)
    asked = (np.insert(timesteps, 2, timesteps[1]) if n > 1 else timesteps)[grids.skipped_steps(n, strength) :]
    rows, stride = np.arange(len(asked)), len(bars) // n
    restarts = rows == 1
    start = asked + np.where(restarts, stride, 0)
    last = 1.0 if flag(config, "set_alpha_to_one") else bars[0]
    weights = PLMS_WEIGHTS[np.minimum(rows, len(PLMS_WEIGHTS) - 1)].T
    ends = (*noise_levels(bars, last, start), *noise_levels(bars, last, start - stride))
    return stack_table(asked, noise_levels(bars, last, asked), *ends, restarts, *weights)


def sample_pndm(
    network: Network, z: jax.Array, table: Table, schedule: Schedule, noise: None = None, on_step: OnStep | None = None
) -> jax.Array:
    """Sample by DDIM steps with a weighted sum of the last outputs.

    z: float32[B, h, w, c] at the table's first timestep.
    """

    def step(z, memory, i, t, coefficients):
        before, outputs = memory
        alpha, sigma, alpha_to, sigma_to, restarts, *weights = coefficients
        outputs = (network(z, t).astype(jnp.float32), *outputs)
        products = [weight * each for weight, each in zip(weights, outputs, strict=True)]
        output = sum(products[1:], start=products[0])
        start = jnp.where(restarts > 0, before, z)
        end = ddim_step(*split_output(schedule, output, start, alpha, sigma), alpha_to, sigma_to)
        return end, (z, outputs[:-1])

    return iterate(step, z, table, on_step, (z, (jnp.zeros_like(z),) * 4))


PNDM = Sampler("pndm", "PNDMScheduler", make_pndm_table, sample_pndm)
