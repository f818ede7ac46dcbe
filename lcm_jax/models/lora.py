"""Low-rank adapters, y = W x + (alpha / rank) up(down(x)) (arXiv 2106.09685), as trees of parameters.

A tree of adapters is nested like the parameters of its network, and each adapted module has two arrays: down,
[in, rank] or [kh, kw, in, rank] for a convolution, and up, [rank, out]. They are merged into the kernels, or applied
while the network is computed, which leaves the network and its parameters as they are.
"""

import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lcm_jax.models.layers import Conv
from lcm_jax.ranges import ABOVE_ZERO, DECAY, POSITIVE, check_fields, setting

Path = tuple[str, ...]
Tree = Any

# The modules of a UNet that LCM-LoRA adapts (arXiv 2311.05556).
DEFAULT_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)


@dataclass(frozen=True)
class LoRASettings:
    """The group `lora` of a config.

    Updates are scaled by alpha / rank. targets: diffusers' names of modules, whole or from a dot on, as PEFT's
    target_modules. dropout: probability with which an adapter, while it is trained, does not see a number of its input.
    Raises ValueError for values out of range.
    """

    rank: int = setting(64, POSITIVE)
    alpha: float = setting(64.0, ABOVE_ZERO)
    targets: tuple[str, ...] = DEFAULT_TARGETS
    dropout: float = setting(0.0, DECAY)

    def __post_init__(self):
        check_fields(self, "lora")
        names = self.targets
        if not isinstance(names, tuple | list) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"lora.targets {names!r} is not supported; use module names, such as ('to_q', 'to_v')")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


# ---- trees ----------------------------------------------------------------------------------------------------------


def module_name(path: Path) -> str:
    """Return diffusers' name of a module: ("attn1", "to_out_0") -> "attn1.to_out.0"."""
    return re.sub(r"(?<!linear)_(\d+)(?=\.|$)", r".\1", ".".join(path))


def kernels(params: Tree) -> dict[Path, Any]:
    """Return the kernels of a network, arrays or ShapeDtypeStructs, by the path of their module."""
    return {path[:-1]: leaf for path, leaf in flatten_dict(params).items() if path[-1] == "kernel"}


def modules(adapters: Tree) -> dict[Path, dict[str, Any]]:
    """Return {"down", "up"} of each adapted module, by its path."""
    each: dict[Path, Any] = flatten_dict(adapters, is_leaf=lambda _, value: value.keys() == {"down", "up"})
    return each


def count(adapters: Tree) -> int:
    """Return the number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(adapters))


def target_paths(params: Tree, settings: LoRASettings) -> list[Path]:
    """Return the paths of the modules that the targets match, in the order of `params`.

    params: of one network, arrays or ShapeDtypeStructs. Raises ValueError for a target that matches no module, and for
    a rank above the width of a layer.
    """
    shapes = {path: kernel.shape for path, kernel in kernels(params).items()}
    names = {path: module_name(path) for path in shapes}
    matches = lambda name, target: name == target or name.endswith(f".{target}")  # noqa: E731
    for target in settings.targets:
        if not any(matches(name, target) for name in names.values()):
            kinds = sorted({re.sub(r".*\.(?=[^.]*[^.\d])", "", name) for name in names.values()})
            raise ValueError(f"lora.targets {target!r} matches no module; use some of {', '.join(kinds)}")
    found = [path for path, name in names.items() if any(matches(name, target) for target in settings.targets)]
    widths = {path: min(int(np.prod(shapes[path][:-1])), shapes[path][-1]) for path in found}
    narrowest = min(found, key=widths.__getitem__)
    if settings.rank > widths[narrowest]:
        raise ValueError(
            f"lora.rank {settings.rank} is above the width of {names[narrowest]}; use at most {widths[narrowest]}, "
            "or other lora.targets"
        )
    return found


def init(rng: jax.Array, params: Tree, settings: LoRASettings) -> Tree:
    """Return float32 adapters that change nothing yet: down as PEFT draws it, up zero. Raises as `target_paths`.

    Each module's numbers depend on rng and its path alone. params: of one network, of which only shapes are used.
    """
    all_kernels, adapters = kernels(params), {}
    for path in target_paths(params, settings):
        *inner, out = all_kernels[path].shape
        bound = float(np.prod(inner)) ** -0.5  # Kaiming's uniform distribution with a = sqrt(5)
        key, shape = jax.random.fold_in(rng, number_of(path)), (*inner, settings.rank)
        adapters[path] = {
            "down": jax.random.uniform(key, shape, jnp.float32, -bound, bound),
            "up": jnp.zeros((settings.rank, out), jnp.float32),
        }
    return unflatten_dict(adapters)


def number_of(path: Path) -> int:
    """Return 32 bits of a path that are the same in every process, to make random keys of."""
    return zlib.crc32("/".join(path).encode())


# ---- merging --------------------------------------------------------------------------------------------------------


def add_updates(kernel: jax.Array, updates: Iterable[tuple[jax.Array, jax.Array, Any]]) -> jax.Array:
    """Return the kernel plus scale * down up of each (down, up, scale), summed in float32 and rounded once."""
    total = kernel.astype(jnp.float32)
    for down, up, scale in updates:
        product = jnp.tensordot(down.astype(jnp.float32), up.astype(jnp.float32), 1, precision="highest")
        total = total + scale * product
    return total.astype(kernel.dtype)


def merge(params: Tree, adapters: Tree, scale: float) -> Tree:
    """Return the parameters of a network with its adapters merged in; other leaves are those of `params`."""
    leaves: dict[Path, Any] = flatten_dict(params)
    for path, each in modules(adapters).items():
        place = (*path, "kernel")
        leaves[place] = add_updates(leaves[place], [(each["down"], each["up"], scale)])
    return unflatten_dict(leaves)


# ---- applying -------------------------------------------------------------------------------------------------------


@contextmanager
def applied(adapters: Tree, scale: float, dropout: float = 0.0, keys: jax.Array | None = None) -> Iterator[None]:
    """Add the adapters' outputs to those of their modules, for a network that is computed or traced in this context.

    y = W x + scale * up(down(x)) in the compute dtype of the module, so that small updates of a network in bfloat16 are
    not lost in the rounding of W. keys: key[B], one for each example, for the dropout of x; not used if dropout is 0.
    The network must be called in the context itself: a compiled program has no adapters but those it was traced with.
    Raises ValueError if no module of an adapter's name was called, and for keys of another batch.
    """
    if not dropout:
        keys = None
    elif keys is None:
        raise ValueError(f"lora.dropout {dropout} needs random keys, one for each example; pass keys, or dropout=0")
    each, called = modules(adapters), set()

    def add(call, args, kwargs, context):
        output, module = call(*args, **kwargs), context.module
        if not isinstance(module, nn.Dense | Conv) or context.method_name != "__call__" or module.path not in each:
            return output
        called.add(module.path)
        down, up = (each[module.path][name].astype(output.dtype) for name in ("down", "up"))
        x = args[0].astype(output.dtype)
        if keys is not None:
            x = drop(x, dropout, keys, module.path)
        low = module.convolve(x, down) if isinstance(module, Conv) else x @ down
        return output + jnp.asarray(scale, output.dtype) * jnp.tensordot(low, up, 1)

    with nn.intercept_methods(add):
        yield
    if unused := each.keys() - called:
        some = ", ".join(sorted(map(module_name, unused))[:3])
        raise ValueError(f"{len(unused)} of {len(each)} adapters are of modules that were not called: {some}")


def drop(x: jax.Array, rate: float, keys: jax.Array, path: Path) -> jax.Array:
    """Return x: [B, ...] with zeros at that rate, the rest scaled up; keys: key[B], the same for any batch."""
    if len(keys) != len(x):
        raise ValueError(f"dropout has {len(keys)} keys for a batch of {len(x)}; pass one for each example")
    draw = lambda key: jax.random.bernoulli(jax.random.fold_in(key, number_of(path)), 1 - rate, x.shape[1:])  # noqa: E731
    return jnp.where(jax.vmap(draw)(keys), x / (1 - rate), 0).astype(x.dtype)
