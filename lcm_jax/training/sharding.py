"""The device mesh and the shardings of a run's arrays, by rules on their paths."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
MIN_SHARDED_SIZE = 2**14  # smaller arrays cost more to gather than they save

# (regex of a path's end, axes of the array that `tensor` splits): the first rule of the same rank applies. A layer with
# split outputs is followed by one that sums over its split inputs, so that each pair costs one all-reduce. `fsdp` then
# splits the largest axis that is left, of these arrays as of all others.
OUT, IN = (None, "tensor"), ("tensor", None)
CONV_OUT, CONV_IN, VECTOR = (None, None, None, "tensor"), (None, None, "tensor", None), ("tensor",)
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # Attention of the UNet and of the text encoders by heads. The autoencoder's has one head, which is not split.
    (r"(attn\d/to_[qkv]|self_attn/[qkv]_proj)/kernel$", OUT),
    (r"self_attn/[qkv]_proj/bias$", VECTOR),
    (r"(attn\d/to_out_0|self_attn/out_proj)/kernel$", IN),
    # Feed-forward layers and the embedding of the time, by hidden features.
    (r"(ff/net_0/proj|mlp/fc1|_embedding/linear_1)/kernel$", OUT),
    (r"(ff/net_0/proj|mlp/fc1|_embedding/linear_1)/bias$", VECTOR),
    (r"(ff/net_2|mlp/fc2|_embedding/linear_2)/kernel$", IN),
    # Residual blocks of the UNet and of the autoencoder, by the channels between their two convolutions.
    (r"resnets_\d+/conv1/kernel$", CONV_OUT),
    (r"resnets_\d+/time_emb_proj/kernel$", OUT),
    (r"resnets_\d+/(conv1|time_emb_proj)/bias$", VECTOR),
    (r"resnets_\d+/norm2/(scale|bias)$", VECTOR),
    (r"resnets_\d+/conv2/kernel$", CONV_IN),
    # Tables of the text encoders, by features.
    (r"(token|position)_embedding/embedding$", OUT),
)


def make_mesh(data: int, fsdp: int, tensor: int = 1) -> Mesh:
    """Build a mesh with the axes `data`, `fsdp` and `tensor` over the first data x fsdp x tensor devices.

    data: -1 for all devices / (fsdp x tensor). Raises ValueError if there are too few devices, if fsdp x tensor does
    not divide their number, or if `tensor`, whose devices share their rows of a batch, reaches over several processes.
    """
    devices = jax.devices()
    rest = data == -1
    if rest:
        data = len(devices) // max(fsdp * tensor, 1)
    sizes = (data, fsdp, tensor)
    used = data * fsdp * tensor
    if min(sizes) < 1 or used > len(devices) or (rest and used < len(devices)):
        raise ValueError(
            f"mesh.data x mesh.fsdp x mesh.tensor is {data} x {fsdp} x {tensor} and there are {len(devices)} devices; "
            f"set mesh.fsdp x mesh.tensor to a divisor of that, and mesh.data=-1 to use the rest"
        )
    if jax.process_count() > 1 and used < len(devices):
        raise ValueError(
            f"mesh.data x mesh.fsdp x mesh.tensor is {data} x {fsdp} x {tensor}, which leaves devices of "
            f"{jax.process_count()} processes unused; set mesh.data=-1 to use all {len(devices)}"
        )
    mesh = jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:used])
    if any(len({device.process_index for device in row}) > 1 for row in mesh.devices.reshape(-1, tensor)):
        raise ValueError(
            f"mesh.tensor {tensor} reaches over several processes, of {jax.local_device_count()} devices each; "
            f"use a divisor of that"
        )
    return mesh


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that keeps a full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_batch(mesh: Mesh) -> NamedSharding:
    """Return the sharding that splits the leading axis over `data` and `fsdp`; `tensor` has copies."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def batch_parts(sizes: Mapping[str, int]) -> int:
    """Return the number of parts that `by_batch` splits a batch into. sizes: devices along each axis of the mesh."""
    return sizes["data"] * sizes["fsdp"]


def tree_shardings(mesh: Mesh | AbstractMesh, tree: Any, over_fsdp: bool = True) -> Any:
    """Return a sharding for each leaf of `tree` (arrays or their shapes), by its path and its shape.

    Moving average, moments and gradients have paths that end in the parameter's, and so its sharding; statistics of
    another rank, such as factored ones, are split over `fsdp` alone, if they are large. over_fsdp: False for a copy on
    each device along `fsdp`.
    """

    def leaf(path, x) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, partition(name, x.shape, mesh.shape | ({} if over_fsdp else {"fsdp": 1})))

    return jax.tree_util.tree_map_with_path(leaf, tree)


def partition(path: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """Return the axes of the mesh that split each axis of an array; sizes: devices along each axis of the mesh.

    An axis whose size does not divide stays whole.
    """
    rules = (axes for pattern, axes in RULES if len(axes) == len(shape) and re.search(pattern, path))
    spec = list(next(rules, (None,) * len(shape)))
    fits = lambda axis, name: sizes[name] > 1 and shape[axis] % sizes[name] == 0  # noqa: E731
    spec = [name if name is not None and fits(axis, name) else None for axis, name in enumerate(spec)]
    free = [axis for axis, name in enumerate(spec) if name is None and fits(axis, "fsdp")]
    if free and np.prod(shape) >= MIN_SHARDED_SIZE:
        spec[max(free, key=lambda axis: shape[axis])] = "fsdp"
    return PartitionSpec(*spec) if any(spec) else PartitionSpec()


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Convert this process's rows of a batch to global arrays that are split over the mesh."""
    sharding = by_batch(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
