"""The state of a training run, as one value, and the optimizers that update it."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

Params = Any  # a nested dict of float32 arrays


@flax.struct.dataclass
class TrainState:
    """The state of a run. It has no random key, since every step derives its own from the seed and its number.

    step: int32[], optimizer updates done. params: the parameters that are optimized. ema: their moving average, with
    the same structure, or None for a run without one.
    """

    step: jax.Array
    params: Params
    ema: Params | None
    opt_state: optax.OptState

    @property
    def average(self) -> Params:
        """The parameters of the target network, of samples and of exports: the moving average, if there is one."""
        return self.params if self.ema is None else self.ema


def create_state(params: Params, optimizer: optax.GradientTransformation, average: bool = True) -> TrainState:
    """Return the state at step 0, with float32 parameters and, if `average`, a copy of them as the moving average."""
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params) if average else None,
        opt_state=optimizer.init(params),
    )


def learning_rate_schedule(config, steps: int) -> optax.Schedule:
    """Return update, 0-based -> learning rate. config, steps: see `make_optimizer`. Raises ValueError."""
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    if config.schedule == "constant":
        after = optax.constant_schedule(config.learning_rate)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(config.learning_rate, max(steps - config.warmup_steps, 1))
    else:
        raise ValueError(f"optimizer.schedule is {config.schedule!r}; choose constant or cosine")
    return optax.join_schedules([warmup, after], [config.warmup_steps]) if config.warmup_steps else after


def make_optimizer(config, steps: int) -> optax.GradientTransformation:
    """Build AdamW, Muon or Adafactor after clipping by the global norm; biases and scales have no weight decay.

    Muon (Jordan et al. 2024, optax's) orthogonalizes the momentum of matrices and of convolution kernels, reshaped to
    [height * width * in, out], and scales it to the size of an Adam update (arXiv 2502.16982), so that one learning
    rate fits both. Biases, scales and embedding tables are updated by AdamW with Nesterov momentum.
    Adafactor (arXiv 1804.04235, optax's) keeps the mean squares of the rows and columns of a large matrix instead of
    those of its elements, and clips the root mean square of each update at 1. Its decay is Adam's (section 7.1), so
    that b1, b2 and the learning rate mean the same; b1=0 saves the momentum, which is as large as the parameters.
    config: the `optimizer` group of a run's config (name, learning_rate, warmup_steps, schedule, b1, b2,
    weight_decay, clip_norm). steps: the number of updates of the run, for the cosine schedule.
    Raises ValueError for a name or a schedule that is not supported.
    """
    schedule = learning_rate_schedule(config, steps)

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
    elif config.name == "adafactor":
        update = optax.chain(
            optax.scale_by_factored_rms(decay_rate=config.b2, decay_rate_fn=_adam_decay),
            optax.clip_by_block_rms(1.0),
            optax.ema(config.b1) if config.b1 else optax.identity(),
            optax.add_decayed_weights(config.weight_decay, mask=matrices),
            optax.scale_by_learning_rate(schedule),
        )
    else:
        raise ValueError(f"optimizer.name is {config.name!r}; choose adamw, muon or adafactor")
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def _adam_decay(step, b2):
    """Return the decay of a mean of squares without the bias of its beginning at 0. step: updates before this one."""
    step = jnp.asarray(step, jnp.float32)
    return b2 * (1 - b2**step) / (1 - b2 ** (step + 1))


def _as_matrices(params):
    """Return Muon's dimensions of each parameter, the last axis against all others; None for parameters it skips."""

    def dimensions(path, p):
        if p.ndim < 2 or path[-1].key == "embedding":
            return None
        return MuonDimensionNumbers(reduction_axis=tuple(range(p.ndim - 1)), output_axis=(p.ndim - 1,))

    return jax.tree_util.tree_map_with_path(dimensions, params)
