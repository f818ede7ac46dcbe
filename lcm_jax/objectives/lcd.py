"""Latent consistency distillation: Algorithm 1 of arXiv 2310.04378."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.diffusion.consistency import consistency_function
from lcm_jax.diffusion.guidance import capped, classifier_free
from lcm_jax.diffusion.schedule import Schedule, add_noise, alpha_sigma, predict_noise, predict_x0, skipping_steps
from lcm_jax.diffusion.solvers import ddim_step


class Networks(NamedTuple):
    """student(params, z, t, conditioning) -> output, teacher(params, z, t, conditioning) -> output;
    encode_prompt(frozen, token_ids, time_ids) -> conditioning without guidance;
    to_latents(moments, noise) -> z."""

    student: Callable
    teacher: Callable
    encode_prompt: Callable
    to_latents: Callable


class Draws(NamedTuple):
    posterior: jax.Array  # float32[B, h, w, c], picks the latent from the autoencoder's posterior; see own_pictures
    noise: jax.Array  # float32[B, h, w, c]
    index: jax.Array  # int32[B], 0 <= index < num_ddim_steps, which skipping step
    w: jax.Array  # float32[B], the guidance weight of cond + w (cond - uncond)
    keep_prompt: jax.Array  # bool[B], False distils the empty prompt


def draw(rng: jax.Array, batch, *, num_ddim_steps: int, w_min: float, w_max: float, empty_prompts: float) -> Draws:
    """batch["moments"]: float32[B,h,w,2c]; empty_prompts: the share of captions replaced by the empty one."""
    b, h, w, c2 = batch["moments"].shape
    posterior, noise, index, weight, keep = jax.random.split(rng, 5)
    return Draws(
        posterior=jax.random.normal(posterior, (b, h, w, c2 // 2), jnp.float32),
        noise=jax.random.normal(noise, (b, h, w, c2 // 2), jnp.float32),
        index=jax.random.randint(index, (b,), 0, num_ddim_steps, jnp.int32),
        w=jax.random.uniform(weight, (b,), jnp.float32, minval=w_min, maxval=w_max),
        keep_prompt=jax.random.uniform(keep, (b,), jnp.float32) >= empty_prompts,
    )


def distance(difference: jax.Array, kind: str, huber_c: float) -> jax.Array:
    """[B, ...] -> [B]. l2: mean d^2. huber: mean(sqrt(d^2 + c^2) - c), the pseudo-Huber metric of arXiv 2310.14189."""
    axes = tuple(range(1, difference.ndim))
    if kind == "l2":
        return jnp.mean(jnp.square(difference), axes)
    if kind == "huber":
        return jnp.mean(jnp.sqrt(jnp.square(difference) + huber_c**2) - huber_c, axes)
    raise ValueError(f"objective.distance is {kind!r}; choose l2 or huber")


def weights(schedule: Schedule, s: jax.Array, weighting: str) -> jax.Array:
    """What each example's distance counts, float32[B]; s: int32[B], where its step starts.

    uniform: 1, as published. inverse_sigma: 1 / sigma_s, so that an error in the v that a network predicts counts the
    same at every s (x0 = alpha z - sigma v). Otherwise the steps near pure noise, whose errors are the largest, crowd
    out those near the picture, on which all others build. Consistency training weighs in the same spirit (2310.14189).
    """
    if weighting == "uniform":
        return jnp.ones(s.shape, jnp.float32)
    if weighting == "inverse_sigma":
        return 1.0 / alpha_sigma(schedule, s)[1].reshape(s.shape)
    raise ValueError(f"objective.weighting is {weighting!r}; choose uniform or inverse_sigma")


def own_pictures(target, z, noise, guided, share: float, networks: Networks, schedule: Schedule):
    """z with round(share B) of its examples, evenly spread, replaced by what the target network draws from `noise`.

    In one jump from pure noise; z, noise: float32[B, h, w, c]. A sampler of several steps noises what the network
    itself has made, and that is not quite what data is: where it cannot tell which of two colours is meant, its jump is
    between them. From there the teacher finds its way to one; a student that has only seen data does not learn to.
    Raises ValueError for a share that is no example of this (micro-)batch, or more than all.
    """
    batch, last = len(z), len(schedule.alphas_cumprod) - 1
    count = round(share * batch)
    if not 1 <= count <= batch:
        raise ValueError(f"objective.own_share is {share}: not 1 to {batch} examples of a (micro-)batch of {batch}")
    chosen = np.arange(count) * batch // count
    noise, guided = jax.tree.map(lambda a: a[chosen], (noise, guided))
    t = jnp.full(count, last, jnp.int32)
    output = networks.student(target["unet"], noise, t, guided)
    own = consistency_function(schedule, output, noise, t)
    return z.at[chosen].set(jax.lax.stop_gradient(own))


def check_w_caps(caps: Sequence[tuple[int, float]], last: int) -> None:
    """Raises ValueError unless `caps` are (timestep, most) pairs, timesteps rising in 0..last and most >= 0."""
    number = lambda x: isinstance(x, (int, float))  # noqa: E731
    pairs = all(
        isinstance(cap, Sequence) and len(cap) == 2 and all(map(number, cap)) and 0 <= cap[0] <= last and cap[1] >= 0
        for cap in caps
    )
    if not pairs or any(a[0] >= b[0] for a, b in pairwise(caps)):
        raise ValueError(
            f"objective.w_caps is {tuple(caps)}: give (timestep, most) pairs, timesteps rising in 0..{last} and most "
            "from 0 on, such as ((0, 0.0), (300, 14.0)), or () for none"
        )


def loss(
    params,
    target,
    frozen,
    batch,
    draws: Draws,
    *,
    networks: Networks,
    schedule: Schedule,
    num_ddim_steps: int,
    kind: str = "huber",
    huber_c: float = 1e-3,
    weighting: str = "uniform",
    own_share: float = 0.0,
    w_caps: Sequence[tuple[int, float]] = (),
):
    """The consistency distillation loss, exact in its draws.

    params, target: {"unet"} of the student and of its moving average; frozen: teacher "unet", the text encoders, and
    "empty_ids" int32[L]; batch: moments float32[B,h,w,2c], token_ids int32[B,L], and for SDXL time_ids float32[B,6],
    token_ids int32[B,2,L] and empty_ids int32[2,L]. own_share: of the batch, distilled on `own_pictures` instead of
    data (published: 0); they begin from draws.posterior, which they leave free. w_caps: how much of w guides the
    teacher at which t, see `capped`; the student is told all of w (published: no caps).
    Returns (float32[], metrics). Raises ValueError for a setting out of its range.
    """
    check_w_caps(w_caps, len(schedule.alphas_cumprod) - 1)
    empty_ids = jnp.broadcast_to(frozen["empty_ids"], batch["token_ids"].shape)
    keep = draws.keep_prompt.reshape(-1, *(1,) * (empty_ids.ndim - 1))
    time_ids = batch.get("time_ids")
    context = networks.encode_prompt(frozen, jnp.where(keep, batch["token_ids"], empty_ids), time_ids)
    empty = networks.encode_prompt(frozen, empty_ids, time_ids)
    guided = context._replace(guidance=draws.w)

    # 1. A point z_s on the data's trajectory, and the step t that comes one skipping step before s.
    s, t = skipping_steps(draws.index, num_ddim_steps, len(schedule.alphas_cumprod))
    z = networks.to_latents(batch["moments"], draws.posterior)
    if own_share:
        z = own_pictures(target, z, draws.posterior, guided, own_share, networks, schedule)
    z_s = add_noise(schedule, z, draws.noise, s)

    # 2. The student's prediction of the trajectory's origin.
    prediction = consistency_function(schedule, networks.student(params["unet"], z_s, s, guided), z_s, s)

    # 3. One guided solver step by the teacher, its two passes as one batch of 2B: z_t.
    twice = lambda x: jnp.concatenate([x, x])  # noqa: E731
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), context, empty)
    output = networks.teacher(frozen["unet"], twice(z_s), twice(s), both)
    x0_cond, x0_empty = jnp.split(predict_x0(schedule, output, twice(z_s), twice(s)), 2)
    noise_cond, noise_empty = jnp.split(predict_noise(schedule, output, twice(z_s), twice(s)), 2)
    w = capped(draws.w, s, w_caps)[:, None, None, None]
    x0, noise = classifier_free(x0_empty, x0_cond, w), classifier_free(noise_empty, noise_cond, w)
    z_t = jax.lax.stop_gradient(ddim_step(x0, noise, *alpha_sigma(schedule, t)))

    # 4. The target network's prediction from there; at the boundary t = 0 it is z_t itself.
    origin = consistency_function(schedule, networks.student(target["unet"], z_t, t, guided), z_t, t)

    # 5. The distance between the two.
    difference = distance(prediction - jax.lax.stop_gradient(origin), kind, huber_c)
    total = jnp.mean(weights(schedule, s, weighting) * difference)
    return total, {"loss": total}
