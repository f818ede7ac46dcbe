"""ControlNets as they are published: a diffusers folder, or a single file in its authors' layout or in diffusers'.

The authors' layout, which A1111 and ComfyUI read, has the names of the UNet's way down in single_file.py under the
prefix `control_model.`, and three of its own: `input_hint_block` (features of the control image), `zero_convs` and
`middle_block_out` (the residuals). Some files have these without the prefix; the first ones have a whole Stable
Diffusion beside them, which is left out. SDXL's ControlNets are published with the keys of diffusers; written in the
authors' layout, they have `label_emb` as a UNet of SDXL has.
"""

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lcm_jax.models.controlnet import NAME, ControlNet, check_fit
from lcm_jax.models.layers import Dtype
from lcm_jax.models.stable_diffusion import StableDiffusion, frozen_dtype
from lcm_jax.weights import diffusers_folder as folders
from lcm_jax.weights import hub, layout, trees
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.model import StoredModel
from lcm_jax.weights.single_file import count, count_layers, down_names, rename, some
from lcm_jax.weights.single_file_configs import one
from lcm_jax.weights.single_file_family import first, has
from lcm_jax.weights.stored import Tensors, get_specs

COMPONENT = "controlnet"  # in a StoredModel, of which it is the only one
FILE = "diffusion_pytorch_model"
PREFIX = "control_model."
LDM, DIFFUSERS = "input_hint_block.0.weight", "controlnet_cond_embedding.conv_in.weight"  # keys that mark a layout
# Keys of what is not a ControlNet, but has such keys.
OTHERS = {
    "lora_controlnet": "a Control-LoRA",
    "difference": "the difference of a ControlNet and a UNet",
    "task_embedding": "a union of ControlNets",
    "control_add_embedding.linear_1.weight": "a union of ControlNets",
}
# Options that no file records: a UNet that it belongs to has precedence over the published values.
GUESSED = frozenset({"norm_num_groups", "attention_head_dim", "num_attention_heads", "upcast_attention"})
GUESSED_XL = GUESSED | {"addition_time_embed_dim"}


# ---- opening --------------------------------------------------------------------------------------------------------


def is_controlnet(name: str | Path, variant: str | None = None) -> bool:
    """Return True for the file, folder or hub id of a ControlNet; a hub id is downloaded. Raises ModelError."""
    path = Path(name)
    if path.is_file():
        tensors = folders.open_file(path)[0]
        return has(tensors, PREFIX) or LDM in tensors or has(tensors, "controlnet_")
    folder = path
    if not path.exists() and hub.ID.fullmatch(str(name)):
        folder = layout.locate(name, variant, allow_single_network=True)
    is_network = folder.is_dir() and layout.is_component(folder)
    return is_network and layout.read_json(folder / "config.json").get("_class_name") == NAME


def open_controlnet(name: str | Path, variant: str | None = None) -> StoredModel:
    """Open a ControlNet in any format; the names of its tensors are read, and each tensor when it is used.

    name: a folder in diffusers layout, a hub id (`org/name`), or a .safetensors, .ckpt or .pth file. variant: of the
    weight files of a folder, such as `fp16`. Its only component is `controlnet`, and its family (sd1, sd2, sdxl) is
    that of the models that it belongs to, by its config. Raises ModelError.
    """
    path = Path(name)
    if path.is_file():
        return open_file(path)
    if not path.exists() and not hub.ID.fullmatch(str(name)):
        raise ModelError(f"there is no ControlNet {str(name)!r}; use a folder, a file, or a hub id such as org/name")
    folder = layout.locate(name, variant, allow_single_network=True)
    config_file = folder / "config.json"
    if (folder / "model_index.json").is_file():
        raise ModelError(
            f"{folder} is a whole model; use the folder of a ControlNet, which has a config.json at its top"
        )
    config = layout.read_json(config_file)
    if (kind := config.get("_class_name")) != NAME:
        raise ModelError(f"{config_file}: class {layout.shown(kind)} is not supported as a ControlNet; use a {NAME}")
    tensors = folders.open_tensors(folder, FILE, variant)
    return StoredModel(str(name), infer_family(config), {COMPONENT: config}, {COMPONENT: tensors})


def open_file(path: Path) -> StoredModel:
    """Open a single file in either layout. Raises ModelError if it has no ControlNet."""
    tensors = folders.open_file(path)[0]
    try:
        opened, left_out = open_diffusers(tensors)
        config = infer_config(opened.specs, "shuffle" in path.stem.lower())
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    family = infer_family(config)
    guessed = GUESSED_XL if family == "sdxl" else GUESSED
    return StoredModel(str(path), family, {COMPONENT: config}, {COMPONENT: opened}, guessed=guessed, left_out=left_out)


def open_diffusers(tensors: Tensors) -> tuple[Tensors, tuple[str, ...]]:
    """Return the tensors of a file in either layout by diffusers' key, and the keys of other networks.

    Raises ModelError, before anything is read, if it is not a ControlNet.
    """
    if other := next((kind for key, kind in OTHERS.items() if key in tensors), None):
        raise ModelError(f"this file is {other}, which is not supported; use a {NAME}")
    found = [(prefix, mark) for mark in (LDM, DIFFUSERS) for prefix in (PREFIX, "") if prefix + mark in tensors]
    if not found:
        raise ModelError(
            f"this file has neither {PREFIX}{LDM} nor {DIFFUSERS}; use the file of a ControlNet as its authors wrote it"
        )
    prefix, mark = found[0]
    keys = {key.removeprefix(prefix): key for key in tensors if key.startswith(prefix)}
    names = names_in_file(keys.keys()) if mark == LDM else None
    renamed = {key: key if names is None else rename(key, names) for key in keys}
    if unknown := [keys[key] for key, new in renamed.items() if new is None]:
        raise ModelError(
            f"{len(unknown)} keys are unknown in a ControlNet: {some(unknown)}; use the file as its authors wrote it"
        )
    places = {str(new): keys[key] for key, new in renamed.items()}
    opened = Tensors({new: tensors.specs[key] for new, key in places.items()}, lambda new: tensors[places[new]])
    return opened, tuple(key for key in tensors if not key.startswith(prefix))


def with_unet(model: StoredModel, unet: Mapping[str, Any]) -> StoredModel:
    """Return a ControlNet whose guessed options are those of a UNet that it belongs to, by the UNet's config."""
    known = {option: unet[option] for option in model.guessed if unet.get(option) is not None}
    return replace(model, configs={COMPONENT: {**model.configs[COMPONENT], **known}}, guessed=frozenset())


def build(model: StoredModel, dtype: Dtype = np.float32) -> tuple[ControlNet, trees.Params]:
    """Return the network and its parameters as ShapeDtypeStructs. dtype: of the computation; nothing is read.

    Raises ModelError for an option that is not supported, and for keys that are missing, extra or misshapen.
    """
    try:
        network = ControlNet.from_config(model.configs[COMPONENT], dtype)
    except ValueError as error:
        raise ModelError(f"{model.name}: {error}") from error
    abstract = network.abstract_params()
    trees.match_params(COMPONENT, model.tensors[COMPONENT], abstract, model.name)
    return network, abstract


def place_controlnet(
    name: str | Path | StoredModel, model: StableDiffusion, unet: Mapping[str, Any], put: Callable[[np.ndarray], Any]
) -> tuple[str, ControlNet, trees.Params]:
    """Open a ControlNet for a model; return its name, the network, and its cast parameters as `put` places them.

    name: what `open_controlnet` accepts, or returns. unet: the config of the model's UNet. Raises ModelError for one
    of another family.
    """
    stored = name if isinstance(name, StoredModel) else open_controlnet(name)
    if COMPONENT not in stored.tensors:
        raise ModelError(f"{stored.name} is a model, not a ControlNet; use what open_controlnet returns, or a path")
    network, abstract = build(with_unet(stored, unet), model.unet.dtype)
    try:
        check_fit(network, model.unet, model.downscale)
    except ValueError as error:
        raise ModelError(f"ControlNet {stored.name}: {error}") from error
    cast, tensors = frozen_dtype(network.dtype), stored.tensors[COMPONENT]
    return stored.name, network, trees.to_params(COMPONENT, tensors, abstract, stored.name, cast, put)


# ---- what a file does not record ------------------------------------------------------------------------------------


def infer_family(config: Mapping[str, Any]) -> str:
    """Return sd1, sd2 or sdxl, by the embedding of sizes, the width of the prompt, and the kind of projection."""
    if config.get("addition_embed_type") is not None:
        return "sdxl"
    width = config.get("cross_attention_dim")
    return "sd2" if width == 1024 or (width != 768 and config.get("use_linear_projection")) else "sd1"


def infer_config(specs: Mapping[str, np.ndarray], pools: bool) -> dict[str, Any]:
    """Return the config.json of a ControlNet, from its shapes by diffusers' key.

    pools: global_pool_conditions, which only the name of a file tells: that of ControlNet 1.1 shuffle, as in A1111 and
    ComfyUI. Raises ModelError if a tensor is missing.
    """

    def shape(key: str, rank: int = 4) -> tuple[int, ...]:
        if key not in specs or len(specs[key].shape) != rank:
            there = f"has {key} of shape {list(specs[key].shape)}" if key in specs else f"lacks {key}"
            raise ModelError(f"this ControlNet {there}: it is incomplete, copy it again")
        return specs[key].shape

    keys = specs.keys()
    layers = [count(keys, f"down_blocks.{i}.resnets.") for i in range(count(keys, "down_blocks."))]
    if not layers:
        raise ModelError("this ControlNet has no down_blocks: it is incomplete, copy it again")
    depth = lambda block: count(keys, f"{block}.transformer_blocks.")  # noqa: E731
    depths = [[depth(f"down_blocks.{i}.attentions.{j}") for j in range(n)] for i, n in enumerate(layers)]
    middle = depth("mid_block.attentions.0")
    per_level = [one(each) if any(each) else 1 for each in depths]
    if not any(depths[-1]):
        per_level[-1] = middle or 1  # the middle has the depth of the last level
    widths = [shape(f"down_blocks.{i}.resnets.0.conv2.weight")[0] for i in range(len(layers))]
    hint = "controlnet_cond_embedding"
    config = {
        "_class_name": NAME,
        "in_channels": shape("conv_in.weight")[1],
        "conditioning_channels": shape(f"{hint}.conv_in.weight")[1],
        "conditioning_embedding_out_channels": [
            shape(f"{hint}.conv_in.weight")[0],
            *(shape(f"{hint}.blocks.{i}.weight")[0] for i in range(1, count(keys, f"{hint}.blocks."), 2)),
        ],
        "controlnet_conditioning_channel_order": "rgb",
        "global_pool_conditions": pools,
        "down_block_types": ["CrossAttnDownBlock2D" if any(each) else "DownBlock2D" for each in depths],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D",
        "block_out_channels": widths,
        "layers_per_block": one(layers),
        "norm_num_groups": 32,
        "transformer_layers_per_block": one(per_level),
    }
    if (context := first(keys, "attn2.to_k.weight")) is not None:
        projection = str(first(keys, ".proj_in.weight"))
        config |= {
            "cross_attention_dim": shape(context, 2)[1],
            "use_linear_projection": projection in keys and len(specs[projection].shape) == 2,
        }
    if "add_embedding.linear_1.weight" in keys:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": shape("add_embedding.linear_1.weight", 2)[1],
        }
    sd1 = infer_family(config) == "sd1"
    return config | {"attention_head_dim": 8 if sd1 else [max(1, width // 64) for width in widths]}


# ---- names ----------------------------------------------------------------------------------------------------------


def own_names(layers: list[int], blocks: int) -> dict[str, str]:
    """Return all names of the authors' layout, without the prefix, with diffusers' for them.

    layers: resnets of each level. blocks: convolutions between the first and the last that see the control image; each
    but the last has an activation behind it, which counts in this layout.
    """
    names = down_names(layers, "sdxl")  # the only one with label_emb, which is not there in the others
    hints = ["conv_in", *(f"blocks.{i}" for i in range(blocks)), "conv_out"]
    names |= {f"input_hint_block.{2 * i}": f"controlnet_cond_embedding.{hint}" for i, hint in enumerate(hints)}
    skips = sum(layers) + len(layers)  # the first convolution, each resnet, and each downsampling but the last level's
    names |= {f"zero_convs.{i}.0": f"controlnet_down_blocks.{i}" for i in range(skips)}
    return names | {"middle_block_out.0": "controlnet_mid_block"}


def names_in_file(keys: Set[str]) -> dict[str, str]:
    return own_names(count_layers(keys), count(keys, "input_hint_block.") - 2)


def names_in_folder(keys: Iterable[str]) -> dict[str, str]:
    layers = [count(keys, f"down_blocks.{i}.resnets.") for i in range(count(keys, "down_blocks."))]
    return {new: old for old, new in own_names(layers, count(keys, "controlnet_cond_embedding.blocks.")).items()}


def open_ldm(model: StoredModel) -> Tensors:
    """Return the tensors of a ControlNet under the keys of its authors' layout; each is read when it is used.

    Raises ModelError that names the keys and options which the layout cannot represent.
    """
    tensors, config = model.tensors[COMPONENT], model.configs[COMPONENT]
    if (order := config.get("controlnet_conditioning_channel_order", "rgb")) != "rgb":
        raise ModelError(
            f"{model.name}: controlnet_conditioning_channel_order={order!r} cannot be written in the layout ldm; "
            "use format diffusers"
        )
    names, specs = names_in_folder(tensors.keys()), get_specs(tensors)
    renamed = {key: rename(key, names) for key in tensors}
    if unknown := [key for key, old in renamed.items() if old is None]:
        raise ModelError(
            f"{len(unknown)} keys cannot be written in a ControlNet's layout: {some(unknown)}; use format diffusers"
        )
    places = {f"{PREFIX}{old}": key for key, old in renamed.items()}
    read: Callable[[str], np.ndarray] = lambda old: tensors[places[old]]  # noqa: E731
    return Tensors({old: specs[key] for old, key in places.items()}, read)


def check_name(model: StoredModel, target: Path) -> None:
    """Raise ModelError if `target`, a file to write, hides that the residuals are pooled, or claims that they are."""
    pools = bool(model.configs[COMPONENT].get("global_pool_conditions", False))
    if pools != ("shuffle" in target.stem.lower()):
        verb = "add 'shuffle' to" if pools else "remove 'shuffle' from"
        raise ModelError(
            f"global_pool_conditions of {model.name} is {str(pools).lower()}, which programs read from the name of a "
            f"file alone; {verb} the name of {target}"
        )
