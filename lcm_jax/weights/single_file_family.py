"""Detect from its keys which model a single file holds: the family, its components, and the prefixes of their keys.

Beside whole models, some files hold a part: text encoders and an autoencoder without a UNet, a UNet, an autoencoder.
The last two may have the keys of a diffusers folder as well, as SDXL-Lightning, DMD2 and SDXL's repaired autoencoder.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from lcm_jax.weights.errors import ModelError

UNET, VAE = "model.diffusion_model.", "first_stage_model."
# By family: the component of diffusers and the prefix of its keys.
COMPONENTS = {
    "sd1": {"unet": UNET, "vae": VAE, "text_encoder": "cond_stage_model.transformer."},
    "sd2": {"unet": UNET, "vae": VAE, "text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "unet": UNET,
        "vae": VAE,
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    "vae": {"vae": ""},
}
VAE_PREFIXES = ("", VAE, "vae.")  # that a file of an autoencoder alone may have
UNET_PREFIXES = (UNET, "")
MARKS = ("v_pred", "ztsnr")  # keys of empty tensors that record the prediction type, as in ComfyUI
CONTROLNET = "a ControlNet"
# Keys of other models that look alike.
OTHERS = {
    "control_model.": CONTROLNET,
    "input_hint_block.": CONTROLNET,
    "depth_model.": "a depth-to-image model",
    "embedder.model.": "unCLIP",
    "conditioner.embedders.0.model.": "the refiner of SDXL",
    "edm_mean": "Playground 2.5",
    f"{UNET}label_emb.weight": "an upscaler",
    f"{UNET}joint_blocks.": "Stable Diffusion 3",
    f"{UNET}double_blocks.": "Flux",
    "double_blocks.": "Flux",
    "lora_unet_": "a LoRA",
    "edm_vpred.": "CosXL",
    "controlnet_": CONTROLNET,
    "text_model.": "the text encoder of a diffusers folder",
}


def detect_family(tensors: Mapping[str, Any]) -> str:
    """Return the family of a file: sd1, sd2, sdxl or vae. tensors: arrays or shapes by key; at most one is looked at.

    Raises ModelError, with the keys that were looked for and those that are there, for any other file.
    """
    for mark, kind in OTHERS.items():
        if has(tensors, mark) and kind == CONTROLNET:
            raise ModelError(f"this file is {kind} by its keys {mark}*; use its model, with this file as controlnet")
        if has(tensors, mark):
            raise ModelError(
                f"this file is {kind} by its keys {mark}*, which is not supported here; "
                "looked for Stable Diffusion 1.x, 2.x, XL or a part of one"
            )
    prefix = unet_prefix(tensors)
    found = [family for family in ("sd1", "sd2", "sdxl") if has_text_encoders(tensors, family)]
    others = has(tensors, "cond_stage_model.") or has(tensors, "conditioner.")
    if prefix is not None:
        labels = has(tensors, f"{prefix}label_emb.") or has(tensors, f"{prefix}add_embedding.")
        if not found and not others:
            key = first(tensors, "attn2.to_k.weight")  # a UNet alone: by the width of the prompt that it attends to
            width = shape_of(tensors[key])[1] if key else None
            found = ["sdxl"] if labels else ["sd1"] if width == 768 else ["sd2"] if width == 1024 else []
        if len(found) == 1 and labels == (found[0] == "sdxl"):
            return found[0]
    elif len(found) == 1:
        return found[0]
    elif not others and vae_prefix(tensors) is not None:
        return "vae"
    prefixes = Counter(".".join(key.split(".")[:3]) for key in tensors)
    there = ", ".join(f"{prefix} ({n})" for prefix, n in prefixes.most_common(8)) or "no keys"
    texts = "; ".join(
        f"{family}: {' and '.join(prefix for part, prefix in parts.items() if part.startswith('text'))}"
        for family, parts in COMPONENTS.items()
        if family != "vae"
    )
    raise ModelError(
        f"this file is of no known family: looked for {UNET}input_blocks.0.0.weight with the text encoders of one "
        f"family ({texts}; {UNET}label_emb. in sdxl only), for a UNet with the keys of diffusers, or for "
        f"decoder.up.0.block.0.conv1.weight of an autoencoder; found {there}. Give a Stable Diffusion 1.x, 2.x or XL "
        "file"
    )


def unet_prefix(keys: Iterable[str]) -> str | None:
    """Return the prefix of a UNet's keys, in its authors' layout or diffusers'; None without a UNet."""
    for prefix in UNET_PREFIXES:
        own = f"{prefix}time_embedding.linear_1.weight" in keys and has(keys, f"{prefix}down_blocks.")
        if own or f"{prefix}input_blocks.0.0.weight" in keys:
            return prefix
    return None


def vae_prefix(keys: Iterable[str]) -> str | None:
    """Return the prefix of an autoencoder's keys; None without one."""
    marks = ("decoder.up.0.block.0.conv1.weight", "decoder.up_blocks.0.resnets.0.conv1.weight")
    return next((prefix for prefix in VAE_PREFIXES if any(prefix + mark in keys for mark in marks)), None)


def find_prefixes(keys: Iterable[str], family: str) -> Mapping[str, str]:
    """Return the prefix of each component of a family; for a file of one network, the prefix of its keys."""
    if family not in COMPONENTS:
        raise ModelError(f"family {family!r} is not supported; use one of {', '.join(COMPONENTS)}")
    if family == "vae":
        return {"vae": next((prefix for prefix in VAE_PREFIXES if has(keys, f"{prefix}decoder.")), "")}
    return {"unet": ""} if unet_prefix(keys) == "" else COMPONENTS[family]


def has(keys: Iterable[str], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in keys)


def has_text_encoders(keys: Iterable[str], family: str) -> bool:
    prefixes = [prefix for part, prefix in COMPONENTS[family].items() if part.startswith("text")]
    return all(has(keys, prefix) for prefix in prefixes)


def shape_of(value: Any) -> tuple[int, ...]:
    """Return the shape of an array, or `value` if it is a shape."""
    return tuple(getattr(value, "shape", value))


def first(keys: Iterable[str], ending: str) -> str | None:
    return next((key for key in keys if key.endswith(ending)), None)
