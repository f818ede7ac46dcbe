"""Backward simulation: some of a batch begins from the student's own images in place of data.

A sampler of several steps noises what the network itself has made, and that is not quite what data is: where it cannot
tell which of two colors is meant, its jump is between them. From there the teacher finds its way to one; a student that
has only seen data does not learn to. Imagine Flash (arXiv 2405.05224) describes the idea for distribution matching.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.diffusion.consistency import consistency_function
from lcm_jax.objectives.networks import Examples, Metrics, Networks, Objective
from lcm_jax.ranges import FRACTION, check_setting


class Draws(NamedTuple):
    own: Any  # the draws of the objective within
    simulated: jax.Array  # bool[B], which examples begin from the student's own images

    @property
    def posterior(self) -> jax.Array:
        return self.own.posterior

    @property
    def keep_prompt(self) -> jax.Array:
        return self.own.keep_prompt


@dataclass(frozen=True)
class BackwardSimulation:
    """`objective` with round(fraction B) of each batch of B, evenly spread, replaced by images of the target network.

    They are chosen over the whole batch, so that micro-batches add up to it. Each is one jump from pure noise, which is
    draws.posterior: replaced data leaves it free. All B are computed, and the fraction selected, so that micro-batches
    have one shape and devices need not trade examples. The draws of `objective` have the guidance weight `w`. Raises
    ValueError for a fraction outside [0, 1], and when drawing if it is less than one example of the batch.
    """

    objective: Objective
    fraction: float

    def __post_init__(self):
        check_setting("objective.backward_simulation", self.fraction, FRACTION)

    def draw(self, rng: jax.Array, latents: jax.ShapeDtypeStruct) -> Draws:
        """Draw the random numbers of a step for z of the shape of `latents`, [B, h, w, c]."""
        batch = latents.shape[0]
        count = round(self.fraction * batch)
        if count < 1:
            raise ValueError(
                f"objective.backward_simulation {self.fraction} is less than one example of a batch of {batch}; use 0 "
                f"to turn it off, or at least {1 / batch:.3g}"
            )
        simulated = np.zeros(batch, bool)
        simulated[np.arange(count) * batch // count] = True
        return Draws(self.objective.draw(rng, latents), jnp.asarray(simulated))

    def loss(self, networks: Networks, examples: Examples, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Return the loss of `objective` on these examples, float32[], and its metrics."""
        own = jump(networks, examples, draws.posterior, draws.own.w)
        z = jnp.where(draws.simulated[:, None, None, None], own, examples.z)
        return self.objective.loss(networks, examples._replace(z=z), draws.own)


def jump(networks: Networks, examples: Examples, noise: jax.Array, w: jax.Array) -> jax.Array:
    """Return the target network's x0 in one jump from `noise` for each prompt, float32[B, h, w, c], without gradient.

    noise: float32[B, h, w, c], standard normal; w: float32[B], the guidance weight.
    """
    t = jnp.full(len(noise), len(networks.schedule.alphas_cumprod) - 1, jnp.int32)
    assert networks.target is not None
    output = networks.target(noise, t, examples.prompt._replace(guidance=w))
    return jax.lax.stop_gradient(consistency_function(networks.schedule, output, noise, t))
