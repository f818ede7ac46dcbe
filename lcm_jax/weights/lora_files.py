"""Adapters of a UNet (models/lora.py) as LoRA files: what a run exports, and what it may begin from."""

from collections.abc import Mapping
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax.traverse_util import unflatten_dict

from lcm_jax.models import lora as adapter_trees
from lcm_jax.models.lora import LoRASettings
from lcm_jax.weights import lora as loras
from lcm_jax.weights import naming, trees
from lcm_jax.weights.diffusers_folder import new_folder
from lcm_jax.weights.errors import ModelError, overflowing
from lcm_jax.weights.layout import LORA_FILE
from lcm_jax.weights.lora import KOHYA_FILE, LoRA, Update, Updates, some
from lcm_jax.weights.preset import Preset
from lcm_jax.weights.stored import placeholder, raw_bytes, write_safetensors
from lcm_jax.weights.trees import Params

# ---- trees and updates ----------------------------------------------------------------------------------------------


def to_updates(adapters: Params, alpha: float) -> dict[str, Update]:
    """Return the update of each module by diffusers' name, in PyTorch's layout and the adapters' dtypes."""
    updates = {}
    for path, each in adapter_trees.modules(adapters).items():
        kernel = (*path, "kernel")
        down, up = naming.to_tensor(kernel, np.asarray(each["down"])), naming.to_tensor(kernel, np.asarray(each["up"]))
        up = up.reshape(*up.shape, *(1,) * (down.ndim - 2))
        updates[naming.to_key(kernel).removesuffix(".weight")] = Update(down, up, np.asarray(alpha, np.float32))
    return updates


def to_adapters(updates: Mapping[str, Update], params: Params) -> Params:
    """Return the adapters of a network, the inverse of `to_updates`; `to_adapter` has the arguments."""
    return unflatten_dict(dict(to_adapter(module, update, params) for module, update in updates.items()))


def to_adapter(module: str, update: Update, params: Params) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Return (path, {"down", "up"}) of the adapter of one module, views in the dtypes of the update.

    params: of the network, of which only shapes are used; the update must fit them (`lora.check`).
    """
    path, rank = naming.to_path(f"{module}.weight", update.down.ndim)[:-1], len(update.down)
    kernel = (*path, "kernel")
    module_params: Any = reduce(getitem, path, params)
    if "kernel" not in module_params:
        raise ModelError(f"{module} is neither a linear layer nor a convolution; use a LoRA without it")
    leaf = module_params["kernel"]
    # A 1 x 1 convolution may be stored as a matrix, and the other way around.
    shape = naming.tensor_shape(kernel, leaf.shape)
    down = naming.to_array(kernel, update.down.reshape(rank, *shape[1:]))
    return path, {"down": down, "up": update.up.reshape(-1, rank).T}


# ---- files ----------------------------------------------------------------------------------------------------------


def write_adapters(
    folder: Path,
    adapters: Params,
    alpha: float,
    dtype: str = "float32",
    overwrite: bool = False,
    preset: Preset | None = None,
) -> None:
    """Write the adapters of a UNet to `folder` in both namings, all or nothing, and compare what is read back.

    pytorch_lora_weights.safetensors is for diffusers' load_lora_weights, kohya.safetensors for the programs that read
    kohya's naming. dtype: of the files: float32, bfloat16 or float16. preset: of a model with the adapters, for the
    metadata of both files. Raises ModelError for NaN, for numbers that
    overflow in dtype, and if `folder` has content, unless overwrite is True and it is of a LoRA or a model.
    """
    if dtype not in trees.DTYPES:
        raise ModelError(f"dtype is {dtype!r}; choose one of {', '.join(trees.DTYPES)}")
    lora = LoRA({"unet": cast(to_updates(adapters, alpha), dtype)}, {} if preset is None else preset.to_metadata())
    with new_folder(folder, overwrite) as temporary:
        for name, (tensors, metadata) in {LORA_FILE: loras.to_peft(lora), KOHYA_FILE: loras.to_kohya(lora)}.items():
            write_safetensors(temporary / name, tensors, metadata)
            verify(temporary / name, lora)


def cast(updates: dict[str, Update], dtype: str) -> dict[str, Update]:
    """Return the updates with down and up in dtype. Raises ModelError for those with NaN or infinity."""
    infinite = lambda updates: [m for m, (down, up, _) in updates.items() if not is_finite(down) or not is_finite(up)]  # noqa: E731
    if bad := infinite(updates):
        raise ModelError(f"adapters of {some(bad)} have NaN or infinity, their training has diverged; train them again")
    wanted = np.dtype(getattr(ml_dtypes, dtype, dtype))
    with np.errstate(over="ignore"):
        changed = {m: Update(down.astype(wanted), up.astype(wanted), alpha) for m, (down, up, alpha) in updates.items()}
    if bad := infinite(changed):
        raise overflowing(bad, dtype, "use bfloat16 or float32")
    return changed


def is_finite(tensor: np.ndarray) -> bool:
    return bool(np.isfinite(tensor.astype(np.float32)).all())


def verify(path: Path, lora: LoRA) -> None:
    """Raise ModelError unless the file has the updates of `lora`, bit-exact."""
    shapes = {
        component: {f"{m}.weight": placeholder("float32", (len(u.up), *u.down.shape[1:])) for m, u in updates.items()}
        for component, updates in lora.updates.items()
    }
    found, expected = flat(loras.open_lora(path, shapes).updates), flat(lora.updates)
    wrong = [name for name in expected | found if found.get(name) != expected.get(name)]
    if wrong:
        raise ModelError(f"verification of {path.name} failed for {some(wrong)}; nothing was kept, write it again")


def flat(updates: Updates) -> dict[str, list]:
    """Return the dtype, shape and bytes of all tensors by component and module."""
    describe = lambda tensor: None if tensor is None else (tensor.dtype, tensor.shape, bytes(raw_bytes(tensor)))  # noqa: E731
    return {
        f"{c}.{m}": [describe(tensor) for tensor in update] for c, each in updates.items() for m, update in each.items()
    }


def read_adapters(path: str | Path, params: Params, settings: LoRASettings, family: str = "sd1") -> Params:
    """Read a LoRA in either naming as float32 adapters of a UNet, on the host, to train them further.

    path: any name of `lora.find_file`. params: of the UNet, of which only shapes are used. family: sd1, sd2 or sdxl.
    Raises ModelError for a LoRA of another model, one that changes text encoders too, and one whose rank, alpha or
    modules differ from the settings.
    """
    tensors, metadata = loras.read_file(Path(path))
    if other := [key for key in tensors if key.startswith(("lora_te", "text_encoder", "text_model"))]:
        raise ModelError(
            f"{path} changes a text encoder ({other[0]}), which is not trained; use a LoRA of a UNet alone"
        )
    try:
        updates = loras.read_lora(tensors, metadata, {"unet": trees.from_params(params).specs}, family).updates["unet"]
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    for module, update in updates.items():
        rank, scale = len(update.down), update.scale
        if rank != settings.rank:
            raise ModelError(f"{path} has rank {rank} in {module}, and lora.rank is {settings.rank}; set both the same")
        if not np.isclose(scale, settings.scale, rtol=1e-6):
            alpha = f"alpha {scale * rank:g} in {module}, and lora.alpha is {settings.alpha:g}"
            raise ModelError(f"{path} has {alpha}; set both the same")
    wanted = {adapter_trees.module_name(path) for path in adapter_trees.target_paths(params, settings)}
    for names, verb in ((wanted - updates.keys(), "lacks"), (updates.keys() - wanted, "has also")):
        if names:
            raise ModelError(
                f"{path} {verb} {len(names)} of the modules of lora.targets: {some(sorted(names))}; "
                "set lora.targets to the modules that the LoRA has"
            )
    cast_all = {m: Update(u.down.astype(np.float32), u.up.astype(np.float32), u.alpha) for m, u in updates.items()}
    return to_adapters(cast_all, params)
