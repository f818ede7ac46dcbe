"""LoRAs on the device beside the parameters that they change, each with a weight that can be changed at any time."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lcm_jax.models.lora import add_updates
from lcm_jax.models.quantized import cast_like
from lcm_jax.sampling.parameters import Originals
from lcm_jax.weights import naming
from lcm_jax.weights.errors import ModelError, overflowing
from lcm_jax.weights.lora import Updates
from lcm_jax.weights.lora_files import to_adapter

KernelPath = tuple[str, ...]  # (network, module, ..., "kernel")


class LowRank(NamedTuple):
    """An update of a kernel on the device: down and up as in models/lora.py, and scale, alpha / rank."""

    down: jax.Array
    up: jax.Array
    scale: float


Adapter = dict[KernelPath, LowRank]


def adapt(
    params: Mapping[str, Any],
    bases: Mapping[KernelPath, jax.Array],
    adapters: Mapping[str, tuple[Adapter, float]],
    originals: Originals,
) -> tuple[dict[str, Any], dict[KernelPath, jax.Array]]:
    """Return (parameters that were read plus every adapter at its weight, the kernels that they were added to).

    params: by network, with other adapters added to the kernels `bases`. Sums are rounded to the stored dtype, as a
    model that is written with its LoRAs has them, and then cast or quantized as all parameters are. Raises ModelError
    for a weight that is not finite, for kernels with NaN or infinity, and for sums that overflow.
    """
    for name, (_, weight) in adapters.items():
        if not np.isfinite(weight):
            raise ModelError(f"the weight of LoRA {name!r} is {weight}; use a finite number")
    flat: dict[KernelPath, Any] = flatten_dict(params)
    flat |= {path: cast_like(base, flat[path]) for path, base in bases.items()}
    changed = {
        path: bases[path] if path in bases else originals.of(path, flat[path])
        for each, _ in adapters.values()
        for path in each
    }
    merged, finite = {}, {}
    for path, kernel in changed.items():
        total, finite[path] = _merge_kernel(kernel, updates_of(path, adapters), originals.dtypes[path])
        merged[path] = cast_like(total, flat[path])
    _check_sums(jax.device_get(finite), originals.dtypes)
    return unflatten_dict(flat | merged), changed


def sums(
    bases: Mapping[KernelPath, jax.Array], adapters: Mapping[str, tuple[Adapter, float]], originals: Originals
) -> dict[KernelPath, Callable[[], jax.Array]]:
    """Return by path what computes the sums of `adapt` in their stored dtype."""
    merge = lambda path, kernel: _merge_kernel(kernel, updates_of(path, adapters), originals.dtypes[path])[0]  # noqa: E731
    return {path: partial(merge, path, kernel) for path, kernel in bases.items()}


def updates_of(path: KernelPath, adapters: Mapping[str, tuple[Adapter, float]]) -> list[tuple]:
    """Return (down, up, scale) of every adapter that changes the kernel."""
    found = [(each[path], weight) for each, weight in adapters.values() if path in each]
    return [(low.down, low.up, np.float32(weight * low.scale)) for low, weight in found]


@partial(jax.jit, static_argnames="dtype")
def _merge_kernel(kernel: jax.Array, updates: list, dtype: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Return the sum in `dtype`, and a bool[] each for kernel and sum that is True if it is finite.

    There is one program for each shape.
    """
    total = add_updates(kernel, updates).astype(dtype)
    return total, (jnp.isfinite(kernel).all(), jnp.isfinite(total).all())


def put_updates(updates: Updates, params: Mapping[str, Any]) -> Adapter:
    """Return the updates on the device, by the path of the kernel that each changes."""
    placed = {}
    for component, each in updates.items():
        for module, update in each.items():
            path, adapter = to_adapter(module, update, params[component])
            down, up = (jnp.array(adapter[name], copy=True) for name in ("down", "up"))
            placed[component, *path, "kernel"] = LowRank(down, up, update.scale)
    return placed


def _check_sums(finite: Mapping[KernelPath, tuple], dtypes: Mapping[KernelPath, np.dtype]) -> None:
    """Raise ModelError for kernels that are not finite, and for sums that overflow in a kernel's stored dtype."""
    key_of = lambda path: f"{path[0]}.{naming.to_key(path[1:])}"  # noqa: E731
    bad: dict[str, list[str]] = {}  # by dtype
    for path, (before, after) in finite.items():
        if not before:
            raise ModelError(f"{key_of(path)} of the model contains NaN or infinity; use another model")
        if not after:
            bad.setdefault(dtypes[path].name, []).append(key_of(path))
    for dtype, keys in bad.items():
        raise overflowing(keys, dtype, "use a smaller weight, or a model in bfloat16 or float32")
