"""Dropout of the inputs of a student's adapters, for any objective."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import jax

from lcm_jax.objectives.networks import Denoiser, Examples, Metrics, Networks, Objective


class WithDropout(Protocol):
    """A student whose adapters can drop inputs."""

    def with_dropout(self, keys: jax.Array, /) -> Denoiser: ...


class Draws(NamedTuple):
    own: Any  # the draws of the objective within
    keys: jax.Array  # key[B], the dropout of each example

    @property
    def posterior(self) -> jax.Array:
        return self.own.posterior

    @property
    def keep_prompt(self) -> jax.Array:
        return self.own.keep_prompt


@dataclass(frozen=True)
class AdapterDropout:
    """`objective` with dropout in the student's adapters; the target network has none, as in evaluation."""

    objective: Objective

    def draw(self, rng: jax.Array, latents: jax.ShapeDtypeStruct) -> Draws:
        """Draw the random numbers of a step for z of the shape of `latents`, [B, h, w, c]."""
        own, dropout = jax.random.split(rng)
        return Draws(self.objective.draw(own, latents), jax.random.split(dropout, latents.shape[0]))

    def loss(self, networks: Networks, examples: Examples, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Return the loss of `objective`, float32[], and its metrics."""
        student = cast(WithDropout, networks.student).with_dropout(draws.keys)
        return self.objective.loss(networks._replace(student=student), examples, draws.own)
