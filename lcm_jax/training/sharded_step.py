"""The step of a run with its arrays on a mesh, before it is compiled."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lcm_jax.training import sharding
from lcm_jax.training.state import Params, TrainState, create_state, make_optimizer
from lcm_jax.training.step import Batch, make_train_step


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
    over_fsdp = config.mesh.frozen == "sharded"
    shardings = sharding.tree_shardings(mesh, abstract)
    frozen_shardings = sharding.tree_shardings(mesh, task.frozen, over_fsdp)
    dtype = jnp.dtype(config.train.dtype)

    # Without these, XLA may split activations like the parameters that they meet, and move whole batches for it.
    def gather(params: Params, target: Params, frozen: Params) -> tuple[Params, Params, Params]:
        return whole(mesh, params, dtype), whole(mesh, target, dtype), whole(mesh, frozen) if over_fsdp else frozen

    def scatter(gradient: Params) -> Params:
        return jax.lax.with_sharding_constraint(gradient, shardings.params)

    update = make_train_step(
        task.objective,
        task.bind,
        task.prepare,
        optimizer,
        latents=task.latents,
        seed=config.train.seed,
        ema_rate=config.train.ema_rate,
        accumulate=config.train.accumulate,
        gather=gather,
        scatter=scatter,
    )

    def step(state: TrainState, frozen: Params, batch: Batch):
        # Kernels that the compiler cannot divide between devices ask for the mesh while they are traced.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return update(state, frozen, batch)

    jitted = jax.jit(
        step,
        in_shardings=(shardings, frozen_shardings, sharding.by_batch(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )
    return ShardedStep(jitted, create, place(abstract, shardings), place(task.frozen, frozen_shardings))


def whole(mesh: Mesh, tree: Params, dtype: Any = None) -> Params:
    """Return parameters that no longer are split over `fsdp`, each gathered in the dtype that it is computed with.

    dtype: of the matrices and kernels that are gathered, which networks cast to it before each use (see
    `models.stable_diffusion.frozen_dtype`); None for parameters that have that dtype already.
    """

    def leaf(x, split, gathered):
        if split == gathered:
            return x
        return jax.lax.with_sharding_constraint(x if dtype is None or x.ndim < 2 else x.astype(dtype), gathered)

    split, gathered = (sharding.tree_shardings(mesh, tree, over_fsdp) for over_fsdp in (True, False))
    return jax.tree.map(leaf, tree, split, gathered)
