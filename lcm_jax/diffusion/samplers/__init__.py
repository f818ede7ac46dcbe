"""From noise to latents: the table of samplers, one record and one file for each.

A sampler computes every coefficient that does not depend on z on the host in float64, into a table of its steps, and
iterates over the table. `network(z, t)` takes z: float32[B, h, w, c] and t[B], of the table's dtype, and returns the
network's output, guidance included. The options of a sampler are those of its scheduler's class in diffusers.
"""

from lcm_jax.diffusion.samplers.ddim import DDIM
from lcm_jax.diffusion.samplers.dpm_solver import DPM_SOLVER_PP, DPM_SOLVER_PP_KARRAS
from lcm_jax.diffusion.samplers.euler import EULER, EULER_ANCESTRAL, EULER_KARRAS
from lcm_jax.diffusion.samplers.lcm import LCM
from lcm_jax.diffusion.samplers.pndm import PNDM
from lcm_jax.diffusion.samplers.table import Sampler
from lcm_jax.diffusion.samplers.tcd import TCD

SAMPLERS: dict[str, Sampler] = {
    sampler.name: sampler
    for sampler in (LCM, TCD, DDIM, PNDM, DPM_SOLVER_PP, DPM_SOLVER_PP_KARRAS, EULER, EULER_KARRAS, EULER_ANCESTRAL)
}
CONSISTENCY_SCHEDULERS = frozenset(sampler.scheduler for sampler in SAMPLERS.values() if sampler.consistency)
