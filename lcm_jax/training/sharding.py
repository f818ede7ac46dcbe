"""The device mesh and the shardings of a run's arrays."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MIN_SHARDED_SIZE = 2**14  # smaller arrays cost more to gather than they save


def make_mesh(data: int, fsdp: int) -> Mesh:
    """Build a mesh with the axes `data` and `fsdp` over the first data x fsdp devices.

    data: -1 for all devices / fsdp. Raises ValueError if there are too few devices, or fsdp does not divide their
    number.
    """
    devices = jax.devices()
    rest = data == -1
    if rest:
        data = len(devices) // max(fsdp, 1)
    used = data * fsdp
    if data < 1 or fsdp < 1 or used > len(devices) or (rest and used < len(devices)):
        raise ValueError(
            f"mesh.data x mesh.fsdp is {data} x {fsdp} and there are {len(devices)} devices; "
            f"set mesh.fsdp to a divisor of that, at most {len(devices)}, and mesh.data=-1 to use the rest"
        )
    if jax.process_count() > 1 and used < len(devices):
        raise ValueError(
            f"mesh.data x mesh.fsdp is {data} x {fsdp}, which leaves devices of {jax.process_count()} processes "
            f"unused; set mesh.data=-1 to use all {len(devices)}"
        )
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices[:used])


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that keeps a full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_batch(mesh: Mesh) -> NamedSharding:
    """Return the sharding that splits the leading axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """Return a sharding for each leaf of `tree` (arrays or their shapes), which splits its largest divisible axis.

    The rule depends on shapes alone, so that parameters, their moving average and Adam's moments agree.
    """
    fsdp = mesh.shape["fsdp"]

    def leaf(x) -> NamedSharding:
        divisible = [axis for axis in range(x.ndim) if x.shape[axis] % fsdp == 0]
        if fsdp == 1 or x.size < MIN_SHARDED_SIZE or not divisible:
            return replicated(mesh)
        largest = max(divisible, key=lambda axis: x.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*(["fsdp" if axis == largest else None for axis in range(x.ndim)])))

    return jax.tree.map(leaf, tree)


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Convert this process's rows of a batch to global arrays that are split over the mesh."""
    sharding = by_batch(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
