"""The step of a run with its arrays on a mesh, before it is compiled."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from lcm_jax.training import sharding
from lcm_jax.training.state import Params, TrainState, create_state, make_optimizer
from lcm_jax.training.step import make_train_step


class ShardedStep(NamedTuple):
    """A step and the arrays that it is compiled for.

    jitted(state, frozen, batch) -> (state, metrics), with the state donated. create(params) -> the state at step
    0, to be jitted. state, frozen: shapes, dtypes and shardings of what the step is called with, as ShapeDtypeStructs.
    """

    jitted: Any
    create: Callable[[Params], TrainState]
    state: TrainState
    frozen: Params


def placement(tree: Any) -> Any:
    """Return the shardings of a tree of ShapeDtypeStructs."""
    return jax.tree.map(lambda x: x.sharding, tree)


def make_sharded_step(task: Any, config, mesh: Mesh) -> ShardedStep:
    """Return the step of a TrainTask under `config`, with its arrays on `mesh` by the rules of `sharding`.

    config: as of a run. Nothing is compiled or allocated. Raises ValueError for an optimizer that is not supported.
    """
    optimizer = make_optimizer(config.optimizer, config.train.steps)

    def create(params: Params) -> TrainState:
        return create_state(params, optimizer, average=config.train.ema_rate > 0)

    def place(tree, shardings):
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

    abstract = jax.eval_shape(create, task.params)
    shardings = sharding.tree_shardings(mesh, abstract)
    frozen_shardings = sharding.tree_shardings(mesh, task.frozen, over_fsdp=config.mesh.frozen == "sharded")
    step = make_train_step(
        task.objective,
        task.bind,
        task.prepare,
        optimizer,
        latents=task.latents,
        seed=config.train.seed,
        ema_rate=config.train.ema_rate,
        accumulate=config.train.accumulate,
    )
    jitted = jax.jit(
        step,
        in_shardings=(shardings, frozen_shardings, sharding.by_batch(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )
    return ShardedStep(jitted, create, place(abstract, shardings), place(task.frozen, frozen_shardings))
