"""What a distillation would take, from shapes alone: parameters, memory per device, work per step, time to expect.

Nothing is allocated or compiled. The trees are those of a real run, split by the same rules; what XLA makes of the
program is estimated, and said to be.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType
from rich.console import Console
from rich.table import Table

from lcm_jax import cost
from lcm_jax.models.attention import MIN_FUSED_KEYS
from lcm_jax.models.families import FAMILIES
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.recipes import lcd, settings
from lcm_jax.training import sharding
from lcm_jax.training.loop import check_batch_size
from lcm_jax.training.state import create_state, make_optimizer
from lcm_jax.weights import layout

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
UTILISATION = 0.4  # of that peak: what diffusion training reaches on large matrices


def teacher_configs(config) -> tuple[dict[str, Any], str]:
    """(the configs of `config.teacher` by component, where they are from): its folder, or the published ones.

    Raises ValueError where there is neither.
    """
    name = str(config.teacher)
    if name in layout.SHIPPED or Path(name).is_dir():
        folder = layout.locate(name)
        index = layout.read_index(folder)
        parts = {part: layout.read_json(folder / part / "config.json") for part in layout.networks_of(index)}
        scheduler = layout.read_json(folder / "scheduler" / "scheduler_config.json")
        return parts | {"model_index": index, "scheduler": scheduler}, str(folder)
    if (family := config.get("family")) not in FAMILIES:
        raise ValueError(
            f"there is no folder {name!r} to read the teacher's configs from, and config.family is {family!r}; give a "
            f"folder as --config.teacher, or as --config.family one of {', '.join(FAMILIES)}"
        )
    return dict(FAMILIES[family]), f"the published configs of {family}"


def figures(config) -> dict[str, Any]:
    """All that `show` tells, as plain numbers; bytes are those of one device.

    config: as of a run. mesh.data = -1 stands for the devices that this machine has. Raises ValueError for another
    objective and a setting out of its range, RunError for a batch that does not fit the mesh.
    """
    settings.check(config)
    if config.objective.name != "lcd":
        raise ValueError(f"--dry_run knows the objective lcd; this config has {config.objective.name!r}")
    dtype = jnp.dtype(config.train.dtype)
    configs, source = teacher_configs(config)
    teacher = StableDiffusion.from_configs(configs, dtype)
    model = StableDiffusion.from_configs(lcd.student_configs(config, configs), dtype, remat=config.train.remat)
    lcd.check_samplers(config, teacher, model)
    mesh = abstract_mesh(config.mesh.data, config.mesh.fsdp)
    local = check_batch_size(config, mesh.size)

    optimizer = make_optimizer(config.optimizer, config.train.steps)
    params = {"unet": model.abstract_params()["unet"]}
    state = jax.eval_shape(lambda p: create_state(p, optimizer), params)
    frozen = lcd.lcd_frozen(config, held_abstract(teacher))
    frozen["empty_ids"] = jax.ShapeDtypeStruct(lcd.lcd_batch(config, teacher, 1)["token_ids"].shape[1:], jnp.int32)

    # Traced for one device's micro-batch. Half of it must be a whole example where some are the student's own.
    traced = max(local, 2) if config.objective.own_share else local
    batch = lcd.lcd_batch(config, teacher, traced)
    draw, loss = lcd.lcd_functions(config, teacher, model)
    draws = jax.eval_shape(draw, jax.eval_shape(lambda: jax.random.key(0)), batch)
    program = jax.jit(jax.grad(loss, has_aux=True)).trace(params, params, frozen, batch, draws)
    flops = cost.count_flops(program.jaxpr.jaxpr) * config.train.batch_size / traced
    logits = fused_attentions(config.data.size // model.downscale, len(model.unet.config["block_out_channels"]))
    gradients = device_bytes(mesh, params)
    memory = {
        "student": device_bytes(mesh, state.params),
        "its moving average": device_bytes(mesh, state.ema),
        "optimizer moments": device_bytes(mesh, state.opt_state),
        "gradients": gradients * (1 if config.train.accumulate == 1 else 2),  # their sum, and those of a micro-batch
        "teacher": device_bytes(mesh, frozen["unet"]),
        "text encoders and autoencoder": device_bytes(mesh, {n: t for n, t in frozen.items() if n != "unet"}),
        "batch": bytes_of(lcd.lcd_batch(config, teacher, local * config.train.accumulate)),
    }
    activations = {
        name: cost.peak_bytes(program.jaxpr.jaxpr, skip) * local // traced
        for name, skip in [("fused", logits), ("unfused", frozenset())]
    }
    return {
        "title": f"{config.teacher} ({source})",
        "parameters": {
            name: count(tree) for name, tree in {"student": params, **frozen}.items() if name != "empty_ids"
        },
        "mesh": dict(mesh.shape),
        "pictures_per_device": local * config.train.accumulate,
        "accumulate": config.train.accumulate,
        "memory": memory,
        "activations": activations,
        "flops": flops,
        "batch_size": config.train.batch_size,
        "steps": config.train.steps,
        "dtype": dtype.name,
        "remat": config.train.remat,
        "time": {
            name: {
                "step": flops / (mesh.size * peak * 1e12 * UTILISATION),
                "memory": int(size * 1e9),
                "fits": sum(memory.values()) + activations["fused" if "NVIDIA" in name else "unfused"] <= size * 1e9,
            }
            for name, (peak, size) in ACCELERATORS.items()
        },
    }


def abstract_mesh(data: int, fsdp: int) -> AbstractMesh:
    """As `sharding.make_mesh`, of devices that need not be there."""
    data = max(jax.device_count() // fsdp, 1) if data == -1 else data
    return AbstractMesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def held_abstract(model: StableDiffusion) -> dict[str, Any]:
    """The shapes of what `lcd.held` makes of a teacher's parameters, by network."""
    held = lambda name: lambda x: jax.ShapeDtypeStruct(x.shape, lcd.held_dtype(x, model.dtype_of(name)))  # noqa: E731
    return {name: jax.tree.map(held(name), tree) for name, tree in model.abstract_params().items()}


def count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def bytes_of(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def device_bytes(mesh, tree) -> int:
    """Bytes of `tree` on each device of `mesh`, split as a run splits it."""
    shards = jax.tree.map(
        lambda x, s: int(np.prod(s.shard_shape(x.shape))) * x.dtype.itemsize, tree, sharding.tree_shardings(mesh, tree)
    )
    return sum(jax.tree.leaves(shards))


def fused_attentions(side: int, levels: int) -> frozenset[tuple[int, int]]:
    """Return the (queries, keys) of the UNet's attentions that a GPU computes with a fused kernel.

    side: latents along one axis. Attention to the prompt and between a few positions is left to XLA.
    """
    positions = [(-(-side // 2**level)) ** 2 for level in range(levels)]
    return frozenset((n, n) for n in positions if n >= MIN_FUSED_KEYS)


# ---- telling --------------------------------------------------------------------------------------------------------


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2f} s"


def show(found: Mapping[str, Any]) -> None:
    """Prints `figures`."""
    console = Console(width=None if Console().is_terminal else 120)
    say = lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)  # noqa: E731
    devices = int(np.prod([*found["mesh"].values()]))
    say(f"{found['title']}: nothing was allocated")
    table = Table(title="parameters")
    table.add_column("network"), table.add_column("millions", justify="right")
    for name, number in found["parameters"].items():
        table.add_row({"unet": "teacher unet", "vae": "vae encoder"}.get(name, name), f"{number / 1e6:,.1f}")
    console.print(table)

    mesh = ", ".join(f"{name} {size}" for name, size in found["mesh"].items())
    parts = f" in {found['accumulate']} parts" if found["accumulate"] > 1 else ""
    table = Table(title=f"memory per device; mesh: {mesh}; {found['pictures_per_device']} pictures on each{parts}")
    table.add_column("what"), table.add_column("", justify="right")
    for name, size in found["memory"].items():
        table.add_row(name, gigabytes(size))
    held = sum(found["memory"].values())
    fused, unfused = found["activations"]["fused"], found["activations"]["unfused"]
    table.add_row("activations (estimate), attention fused as on a GPU", gigabytes(fused))
    table.add_row("activations (estimate), attention not fused", gigabytes(unfused))
    table.add_row("together", f"{gigabytes(held + fused)} or {gigabytes(held + unfused)}", style="bold")
    console.print(table)

    say(f"{found['flops'] / 1e12:,.1f} TFLOP a step of {found['batch_size']} pictures, {found['steps']:,} steps")
    if found["dtype"] == "float32":
        say("float32 has no published figure that compares; in bfloat16 (train.dtype) these would be the times.")
    table = Table(title=f"estimated time on {devices} of these, at {UTILISATION:.0%} of the published bfloat16 peak")
    for column in ("accelerator", "a step", "all steps", "memory", "fits"):
        table.add_column(column, justify="left" if column in ("accelerator", "fits") else "right")
    for name, each in found["time"].items():
        whole = duration(each["step"] * found["steps"])
        table.add_row(name, duration(each["step"]), whole, gigabytes(each["memory"]), "yes" if each["fits"] else "no")
    console.print(table)
