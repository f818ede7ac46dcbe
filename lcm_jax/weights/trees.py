"""Convert tensors by PyTorch name, as every format stores them, to and from the parameter trees of our networks."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lcm_jax.weights import naming
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.stored import Tensors, get_specs, placeholder
from lcm_jax.weights.stored import cast as cast_tensors

DTYPES = ("float32", "bfloat16", "float16")
Params = dict[str, Any]


def match_params(
    name: str, tensors: Mapping[str, np.ndarray], abstract: Params, where: str = ""
) -> dict[tuple[str, ...], str]:
    """Return the key of each parameter of `abstract`, by its path; only shapes and dtypes of `tensors` are used.

    Raises ModelError of two lines: how many keys are missing, extra, or of another shape or dtype, and some of each.
    """
    parameters: dict[tuple[str, ...], Any] = flatten_dict(abstract)
    wanted = {path: tuple(leaf.shape) for path, leaf in parameters.items()}
    specs = get_specs(tensors)
    keys: dict[tuple[str, ...], str] = {}
    extra = []
    for key in tensors:
        modern = naming.modern_key(name, key)
        if modern is None:
            continue
        path = naming.to_path(modern, specs[key].ndim)
        if path in wanted and path not in keys:
            keys[path] = key
        else:
            extra.append(f"+ {key} {specs[key].dtype.name}{list(specs[key].shape)}")
    missing = [f"- {naming.to_key(path)}" for path in wanted if path not in keys]
    other = []
    for path, key in keys.items():
        spec = specs[key]
        if naming.to_array(path, spec).shape != wanted[path]:
            expected = naming.tensor_shape(path, wanted[path])
            other.append(f"! {naming.to_key(path)} {list(spec.shape)}, which should be {expected}")
        elif spec.dtype.name not in DTYPES:
            other.append(f"! {naming.to_key(path)} {spec.dtype.name}, which is not one of {', '.join(DTYPES)}")
    if missing or extra or other:
        raise ModelError(
            f"{name}{f' of {where}' if where else ''}: the weights do not fit the network ({len(missing)} keys "
            f"missing -, {len(extra)} extra +, {len(other)} of another shape or dtype !); use weights and, if the "
            "network has one, config.json of the same model\n" + "; ".join(some(missing) + some(extra) + some(other))
        )
    return keys


def to_params(
    name: str,
    tensors: Mapping[str, np.ndarray],
    abstract: Params,
    where: str = "",
    cast: Callable[[np.ndarray], Any] | None = None,
    put: Callable[[np.ndarray], Any] | None = None,
) -> Params:
    """Tensors by PyTorch name -> a tree shaped like `abstract` (arrays or ShapeDtypeStructs) of arrays in our layout.

    Each tensor is read when it is converted, and arrays that need no change are views. cast: array -> the dtype for
    it; by default the stored one. put: array -> the leaf for it, such as an array on a device. Raises ModelError as
    `match_params`, before anything is read.
    """
    params = {}
    for path, key in match_params(name, tensors, abstract, where).items():
        array = naming.to_array(path, tensors[key])
        if cast is not None:
            with np.errstate(over="ignore"):
                array = array.astype(cast(array), copy=False)
        params[path] = array if put is None else put(array)
    return unflatten_dict(params)


def some(problems: list[str], max_shown: int = 5) -> list[str]:
    """Return the first of them in alphabetical order, and how many more there are."""
    more = [f"{len(problems) - max_shown} more {problems[0][0]}"] if len(problems) > max_shown else []
    return sorted(problems)[:max_shown] + more


def from_params(params: Params, dtype: str | None = None) -> Tensors:
    """Return the tensors of a parameter tree by PyTorch name, the inverse of `to_params`.

    Each is converted when it is used, in its own dtype or cast to `dtype`. Raises ModelError for another dtype than
    float32, bfloat16, float16, or if a finite number overflows in it.
    """
    if dtype not in (None, *DTYPES):
        raise ModelError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    arrays: dict[tuple[str, ...], Any] = flatten_dict(params)
    leaves = {naming.to_key(path): (path, leaf) for path, leaf in arrays.items()}
    shape_of = lambda path, leaf: tuple(naming.tensor_shape(path, leaf.shape))  # noqa: E731
    specs = {key: placeholder(leaf.dtype, shape_of(path, leaf)) for key, (path, leaf) in leaves.items()}
    tensors = Tensors(specs, lambda key: naming.to_tensor(leaves[key][0], np.asarray(leaves[key][1])))
    return tensors if dtype is None else cast_tensors(tensors, dtype)
