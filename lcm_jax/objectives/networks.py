"""The seam between an objective and the rest: what it is given, and what it must offer."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax

from lcm_jax.diffusion.schedule import Schedule
from lcm_jax.models.conditioning import Conditioning

Metrics = dict[str, jax.Array]


class Denoiser(Protocol):
    """A network bound to its parameters."""

    def __call__(self, z: jax.Array, t: jax.Array, conditioning: Conditioning, /) -> jax.Array:
        """z: float32[B, h, w, c]; t: int32[B]. Return the network's output, [B, h, w, c], in the schedule's
        prediction type."""
        ...


class Networks(NamedTuple):
    """student: receives the gradient. target: its moving average. teacher: frozen; None if there is none. schedule:
    that of all three."""

    student: Denoiser
    target: Denoiser | None
    teacher: Denoiser | None
    schedule: Schedule


class Examples(NamedTuple):
    """A batch as objectives see it: scaled latents z, float32[B, h, w, c], the prompt of each, and the empty prompt
    with the same sizes and masks."""

    z: jax.Array
    prompt: Conditioning
    empty: Conditioning


class Objective(Protocol):
    """A frozen dataclass whose fields are a config's `objective` group, checked in __post_init__.

    draw(rng, latents) returns every random number of a step, as arrays with a leading batch axis; latents: the shape
    and dtype of the whole batch's z. An objective for Examples draws `posterior` (float32[B, h, w, c], which picks each
    latent from the autoencoder's posterior) and `keep_prompt` (bool[B], False trains the empty prompt) among them.
    loss(networks, examples, draws) returns (float32[], metrics), a mean over the batch axis. A metric is float32[],
    also a mean over the batch, or float32[2], two means of which the ratio counts, see `loss_by_timestep`.
    """

    def draw(self, rng: jax.Array, latents: jax.ShapeDtypeStruct, /) -> Any: ...

    def loss(self, networks: Any, examples: Any, draws: Any, /) -> tuple[jax.Array, Metrics]: ...


class Bind(Protocol):
    """Bind parameters to networks: full fine-tuning, adapters and autoencoders differ here alone.

    params: those that are trained; target: their moving average; frozen: those that never change.
    """

    def __call__(self, params: Any, target: Any, frozen: Any, /) -> Any: ...


class Prepare(Protocol):
    """Turn a batch of records into what the objective sees: encode images and prompts, drop prompts, mask."""

    def __call__(self, params: Any, frozen: Any, batch: Mapping[str, jax.Array], draws: Any, /) -> Any: ...
