"""Parameters of a pipeline: on the device in the dtypes that its networks compute in, and exact, as they are stored."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lcm_jax.models.quantized import QUANTIZED_DTYPES, QuantizedKernel, cast_like, is_quantized, quantize_kernel
from lcm_jax.models.stable_diffusion import StableDiffusion, frozen_dtype
from lcm_jax.weights import naming, trees
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.model import StoredModel, read_params
from lcm_jax.weights.stored import get_specs

Path = tuple[str, ...]  # (network, module, ..., leaf)


def read_quantized(
    stored: StoredModel, model: StableDiffusion, put: Callable[[np.ndarray], Any], dtype: str
) -> dict[str, Any]:
    """Return the parameters by network, as `read_cast`, but kernels of the UNet and text encoders quantized.

    Each is quantized on the device from its stored numbers when it is read. dtype: int8 or fp8. Raises ModelError.
    """
    params = {}
    for name, abstract in model.abstract_params().items():
        tensors, cast, leaves = stored.tensors[name], frozen_dtype(model.dtype_of(name)), {}
        for path, key in trees.match_params(name, tensors, abstract, stored.name).items():
            array = naming.to_array(path, tensors[key])
            if is_quantized(path):
                leaves[path] = quantize_kernel(put(array), QUANTIZED_DTYPES[dtype])
            else:
                leaves[path] = put(array.astype(cast(array), copy=False))
        params[name] = unflatten_dict(leaves)
    return params


def read_cast(stored: StoredModel, model: StableDiffusion, put: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    """Return the parameters by network, each cast as it is read to the dtype that `frozen_dtype` gives, and placed.

    A program then casts nothing. put: array -> the leaf for it. Raises ModelError.
    """
    abstract = model.abstract_params()
    return {
        name: read_params(stored, name, abstract[name], frozen_dtype(model.dtype_of(name)), put)
        for name in model.networks
    }


def put_on(device: jax.sharding.Sharding | None) -> Callable[[np.ndarray], jax.Array]:
    """Return array -> a copy of it on the device, or on the default one; no program is compiled for it."""

    def put(array: np.ndarray) -> jax.Array:
        # On a CPU the device uses the very array, which must not be the mapped file, since others may change that.
        return jax.device_put(array if array.flags.owndata else np.array(array), device)

    return put


@dataclass(frozen=True)
class ExactLeaf:
    """A parameter of this shape in its stored dtype; an array of it is made when NumPy needs one."""

    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], Any]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.make()).astype(self.dtype if dtype is None else dtype, copy=False)


class Originals:
    """The parameters as they are stored, for sums and for files, which must not lose a bit.

    Those that are held in a wider dtype are cast back. Those that are held in a narrower one, or quantized, are read
    from the files of the model again, where they must still be.
    """

    def __init__(self, stored: StoredModel, params: Mapping[str, Any]):
        """params: by network, of `read_cast`."""
        self._name = stored.name
        self.dtypes: dict[Path, np.dtype] = {}
        self._narrowed: dict[Path, tuple[Mapping[str, np.ndarray], str]] = {}  # the tensors with it, and its key
        for network, tree in params.items():
            tensors = stored.tensors[network]
            leaves: dict[Path, Any] = flatten_dict(tree)
            specs = get_specs(tensors)
            for path, key in trees.match_params(network, tensors, tree, stored.name).items():
                place, dtype = (network, *path), specs[key].dtype
                self.dtypes[place] = dtype
                leaf = leaves[path]
                if isinstance(leaf, QuantizedKernel) or jnp.promote_types(dtype, leaf.dtype) != leaf.dtype:
                    self._narrowed[place] = (tensors, key)

    def of(self, path: Path, leaf: jax.Array | QuantizedKernel) -> jax.Array:
        """Return the number that `leaf` was cast from, exactly, in the stored dtype or a wider one, where the leaf is.

        Raises ModelError if it has to be read, and the file is gone or has another number.
        """
        if path not in self._narrowed:
            return leaf  # pyright: ignore[reportReturnType]
        tensors, key = self._narrowed[path]
        try:
            array = np.array(naming.to_array(path, tensors[key]))
        except OSError as error:
            raise ModelError(f"{key} of {self._name} cannot be read again ({error}); open the model again") from error
        same = lambda one, other: np.asarray(one).tobytes() == np.asarray(other).tobytes()  # noqa: E731
        if not all(jax.tree.leaves(jax.tree.map(same, cast_like(array, leaf), leaf))):
            raise ModelError(f"{key} of {self._name} has changed since it was read; open the model again")
        return jax.device_put(array, jax.tree.leaves(leaf)[0].sharding)

    def exact(self, params: Mapping[str, Any], sums: Mapping[Path, Callable[[], jax.Array]]) -> dict[str, Any]:
        """Return a tree of ExactLeaf like `params`: what was read, and by path the sums that took its place."""

        def leaf(network: str, path: Any, array: jax.Array) -> ExactLeaf:
            place = (network, *(part.key for part in path))
            return ExactLeaf(self.dtypes[place], array.shape, sums.get(place, partial(self.of, place, array)))

        whole = lambda node: isinstance(node, QuantizedKernel)  # noqa: E731
        exact = lambda name, tree: jax.tree_util.tree_map_with_path(partial(leaf, name), tree, is_leaf=whole)  # noqa: E731
        return {name: exact(name, tree) for name, tree in params.items()}

    def __getstate__(self) -> dict[str, Any]:
        """Return the state with the arrays in place of their files, which cannot be pickled."""
        arrays = {path: ({key: np.array(tensors[key])}, key) for path, (tensors, key) in self._narrowed.items()}
        return self.__dict__ | {"_narrowed": arrays}
