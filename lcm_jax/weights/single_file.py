"""The layout of Stable Diffusion's authors, all networks in one file, to and from the components of diffusers.

A1111, ComfyUI and kohya's scripts read and write it. Families: "sd1" (1.x), "sd2" (2.x), "sdxl", and "vae", the file of
an autoencoder alone. Networks of other widths, depths and numbers of levels follow the same rule, so that the names are
made from the numbers in the keys themselves:

1. A UNet's blocks are counted through, the downsampling ones too; diffusers counts (level, layer) instead.
2. An autoencoder's decoder counts its levels from the image inwards; diffusers from the latents outwards.
3. Attention of an autoencoder is a 1 x 1 convolution [C, C, 1, 1], in diffusers a matrix [C, C].
4. OpenCLIP (the text encoder of sd2, the second of sdxl) has q, k and v in one matrix [3 D, D], and a projection
   [D, P] which is transposed in transformers.

The input of a latent consistency model for the weight of guidance, `time_embedding.cond_proj.weight` in diffusers, has
no published name in this layout. Here it is `model.diffusion_model.time_embed.cond_proj.weight`.

What diffusers has no place for is dropped in reading: the noise schedule, `position_ids`, `logit_scale`, losses, the
averaged weights (`model_ema.*`, unless they are requested), and of sd2 the text encoder's 24th layer and projection,
which the model does not use; `left_out` lists such keys. All else comes back bit for bit.

Of `stored.Tensors` only the specs are used at first, and each tensor is read when it is used. If shapes alone matter, a
Mapping of shapes does as well. single_file_family.py detects the family, and single_file_configs.py makes the networks'
configs from the shapes.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Set
from functools import partial
from typing import Any

import numpy as np

from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.naming import modern_key
from lcm_jax.weights.single_file_family import MARKS, find_prefixes, has
from lcm_jax.weights.stored import Tensors, get_specs

OPEN_CLIP = (("sd2", "text_encoder"), ("sdxl", "text_encoder_2"))

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
VAE_MATRIX = re.compile(r"(en|de)coder\.mid_block\.attentions\.0\.to_(q|k|v|out\.0)\.weight")
# The fused projections are `qkv_proj` in the tables, which stands for q_proj, k_proj and v_proj.
OPEN_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
    "attn.in_proj_weight": "self_attn.qkv_proj.weight",
    "attn.in_proj_bias": "self_attn.qkv_proj.bias",
}
PROJECTION = "text_projection.weight"
# The first parts of diffusers' own keys, which some files of one network have.
OWN = {
    "unet": (
        "conv_in",
        "time_embedding",
        "add_embedding",
        "down_blocks",
        "mid_block",
        "up_blocks",
        "conv_norm_out",
        "conv_out",
    ),
    "vae": ("encoder", "decoder", "quant_conv", "post_quant_conv"),
}

# Keys of each component that diffusers has no place for.
NO_VAE = re.compile(r"(?!encoder\.|decoder\.|quant_conv\.|post_quant_conv\.)")
NO_CLIP = re.compile(r"(.*\.)?(position_ids|logit_scale|attn_mask)$|text_projection\.weight$")
NO_OPEN_CLIP = re.compile(r"logit_scale$|attn_mask$")
# Stable Diffusion 2 takes the layer before the last of ViT-H's 24.
NO_SD2_CLIP = re.compile(NO_OPEN_CLIP.pattern + r"|text_projection$|transformer\.resblocks\.23\.")
NOTHING = re.compile(r"(?!)")


# ---- names ----------------------------------------------------------------------------------------------------------
# Each table takes a module (or a whole key) of this layout to diffusers'; what is below a module keeps its name.


def under(table: Mapping[str, str], old: str, new: str) -> dict[str, str]:
    return {f"{old}.{a}": f"{new}.{b}" for a, b in table.items()}


def down_names(layers: list[int], family: str) -> dict[str, str]:
    """Return the names of all but the way up, which a ControlNet has as well. layers: resnets of each level."""
    names = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "middle_block.1": "mid_block.attentions.0",
    }
    if family == "sdxl":
        names |= {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}
    names |= under(RESNET, "middle_block.0", "mid_block.resnets.0")
    names |= under(RESNET, "middle_block.2", "mid_block.resnets.1")
    last, n = len(layers) - 1, 1
    for i, resnets in enumerate(layers):
        for j in range(resnets):
            names |= under(RESNET, f"input_blocks.{n}.0", f"down_blocks.{i}.resnets.{j}")
            names[f"input_blocks.{n}.1"] = f"down_blocks.{i}.attentions.{j}"
            n += 1
        if i < last:
            names[f"input_blocks.{n}.0.op"] = f"down_blocks.{i}.downsamplers.0.conv"
            n += 1
    return names


def unet_names(layers: list[int], attended: set[int], family: str) -> dict[str, str]:
    """layers: resnets of each level down, of which the way up has one more. attended: levels up with attention."""
    names = down_names(layers, family)
    names |= {"time_embed.cond_proj": "time_embedding.cond_proj", "out.0": "conv_norm_out", "out.2": "conv_out"}
    last, n = len(layers) - 1, 0
    for i, resnets in enumerate(reversed(layers)):
        for j in range(resnets + 1):
            names |= under(RESNET, f"output_blocks.{n}.0", f"up_blocks.{i}.resnets.{j}")
            names[f"output_blocks.{n}.1"] = f"up_blocks.{i}.attentions.{j}"
            n += 1
        if i < last:  # in the last block of the level, behind its attention where there is one
            names[f"output_blocks.{n - 1}.{2 if i in attended else 1}.conv"] = f"up_blocks.{i}.upsamplers.0.conv"
    return names


def vae_names(levels: int, layers: int) -> dict[str, str]:
    """layers: resnets of each level of the encoder, of which the decoder has one more."""
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side in ("encoder", "decoder"):
        names |= under({"conv_in": "conv_in", "conv_out": "conv_out", "norm_out": "conv_norm_out"}, side, side)
        names |= under(VAE_RESNET, f"{side}.mid.block_1", f"{side}.mid_block.resnets.0")
        names |= under(VAE_RESNET, f"{side}.mid.block_2", f"{side}.mid_block.resnets.1")
        names |= under(VAE_ATTENTION, f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0")
    for i in range(levels):
        up = levels - 1 - i
        for j in range(layers):
            names |= under(VAE_RESNET, f"encoder.down.{i}.block.{j}", f"encoder.down_blocks.{i}.resnets.{j}")
        for j in range(layers + 1):
            names |= under(VAE_RESNET, f"decoder.up.{i}.block.{j}", f"decoder.up_blocks.{up}.resnets.{j}")
        names[f"encoder.down.{i}.downsample.conv"] = f"encoder.down_blocks.{i}.downsamplers.0.conv"
        names[f"decoder.up.{i}.upsample.conv"] = f"decoder.up_blocks.{up}.upsamplers.0.conv"
    return names


def open_clip_names(layers: int) -> dict[str, str]:
    names = {
        "token_embedding": "text_model.embeddings.token_embedding",
        "ln_final": "text_model.final_layer_norm",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "text_projection": PROJECTION,
    }
    for i in range(layers):
        names |= under(OPEN_LAYER, f"transformer.resblocks.{i}", f"text_model.encoder.layers.{i}")
    return names


def names_in_file(component: str, family: str, keys: Set[str]) -> dict[str, str]:
    """Return the table of a component, from its keys in this layout without their prefix."""
    if has(keys, "down_blocks.") or has(keys, "encoder.down_blocks."):
        return {head: head for head in OWN[component]}
    if component == "unet":
        layers = count_layers(keys)
        ends = np.cumsum([n + 1 for n in reversed(layers)]) - 1
        attended = {i for i, n in enumerate(ends) if f"output_blocks.{n}.1.norm.weight" in keys}
        return unet_names(layers, attended, family)
    if component == "vae":
        return vae_names(count(keys, "encoder.down."), count(keys, "encoder.down.0.block."))
    if (family, component) in OPEN_CLIP:
        return open_clip_names(count(keys, "transformer.resblocks."))
    # Some files of 1.x were written without `text_model.`
    return {"text_model": "text_model"} | {f: f"text_model.{f}" for f in ("embeddings", "encoder", "final_layer_norm")}


def count_layers(keys: Set[str]) -> list[int]:
    """Return the resnets of each level down, from a UNet's keys in this layout without their prefix."""
    layers = [0]
    for n in range(1, count(keys, "input_blocks.")):
        if f"input_blocks.{n}.0.op.weight" in keys:
            layers.append(0)
        else:
            layers[-1] += 1
    return layers


def names_in_folder(component: str, family: str, keys: Set[str]) -> dict[str, str]:
    """Return the table of a component that maps its keys in diffusers to those of this layout."""
    if component == "unet":
        layers = [count(keys, f"down_blocks.{i}.resnets.") for i in range(count(keys, "down_blocks."))]
        attended = {i for i, n in enumerate(reversed(layers)) if has(keys, f"up_blocks.{i}.attentions.{n}.")}
        names = unet_names(layers, attended, family)
    elif component == "vae":
        names = vae_names(count(keys, "encoder.down_blocks."), count(keys, "encoder.down_blocks.0.resnets."))
    elif (family, component) in OPEN_CLIP:
        names = open_clip_names(count(keys, "text_model.encoder.layers."))
    else:
        names = {"text_model": "text_model"}
    return {new: old for old, new in names.items()}


def count(keys: Iterable[str], prefix: str) -> int:
    """Return the number of different names that follow the prefix."""
    return len({key[len(prefix) :].partition(".")[0] for key in keys if key.startswith(prefix)})


def rename(key: str, names: Mapping[str, str]) -> str | None:
    """Return the new name of a key by its longest beginning that is in the table, or None."""
    head = key
    while head and head not in names:
        head = head.rpartition(".")[0]
    return names[head] + key[len(head) :] if head else None


# ---- reading --------------------------------------------------------------------------------------------------------


def open_diffusers(tensors: Mapping[str, np.ndarray], family: str, ema: bool = False) -> dict[str, Tensors]:
    """Return the tensors by component and diffusers' key, each read when it is used.

    family: see `detect_family`. ema: use the UNet's averaged weights, which some files have beside the last ones.
    Raises ModelError, before anything is read, that names the keys which no component of this family has.
    """
    specs = get_specs(tensors)
    specs_by_component: dict[str, dict[str, np.ndarray]] = {}
    sources = {}
    for (component, name), key in locate(tensors, family, ema).items():
        for new, part in from_file(component, family, name, specs[key]):
            specs_by_component.setdefault(component, {})[new] = part
            sources[component, new] = (name, key)

    def read(component: str, new: str) -> np.ndarray:
        name, key = sources[component, new]
        return dict(from_file(component, family, name, tensors[key]))[new]

    return {component: Tensors(parts, partial(read, component)) for component, parts in specs_by_component.items()}


def to_diffusers(tensors: Mapping[str, np.ndarray], family: str, ema: bool = False) -> dict[str, dict[str, np.ndarray]]:
    """`open_diffusers`, all at once."""
    return {component: dict(parts) for component, parts in open_diffusers(tensors, family, ema).items()}


def locate(tensors: Mapping[str, Any], family: str, ema: bool = False) -> dict[tuple[str, str], str]:
    """(component, diffusers' key) -> the key in the file, in its order; `qkv_proj` stands for three keys."""
    places, wrong = {}, []
    for component, prefix in find_prefixes(tensors, family).items():
        keys = {key.removeprefix(prefix): key for key in tensors if key.startswith(prefix)}
        names, dropped = names_in_file(component, family, keys.keys()), dropped_pattern(component, family)
        for short, key in keys.items():
            if not dropped.match(short) and key not in MARKS:
                new = rename(short, names)
                new = modern_key(component, new) if new and component == "vae" else new
                if new is None or places.setdefault((component, new), key) != key:
                    wrong.append(key)
    if wrong:
        raise ModelError(
            f"{len(wrong)} keys are unknown to or duplicated in the {family} layout: {some(wrong)}; use the file as "
            "its authors wrote it"
        )
    if ema:
        averages = {place: averaged(key) for place, key in places.items() if place[0] == "unet"}
        missing = [key for key in averages.values() if key not in tensors]
        if missing or not averages:
            raise ModelError(
                f"{len(missing)} of {len(averages)} averaged weights of the UNet are missing: {some(missing)}; "
                "read this file with ema=False"
            )
        places |= averages
    return places


def left_out(tensors: Mapping[str, Any], family: str, ema: bool = False) -> list[str]:
    """Return the keys of a file that no component has a place for, in its order; `open_diffusers` does without them."""
    taken = {*locate(tensors, family, ema).values(), *MARKS}
    return [key for key in tensors if key not in taken]


def dropped_pattern(component: str, family: str) -> re.Pattern:
    """Return the pattern of keys, without their prefix, that diffusers drops."""
    if component in ("unet", "vae"):
        return NOTHING if component == "unet" else NO_VAE
    if (family, component) in OPEN_CLIP:
        return NO_SD2_CLIP if family == "sd2" else NO_OPEN_CLIP
    return NO_CLIP


def averaged(key: str) -> str:
    """Return the key of the running average of a UNet's tensor; its module allows no dots in names."""
    return "model_ema." + key.removeprefix("model.").replace(".", "")


def some(keys: list[str]) -> str:
    return ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")


def from_file(component: str, family: str, name: str, tensor: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the one or three tensors of diffusers that a tensor of the file becomes."""
    if component == "vae" and VAE_MATRIX.fullmatch(name) and set(tensor.shape[2:]) == {1}:
        yield name, tensor.reshape(tensor.shape[:2])
    elif (family, component) in OPEN_CLIP and name == PROJECTION:
        yield name, np.ascontiguousarray(tensor.T)
    elif (family, component) in OPEN_CLIP and ".qkv_proj." in name:
        if len(tensor) % 3:
            raise ModelError(f"{component}: {name} of shape {list(tensor.shape)} is not q, k and v; copy it again")
        for letter, part in zip("qkv", np.split(tensor, 3), strict=True):
            yield name.replace(".qkv_proj.", f".{letter}_proj."), part
    else:
        yield name, tensor


# ---- writing --------------------------------------------------------------------------------------------------------


def open_ldm(
    components: Mapping[str, Mapping[str, np.ndarray]], family: str, averages: Mapping[str, np.ndarray] | None = None
) -> Tensors:
    """Return the tensors of one file, the inverse of `open_diffusers`; each is made from the components when used.

    components: by name (unet, vae, text_encoder, text_encoder_2), whole or a part of them, the tensors by diffusers'
    key. The file of an autoencoder alone gets keys without a prefix. averages: the UNet's averaged weights, which the
    file then has beside the others under `model_ema.`, as files of a training have them.
    Raises ModelError, before anything is read, that names the keys which the layout cannot represent.
    """
    specs_by_component = {component: get_specs(tensors) for component, tensors in components.items()}
    places = {old: (component, sources) for (component, old), sources in ldm_places(specs_by_component, family).items()}

    def read(tensors: Mapping[str, Mapping[str, np.ndarray]], old: str) -> np.ndarray:
        component, sources = places[old]
        return to_file(component, family, {new: tensors[component][key] for new, key in sources})

    file = Tensors({old: read(specs_by_component, old) for old in places}, partial(read, components))
    if averages is None:
        return file
    beside = open_ldm({"unet": averages}, family)
    keys = {averaged(old): old for old in beside}
    specs = dict(file.specs) | {new: beside.specs[old] for new, old in keys.items()}
    return Tensors(specs, lambda key: beside[keys[key]] if key in keys else file[key])


def to_ldm(components: Mapping[str, Mapping[str, np.ndarray]], family: str) -> dict[str, np.ndarray]:
    """`open_ldm`, all at once."""
    return dict(open_ldm(components, family))


def ldm_places(components: Mapping[str, Iterable[str]], family: str) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """(component, key in the file) -> the one or three tensors that it is made of, (diffusers' key, the key here)."""
    places: dict[tuple[str, str], list[tuple[str, str]]] = {}
    wrong = []
    for component, tensors in components.items():
        prefix = find_prefixes((), family).get(component)
        modern = [(new, key) for key in tensors if (new := modern_key(component, key)) is not None]
        names = names_in_folder(component, family, {new for new, _ in modern}) if prefix is not None else {}
        for new, key in modern:
            fused = new
            if (family, component) in OPEN_CLIP:
                fused = re.sub(r"\.self_attn\.[qkv]_proj\.", ".self_attn.qkv_proj.", new)
            old = rename(fused, names)
            if old is None or dropped_pattern(component, family).match(old):
                wrong.append(f"{component} {key}")
            else:
                assert prefix is not None  # without one there are no names
                places.setdefault((component, prefix + old), []).append((new, key))
    for (component, old), sources in places.items():
        wanted = "qkv" if ".attn.in_proj_" in old and (family, component) in OPEN_CLIP else " "
        if len(sources) != len(wanted):
            wrong += [f"{component} {key}" for _, key in sources]
    if wrong:
        raise ModelError(
            f"{len(wrong)} keys cannot be written in the layout of the {family} family: {some(wrong)}; "
            "write a diffusers folder instead"
        )
    return places


def to_file(component: str, family: str, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the tensor of the file that one or three tensors of diffusers, by key, become."""
    if len(tensors) == 3:
        parts = [next(t for name, t in tensors.items() if f".{letter}_proj." in name) for letter in "qkv"]
        if len({(part.dtype, part.shape) for part in parts}) > 1:
            raise ModelError(f"{component}: {some(list(tensors))} must have one dtype and shape to be one tensor")
        return np.concatenate(parts)
    ((name, tensor),) = tensors.items()
    if component == "vae" and VAE_MATRIX.fullmatch(name) and tensor.ndim == 2:
        return tensor[:, :, None, None]
    if (family, component) in OPEN_CLIP and name == PROJECTION:
        return np.ascontiguousarray(tensor.T)
    return tensor
