"""One optimizer update as a pure function: draw -> gradient over micro-batches -> clip and update -> moving average."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lcm_jax.objectives.networks import Bind, Metrics, Objective, Prepare
from lcm_jax.training.state import Params, TrainState

Batch = dict[str, jax.Array]


def make_loss(objective: Objective, bind: Bind, prepare: Prepare) -> Callable[..., tuple[jax.Array, Metrics]]:
    """Return loss(params, target, frozen, batch, draws) -> (float32[], metrics) of a batch of records."""

    def loss(params: Params, target: Params, frozen: Params, batch: Batch, draws: Any):
        return objective.loss(bind(params, target, frozen), prepare(params, frozen, batch, draws), draws)

    return loss


def make_train_step(
    objective: Objective,
    bind: Bind,
    prepare: Prepare,
    optimizer: optax.GradientTransformation,
    *,
    latents: Callable[[Batch], jax.ShapeDtypeStruct],
    seed: int,
    ema_rate: float,
    accumulate: int = 1,
    gather: Callable[[Params, Params, Params], tuple[Params, Params, Params]] = lambda *trees: trees,
    scatter: Callable[[Params], Params] = lambda gradient: gradient,
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]:
    """Build `step(state, frozen, batch) -> (state, metrics)`, to be jitted with the state donated.

    objective, bind, prepare: see `objectives.networks`. latents(batch): the shape of a whole batch's z, for the draws.
    ema_rate: mu in target <- mu target + (1 - mu) params, applied once per update (Polyak averaging); without effect on
        a state without a moving average, whose target is the parameters themselves.
    accumulate: number of micro-batches; their mean gradient is the gradient of the whole batch. `step` raises
        ValueError, while it is traced, if it does not divide the batch.
    gather(params, target, frozen): the same values as the devices of a mesh compute with them. scatter(gradient): as
        they keep it. See `sharded_step`.
    """
    of_whole = make_loss(objective, bind, prepare)

    def loss(params: Params, target: Params, frozen: Params, batch: Batch, draws: Any):
        return of_whole(*gather(params, target, frozen), batch, draws)

    def micro_batches(tree):
        # Example i goes to micro-batch i mod N: each lies on all devices when the batch axis is sharded.
        split = lambda x: x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:])  # noqa: E731
        return jax.tree.map(lambda x: jnp.moveaxis(split(x), 1, 0), tree)

    def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        size = jax.tree.leaves(batch)[0].shape[0]
        if size % accumulate:
            raise ValueError(f"batch size {size} is not a multiple of accumulate {accumulate}; choose a divisor of it")
        draws = objective.draw(jax.random.fold_in(jax.random.key(seed), state.step), latents(batch))
        target = state.average

        def gradient(batch, draws):
            grads, metrics = jax.grad(loss, has_aux=True)(state.params, target, frozen, batch, draws)
            return scatter(grads), metrics

        if accumulate == 1:
            grads, metrics = gradient(batch, draws)
        else:

            def add(total, micro):
                return jax.tree.map(jnp.add, total, gradient(*micro)), None

            micro = micro_batches((batch, draws))
            shapes = jax.eval_shape(gradient, *jax.tree.map(lambda x: x[0], micro))
            total, _ = jax.lax.scan(add, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), micro)
            grads, metrics = jax.tree.map(lambda x: x / accumulate, total)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            ema = jax.tree.map(lambda e, p: ema_rate * e + (1.0 - ema_rate) * p, ema, params)
        metrics = metrics | {"gradient_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return step
