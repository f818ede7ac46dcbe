"""Everything that a training run carries from one step to the next, as one value."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

Params = Any  # a nested dict of float32 arrays


@flax.struct.dataclass
class TrainState:
    """The run at one instant. There is no random state: every step derives its key from the seed and its number.

    step: int32[], optimizer updates done. params: what is optimised. ema: the moving average of params with the same
    structure, which is the target network of consistency training and what samples and exports are made from.
    """

    step: jax.Array
    params: Params
    ema: Params
    opt_state: optax.OptState


def create_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state at step 0: float32 master weights, and a target that equals them (in buffers of its own)."""
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
    )


def make_optimizer(config, steps: int) -> optax.GradientTransformation:
    """AdamW or Muon after clipping by the global norm; decay acts on matrices and kernels, not on biases and scales.

    Muon (Jordan et al. 2024, optax's) orthogonalises the momentum of matrices and convolution kernels, these as
    [height * width * in, out], and scales it to the size of an Adam update (arXiv 2502.16982), so that one learning
    rate fits both; biases, scales and embedding tables take the step of AdamW with Nesterov momentum.
    config: the `optimizer` group of a run's config (name, learning_rate, warmup_steps, schedule, b1, b2,
    weight_decay, clip_norm). steps: the length of the run in optimizer updates, for the cosine schedule.
    Raises ValueError for a name or a schedule that is not one of those.
    """
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    if config.schedule == "constant":
        after = optax.constant_schedule(config.learning_rate)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(config.learning_rate, max(steps - config.warmup_steps, 1))
    else:
        raise ValueError(f"optimizer.schedule is {config.schedule!r}; choose constant or cosine")
    schedule = optax.join_schedules([warmup, after], [config.warmup_steps]) if config.warmup_steps else after

    def matrices(params):
        return jax.tree.map(lambda p: p.ndim >= 2, params)

    if config.name == "adamw":
        update = optax.adamw(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=matrices)
    elif config.name == "muon":
        update = muon(
            schedule,
            beta=config.b1,
            adam_b1=config.b1,
            adam_b2=config.b2,
            consistent_rms=0.2,
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=_as_matrices,
        )
    else:
        raise ValueError(f"optimizer.name is {config.name!r}; choose adamw or muon")
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def _as_matrices(params):
    """How Muon reads each parameter as a matrix: the last axis against all others; None for what is none."""

    def dimensions(path, p):
        if p.ndim < 2 or path[-1].key == "embedding":
            return None
        return MuonDimensionNumbers(reduction_axis=tuple(range(p.ndim - 1)), output_axis=(p.ndim - 1,))

    return jax.tree_util.tree_map_with_path(dimensions, params)
