"""Estimates of what a run needs, from shapes alone: parameters, memory per device, work per step, time.

Nothing is allocated or compiled. The trees are those of a real run, split by the same rules; what XLA makes of the
program is an estimate.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from lcm_jax import cost, scaling
from lcm_jax.models.families import FAMILIES
from lcm_jax.recipes import check_config, find_recipe
from lcm_jax.recipes.models import OpenModel
from lcm_jax.training import sharding
from lcm_jax.training.loop import check_batch_size
from lcm_jax.training.state import create_state, make_optimizer
from lcm_jax.training.step import make_loss
from lcm_jax.weights import layout
from lcm_jax.weights.model import StoredModel, open_model, published

# Published by their makers: dense bfloat16 TFLOP/s, and GB of memory.
ACCELERATORS = {
    "NVIDIA A100 80GB": (312, 80),
    "NVIDIA H100 SXM": (989, 80),
    "NVIDIA H200": (989, 141),
    "TPU v4": (275, 32),
    "TPU v5e": (197, 16),
    "TPU v5p": (459, 95),
    "TPU v6e": (918, 32),
}
FULL_EMA_RATE = 0.95  # of the published scripts; what matters here is that there is one


def open_or_published(config) -> OpenModel:
    """Return an opener of models that takes the published configs of `config.family` if a model is not on this disk.

    The opener raises ValueError if there is neither.
    """

    def open_local(name: str, *, base: str | None = None) -> StoredModel:
        if name in layout.SHIPPED or Path(name).exists():
            return open_model(name, base=base)
        if (family := config.get("family")) not in FAMILIES:
            remedy = f"; use a path, or set --config.family to one of {', '.join(FAMILIES)}"
            if "family" not in config:
                remedy = f"; use a path, or a bundled model: {', '.join(layout.SHIPPED)}"
            raise ValueError(
                f"there is no folder or file {name!r} to read the configs from"
                + (f", and config.family is {family!r}" if "family" in config else "")
                + remedy
            )
        return published(family)

    return open_local


def estimate(config) -> dict[str, Any]:
    """Return all that `show` prints, as plain numbers; bytes are those of one device.

    config: as of a run. mesh.data = -1 stands for the devices that this machine has. Raises ValueError for a setting
    that is not supported, RunError for a batch that does not fit the mesh.
    """
    check_config(config)
    open_any, sources = open_or_published(config), []

    def open_noted(name: str, *, base: str | None = None) -> StoredModel:
        stored = open_any(name, base=base)
        sources.append(stored.name)
        return stored

    task = find_recipe(config)(config, Path(), open_noted)
    mesh = abstract_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    local, accumulate = check_batch_size(config, sharding.batch_parts(mesh.shape)), config.train.accumulate
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    state = jax.eval_shape(lambda params: create_state(params, optimizer, config.train.ema_rate > 0), task.params)

    # The gradient is traced for one device's micro-batch.
    of_device = lambda tree, count: jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype), tree)  # noqa: E731
    key = jax.eval_shape(lambda: jax.random.key(0))
    latents = task.latents(task.batch)
    draws = jax.eval_shape(lambda key: task.objective.draw(key, latents), key)
    gradient = jax.grad(make_loss(task.objective, task.bind, task.prepare), has_aux=True)
    micro = of_device((dict(task.batch), draws), local)
    program = jax.jit(gradient).trace(task.params, task.params, task.frozen, *micro)
    flops = cost.count_flops(program.jaxpr.jaxpr) * config.train.batch_size / local
    over_fsdp = config.mesh.frozen == "sharded"

    def memory_on(mesh: AbstractMesh) -> dict[str, int]:
        return {
            "trained parameters": device_bytes(mesh, state.params),
            "their moving average": device_bytes(mesh, state.ema),
            "optimizer moments": device_bytes(mesh, state.opt_state),
            # Their sum, and those of a micro-batch.
            "gradients": device_bytes(mesh, task.params) * (1 if accumulate == 1 else 2),
            "frozen parameters": device_bytes(mesh, task.frozen, over_fsdp),
            "batch": nbytes(of_device(dict(task.batch), local * accumulate)),
        }

    activations = cost.peak_bytes(program.jaxpr.jaxpr)
    memory, split = memory_on(mesh), abstract_mesh(1, 1, config.mesh.tensor)
    # Trained parameters and their gradients travel in the compute dtype, those of student and target network once each.
    moved = device_bytes(split, state.params) * jnp.dtype(config.train.dtype).itemsize / 4
    networks = 1 if state.ema is None else 2
    load = scaling.Load(
        gathered=accumulate * (networks * moved + over_fsdp * device_bytes(split, task.frozen)),
        reduced=accumulate * moved,
    )
    return {
        "title": f"{config.objective.name} from {' and '.join(sources) or 'scratch'}",
        "trained": {name: count(tree) for name, tree in networks_of(task.params, task.title).items()},
        "frozen": {name: count(tree) for name, tree in networks_of(task.frozen, task.title).items()},
        "mesh": dict(mesh.shape),
        "images_per_device": local * accumulate,
        "accumulate": accumulate,
        "memory": memory,
        "activations": activations,
        "flops": flops,
        "batch_size": config.train.batch_size,
        "steps": config.train.steps,
        "dtype": config.train.dtype,
        "time": {
            name: {
                "step": flops / (mesh.size * peak * 1e12 * scaling.ASSUMED_MFU),
                "memory": int(size * 1e9),
                "fits": sum(memory.values()) + activations <= size * 1e9,
            }
            for name, (peak, size) in ACCELERATORS.items()
        },
        "clusters": {
            name: on_cluster(
                cluster, config.mesh, lambda mesh: sum(memory_on(mesh).values()) + activations, flops / mesh.size, load
            )
            for name, cluster in scaling.CLUSTERS.items()
        },
    }


def on_cluster(
    cluster: scaling.Cluster, mesh, memory_on: Callable[[AbstractMesh], float], flops: float, load: scaling.Load
) -> dict[str, Any]:
    """Return what `show` prints of a step on all devices of a cluster, each with as many images as in the run.

    mesh: the group of the config, whose `tensor` is kept, and whose `fsdp` is doubled until a device holds its part of
    the state and its activations, memory_on(mesh) bytes. flops: of one device.
    """
    free = cluster.chips // mesh.tensor
    doubled = (mesh.fsdp * 2**n for n in range(cluster.chips.bit_length()))
    meshes = [abstract_mesh(free // fsdp, fsdp, mesh.tensor) for fsdp in doubled if free % fsdp == 0]
    meshes = meshes or [abstract_mesh(1, free, mesh.tensor)]
    fitting = [sizes for sizes in meshes if memory_on(sizes) <= cluster.memory * 1e9]
    sizes = (fitting or meshes)[0]
    time = scaling.step_time(cluster, sizes.shape, flops, load)
    return {"mesh": dict(sizes.shape), "memory": memory_on(sizes), "fits": bool(fitting), "time": time}


def without_adapters(config) -> ConfigDict:
    """Return the config of a run that trains all of the UNet where `config` trains adapters, with a moving average."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        del config.lora
        config.train.ema_rate = config.train.ema_rate or FULL_EMA_RATE
        if config.objective.name == "lcd":
            config.student = ConfigDict({"guidance_embedding_dim": 256, "guidance_embedding_init": "zero"})
    return config


def networks_of(tree: Mapping[str, Any], title: str) -> dict[str, Any]:
    """Return the networks of a tree of parameters by name; a tree that is one network has the task's title."""
    named = {name: part for name, part in tree.items() if name not in ("empty_ids", "empty_prompt")}
    return named if set(named) <= {*layout.NETWORKS, "lora"} else {title: named}


def abstract_mesh(data: int, fsdp: int, tensor: int = 1) -> AbstractMesh:
    """Build the mesh of `sharding.make_mesh` for devices that need not exist."""
    data = max(jax.device_count() // (fsdp * tensor), 1) if data == -1 else data
    return AbstractMesh((data, fsdp, tensor), sharding.AXES, axis_types=(AxisType.Auto,) * len(sharding.AXES))


def count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def nbytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def device_bytes(mesh, tree, over_fsdp: bool = True) -> int:
    """Bytes of `tree` on each device of `mesh`, split as a run splits it. over_fsdp: see `sharding.tree_shardings`."""
    shardings = sharding.tree_shardings(mesh, tree, over_fsdp)
    shards = jax.tree.map(lambda x, s: int(np.prod(s.shard_shape(x.shape))) * x.dtype.itemsize, tree, shardings)
    return sum(jax.tree.leaves(shards))


# ---- printing -------------------------------------------------------------------------------------------------------


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2f} s"


def show(found: Mapping[str, Any], full: Mapping[str, Any] | None = None) -> None:
    """Print an `estimate`, for adapters beside that of the same run with all of the UNet trained."""
    console = Console(width=None if Console().is_terminal else 120)
    write = lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)  # noqa: E731
    devices = int(np.prod([*found["mesh"].values()]))
    write(f"{found['title']}: nothing was allocated")
    table = Table(title="parameters")
    table.add_column("network")
    table.add_column("")
    table.add_column("millions", justify="right")
    for kind in ("trained", "frozen"):
        for name, number in found[kind].items():
            table.add_row(name, kind, f"{number / 1e6:,.1f}")
    console.print(table)

    mesh = ", ".join(f"{name} {size}" for name, size in found["mesh"].items())
    parts = f" in {found['accumulate']} micro-batches" if found["accumulate"] > 1 else ""
    table = Table(title=f"memory per device; mesh: {mesh}; {found['images_per_device']} images on each{parts}")
    table.add_column("part")
    sides = [found] if full is None else [found, full]
    for heading in [""] if full is None else ["adapters", "all of the UNet"]:
        table.add_column(heading, justify="right")
    for name in found["memory"]:
        table.add_row(name, *(gigabytes(side["memory"][name]) for side in sides))
    activations = [gigabytes(side["activations"]) for side in sides]
    table.add_row("activations (estimate), attention fused or in blocks", *activations)
    totals = [sum(side["memory"].values()) + side["activations"] for side in sides]
    table.add_row("total", *map(gigabytes, totals), style="bold")
    console.print(table)

    write(f"{found['flops'] / 1e12:,.1f} TFLOP per step of {found['batch_size']} images, {found['steps']:,} steps")
    if found["dtype"] == "float32":
        write("float32 has no comparable published peak; the times below are for bfloat16 (train.dtype).")
    table = Table(
        title=f"estimated time on {devices} of these, at {scaling.ASSUMED_MFU:.0%} of the published bfloat16 peak"
    )
    for column in ("accelerator", "a step", "all steps", "memory", "fits"):
        table.add_column(column, justify="left" if column in ("accelerator", "fits") else "right")
    for name, each in found["time"].items():
        whole = duration(each["step"] * found["steps"])
        table.add_row(name, duration(each["step"]), whole, gigabytes(each["memory"]), "yes" if each["fits"] else "no")
    console.print(table)

    table = Table(
        title=f"estimated on clusters, {found['images_per_device']} images on each device; see docs/scaling.md"
    )
    for column in ("cluster", "mesh", "batch", "arithmetic", "communication", "a step", "efficiency", "memory", "fits"):
        table.add_column(column, justify="left" if column in ("cluster", "mesh", "fits") else "right")
    for name, each in found["clusters"].items():
        time, sizes = each["time"], each["mesh"]
        batch = found["images_per_device"] * sharding.batch_parts(sizes)
        table.add_row(
            name,
            " x ".join(map(str, sizes.values())),
            f"{batch:,}",
            duration(time.compute),
            duration(time.communication),
            f"{duration(time.shortest)} to {duration(time.longest)}",
            f"{time.compute / time.longest:.0%} to {time.compute / time.shortest:.0%}",
            gigabytes(each["memory"]),
            "yes" if each["fits"] else "no",
        )
    console.print(table)
