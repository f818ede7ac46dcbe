"""The one naming rule between PyTorch's keys and parameter trees, for every network of diffusers and transformers here.

1. `a.0.b` <-> a_0/b. 2. The leaf `weight` becomes `kernel` (2-D, 4-D, 5-D), `scale` (1-D) or `embedding` (tables).
3. Kernels are transposed: OIHW -> HWIO, OI -> IO, OITHW -> THWIO. Before these, `modern_key` for what was published
under other names.
"""

import re

import numpy as np

# Names that end in a number of their own, which is not a list index.
NUMBERED = re.compile(r"linear_\d+|branch\w+_\d+")
NUMBERED_LISTS = ("adapter_1", "layer_1")  # such a name that is a list: Mask2Former's layer_1.0
INDEXED = re.compile(r"(.+)_(\d+)")
# The attention of the autoencoder had other names when Stable Diffusion 1.x was published.
OLD_VAE_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def modern_key(name: str, key: str) -> str | None:
    """Return the present name of a published key, or None for what is not a parameter."""
    if name.startswith("text_encoder"):
        if key.endswith("position_ids"):
            return None
        return key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}"
    if name == "vae" and (match := re.fullmatch(r"(.*mid_block\.attentions\.0)\.(\w+)\.(weight|bias)", key)):
        block, layer, leaf = match.groups()
        return f"{block}.{OLD_VAE_NAMES.get(layer, layer)}.{leaf}"
    return key


def is_table(parent: str) -> bool:
    return parent.endswith("_embedding") and parent != "time_embedding"


def to_path(key: str, ndim: int) -> tuple[str, ...]:
    """Return the path in the parameter tree of a PyTorch key and the tensor's rank."""
    path: list[str] = []
    for part in key.split("."):
        if part.isdigit() and path:
            path[-1] += f"_{part}"
        else:
            path.append(part)
    if path[-1] == "weight":
        table = ndim == 2 and len(path) > 1 and is_table(path[-2])  # `patch_embedding`, 4-D, is a convolution
        path[-1] = "scale" if ndim == 1 else "embedding" if table else "kernel"
    return tuple(path)


def to_key(path: tuple[str, ...]) -> str:
    """Return the PyTorch key of a path, the inverse of `to_path`."""
    parts: list[str] = []
    for name in path[:-1]:
        indices: list[str] = []
        while (match := INDEXED.fullmatch(name)) and not NUMBERED.fullmatch(name):
            if indices and name in NUMBERED_LISTS:
                break
            name, index = match.groups()
            indices.insert(0, index)
        parts += [name, *indices]
    leaf = "weight" if path[-1] in ("kernel", "scale", "embedding") else path[-1]
    return ".".join([*parts, leaf])


def tensor_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> list[int]:
    """Return the shape of one of our arrays in PyTorch's layout."""
    if path[-1] != "kernel":
        return list(shape)
    return [shape[-1], shape[-2], *shape[:-2]]


def to_array(path: tuple[str, ...], tensor: np.ndarray) -> np.ndarray:
    """Return a tensor in our layout, a view."""
    if path[-1] != "kernel":
        return tensor
    return tensor.transpose(*range(2, tensor.ndim), 1, 0)


def to_tensor(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    """Return an array in PyTorch's layout, contiguous."""
    if path[-1] == "kernel":
        array = array.transpose(-1, -2, *range(array.ndim - 2))
    return np.asarray(array, order="C")
