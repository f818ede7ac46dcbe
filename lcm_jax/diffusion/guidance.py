"""Classifier-free guidance (arXiv 2207.12598), and a schedule of how much of it acts at each timestep."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp


def classifier_free(uncond, cond, w):
    """Return cond + w (cond - uncond), with w = guidance_scale - 1 of diffusers."""
    return cond + w * (cond - uncond)


def scheduled_guidance(w: jax.Array, t: jax.Array, schedule: Sequence[tuple[int, float]]) -> jax.Array:
    """Return the weight that guides at t, float32[B]: w, clipped to w_max of the last (timestep, w_max) at or before t.

    w: float32[B]; t: int32[B]. schedule: (timestep, w_max) pairs, timesteps rising; from that timestep up, towards
    noise, w is clipped to w_max. ((0, 0.0), (300, inf)) guides an interval, as arXiv 2404.07724 does; () clips nothing.
    """
    limit = jnp.full(w.shape, jnp.inf, jnp.float32)
    for first, w_max in schedule:
        limit = jnp.where(t >= first, w_max, limit)
    return jnp.minimum(w, limit)


def check_guidance_schedule(key: str, schedule: Any, last: float = math.inf) -> None:
    """Raise ValueError, naming `key`, unless `schedule` is (timestep, w_max) pairs with timesteps rising in 0..last and
    w_max of at least 0."""
    number = lambda x: isinstance(x, (int, float)) and not isinstance(x, bool)  # noqa: E731
    is_pair = lambda x: isinstance(x, Sequence) and len(x) == 2 and all(map(number, x))  # noqa: E731
    pairs = isinstance(schedule, Sequence) and all(map(is_pair, schedule))
    if (
        not pairs
        or not all(0 <= t <= last and w_max >= 0 for t, w_max in schedule)
        or any(a[0] >= b[0] for a, b in pairwise(schedule))
    ):
        raise ValueError(
            f"{key} {schedule!r} is not supported; use (timestep, w_max) pairs with rising timesteps in 0..{last} and "
            "w_max of at least 0, such as ((0, 0.0), (300, 14.0)), or () to guide by all of w"
        )
