"""The loss of a batch by the timestep of each example: where along the trajectory a network still errs."""

import jax
import jax.numpy as jnp

from lcm_jax.objectives.networks import Metrics

BUCKETS = 4


def loss_by_timestep(losses: jax.Array, t: jax.Array, num_train_timesteps: int) -> Metrics:
    """Return {"loss/t0-249": float32[2], ...}: for each range of t, two means over the batch.

    losses: float32[B]; t: int32[B] in 0..num_train_timesteps-1. The first mean is of the losses in the range, with 0
    for all others; the second one is the share of the batch in the range. Both add up over micro-batches and steps, and
    their ratio is the mean loss in the range, if there was any.
    """
    metrics = {}
    for bucket in range(BUCKETS):
        first, end = (num_train_timesteps * edge // BUCKETS for edge in (bucket, bucket + 1))
        inside = (first <= t) & (t < end)
        metrics[f"loss/t{first}-{end - 1}"] = jnp.stack([jnp.mean(jnp.where(inside, losses, 0.0)), jnp.mean(inside)])
    return metrics
