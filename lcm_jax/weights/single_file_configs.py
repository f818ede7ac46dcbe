"""Infer the configs of a single file's networks, which diffusers keeps beside the weights, from the shapes."""

from collections.abc import Callable, Container, Mapping, Set
from types import MappingProxyType
from typing import Any

import numpy as np

from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.layout import shown
from lcm_jax.weights.scheduler import published_scheduler
from lcm_jax.weights.single_file import OPEN_CLIP, PROJECTION, count, locate
from lcm_jax.weights.single_file_family import first, has, shape_of

PREDICTION_TYPES = ("epsilon", "v_prediction")
# Metadata keys of the prediction type: that of Stability AI's ModelSpec, and ComfyUI's.
PREDICTION_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")
PREDICTION_NAMES = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
SCALING_FACTORS = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}
# Options that no file records: the values here are those of the published models; those of a base have precedence.
GUESSED = frozenset(
    {
        "sample_size",
        "norm_num_groups",
        "attention_head_dim",
        "upcast_attention",
        "scaling_factor",
        "force_upcast",
        "num_attention_heads",
        "hidden_act",
        "layer_norm_eps",
        "projection_dim",
        "model_type",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "addition_time_embed_dim",
    }
)


def infer_configs(
    tensors: Mapping[str, Any],
    family: str,
    prediction_type: str | None = None,
    scaling_factor: float | None = None,
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, dict[str, Any]]:
    """Return the config.json of each component of the file, and of a `scheduler` if it has a UNet.

    tensors: arrays or shapes by key; about twenty are looked at.
    prediction_type: "epsilon" or "v_prediction"; by default that of the key `v_pred` or the metadata. If the scheduler
    has none, sd1 and sdxl predict epsilon, and the prediction type of sd2 is unknown (see `complete`).
    scaling_factor: of the latents, which the file of an autoencoder alone does not record.
    Files do not record either what all published models agree in: 32 groups in norms; 8 heads in the UNet of sd1 and
    heads of width 64 in all others; the schedule; the size of the training images.
    Raises ModelError if a shape is missing or in no config of diffusers.
    """
    if prediction_type not in (None, *PREDICTION_TYPES):
        raise ModelError(f"prediction_type {prediction_type!r} is not supported; use {' or '.join(PREDICTION_TYPES)}")
    places = locate(tensors, family)
    components: dict[str, dict[str, str]] = {}
    for (component, new), key in places.items():
        components.setdefault(component, {})[new] = key

    def shapes(component: str) -> Callable[[str], tuple[int, ...]]:
        def shape(key: str) -> tuple[int, ...]:
            if key not in components[component]:
                raise ModelError(f"the {component} of this file lacks {key}: it is incomplete, copy it again")
            return shape_of(tensors[components[component][key]])

        return shape

    configs = {}
    for component in components:
        keys, shape = components[component].keys(), shapes(component)
        if component == "vae":
            configs[component] = vae_config(shape, keys, family, scaling_factor)
        elif component != "unet":
            configs[component] = text_config(shape, keys, (family, component) in OPEN_CLIP)
    if "unet" in components:
        if prediction_type is None:
            prediction_type = read_prediction(tensors, metadata)
        pooled = configs.get("text_encoder_2", {}).get("projection_dim")
        unet = unet_config(shapes("unet"), components["unet"].keys(), family, pooled)
        if family == "sd2" and prediction_type == "v_prediction":
            unet |= {"sample_size": 96, "upcast_attention": True}
        configs["unet"] = unet
        zero_snr = "ztsnr" in tensors and prediction_type == "v_prediction"
        guided = unet["time_cond_proj_dim"] is not None
        configs["scheduler"] = published_scheduler(family, guided, prediction_type, zero_snr)
    return configs


def read_prediction(keys: Container[str], metadata: Mapping[str, str]) -> str | None:
    """Return the prediction type of a file by its marks and metadata, None if they do not record it.

    Raises ModelError if they contradict each other, or are not supported.
    """
    found = {"the key v_pred": "v_prediction"} if "v_pred" in keys else {}
    for key in PREDICTION_KEYS:
        if value := metadata.get(key):
            name = PREDICTION_NAMES.get(value.strip().lower())
            if name is None:
                choices = " or ".join(PREDICTION_TYPES)
                raise ModelError(f"metadata {key}={shown(value)} is not supported; pass --prediction_type={choices}")
            found[f"metadata {key}"] = name
    if len(set(found.values())) > 1:
        recorded = ", ".join(f"{where} is {name}" for where, name in found.items())
        raise ModelError(f"this file contradicts itself: {recorded}; pass --prediction_type")
    return next(iter(found.values()), None)


def make_marks(scheduler: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the empty tensors whose keys record the prediction type; ComfyUI writes and reads the same."""
    marks = {
        "v_pred": scheduler.get("prediction_type") == "v_prediction",
        "ztsnr": scheduler.get("rescale_betas_zero_snr", False),
    }
    return {key: np.zeros(0, np.float32) for key, is_set in marks.items() if is_set}


def complete(configs: Mapping[str, Mapping[str, Any]], family: str) -> None:
    """Raise ModelError if the configs lack what the file does not record, and nothing else has supplied it."""
    if family == "sd2" and "prediction_type" not in configs.get("scheduler", {"prediction_type": None}):
        raise ModelError(
            "prediction_type is needed: Stable Diffusion 2 files do not record the prediction type. Use "
            "'v_prediction' for a model of 768 pixels (2.0, 2.1), 'epsilon' for a base model of 512, for "
            "inpainting and for Turbo"
        )
    if family == "vae" and "scaling_factor" not in configs.get("vae", {}):
        raise ModelError(
            "scaling_factor is needed: the file of an autoencoder alone does not record it. Use 0.18215 for one of "
            "Stable Diffusion 1.x or 2.x, 0.13025 for one of XL"
        )


def one(values: list) -> Any:
    """Return a list of equal values as that value, any other as it is."""
    return values[0] if all(value == values[0] for value in values) else values


def unet_config(shape: Callable, keys: Set[str], family: str, pooled: int | None) -> dict[str, Any]:
    """shape: of a tensor, in this layout, by diffusers' key. pooled: the width of the pooled prompt, where known."""
    layers = [count(keys, f"down_blocks.{i}.resnets.") for i in range(count(keys, "down_blocks."))]

    def depths(block: str, n: int) -> list[int]:
        found = [count(keys, f"{block}.attentions.{j}.transformer_blocks.") for j in range(n)]
        if 0 in found and any(found):
            raise ModelError(
                f"the UNet's {block} has {found} transformer blocks in its layers; diffusers has all or none"
            )
        return found

    down = [depths(f"down_blocks.{i}", n) for i, n in enumerate(layers)]
    up = [depths(f"up_blocks.{i}", n + 1) for i, n in enumerate(reversed(layers))]
    middle = depths("mid_block", 1)[0]
    if not layers or (context := first(keys, "attn2.to_k.weight")) is None:
        raise ModelError(
            "the UNet of this file has no levels or no attention to a prompt: it is incomplete, copy it again"
        )
    # The middle has the depth of the last level; where a level has no attention, its number means nothing else.
    if any(down[-1]) and middle not in (0, down[-1][0]):
        raise ModelError(f"the UNet has depth {middle} in the middle and {down[-1]} before it; diffusers has one depth")
    per_level = [one(d) if any(d) else 1 for d in down]
    per_level[-1] = per_level[-1] if any(down[-1]) else middle or 1
    reverse = [one(u) if any(u) else 1 for u in up]
    mirrored = all(
        type(d) is int and (u == d or not any(each))
        for d, u, each in zip(reversed(per_level), reverse, up, strict=True)
    )
    widths = [shape(f"down_blocks.{i}.resnets.0.conv2.weight")[0] for i in range(len(layers))]
    config = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 128 if family == "sdxl" else 64,
        "in_channels": shape("conv_in.weight")[1],
        "out_channels": shape("conv_out.weight")[0],
        "block_out_channels": widths,
        "layers_per_block": one(layers),
        "norm_num_groups": 32,
        "down_block_types": ["CrossAttnDownBlock2D" if any(d) else "DownBlock2D" for d in down],
        "up_block_types": ["CrossAttnUpBlock2D" if any(u) else "UpBlock2D" for u in up],
        "cross_attention_dim": shape(context)[1],
        "transformer_layers_per_block": one(per_level),
        "attention_head_dim": 8 if family == "sd1" else [max(1, width // 64) for width in widths],
        "use_linear_projection": len(shape(first(keys, ".proj_in.weight"))) == 2,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "reverse_transformer_layers_per_block": None,
        "time_embedding_dim": None,
        "time_cond_proj_dim": None,
    }
    if not middle:
        config["mid_block_type"] = "UNetMidBlock2D" if has(keys, "mid_block.") else None
    if not mirrored:  # a list for each level, as diffusers requires then
        config["transformer_layers_per_block"] = [d if any(d) else per_level[i] for i, d in enumerate(down)]
        config["reverse_transformer_layers_per_block"] = [u if any(u) else 1 for u in up]
    if (time := shape("time_embedding.linear_1.weight")[0]) != 4 * widths[0]:
        config["time_embedding_dim"] = time
    if "time_embedding.cond_proj.weight" in keys:
        config["time_cond_proj_dim"] = shape("time_embedding.cond_proj.weight")[1]
    if family == "sdxl":
        added = shape("add_embedding.linear_1.weight")[1]
        config |= {
            "addition_embed_type": "text_time",
            "projection_class_embeddings_input_dim": added,
            "addition_time_embed_dim": 256 if pooled is None else (added - pooled) // 6,  # of six sizes
        }
    return config


def vae_config(shape: Callable, keys: Set[str], family: str, scaling_factor: float | None) -> dict[str, Any]:
    levels = count(keys, "encoder.down_blocks.")
    config = {
        "_class_name": "AutoencoderKL",
        "sample_size": 1024 if family == "sdxl" else 512,
        "norm_num_groups": 32,
        "in_channels": shape("encoder.conv_in.weight")[1],
        "out_channels": shape("decoder.conv_out.weight")[0],
        "latent_channels": shape("decoder.conv_in.weight")[1],
        "block_out_channels": [shape(f"encoder.down_blocks.{i}.resnets.0.conv2.weight")[0] for i in range(levels)],
        "layers_per_block": count(keys, "encoder.down_blocks.0.resnets."),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    parts = {
        "use_quant_conv": "quant_conv.",
        "use_post_quant_conv": "post_quant_conv.",
        "mid_block_add_attention": "decoder.mid_block.attentions.",
    }
    config |= {option: has(keys, prefix) for option, prefix in parts.items()}
    if (scale := SCALING_FACTORS.get(family) if scaling_factor is None else scaling_factor) is not None:
        config["scaling_factor"] = scale
    return config | ({"force_upcast": True} if family == "sdxl" else {})


def text_config(shape: Callable, keys: Set[str], open_clip: bool) -> dict[str, Any]:
    vocabulary, width = shape("text_model.embeddings.token_embedding.weight")
    projects = open_clip and PROJECTION in keys
    return {
        "architectures": ["CLIPTextModelWithProjection" if projects else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shape("text_model.encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": count(keys, "text_model.encoder.layers."),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": shape("text_model.embeddings.position_embedding.weight")[0],
        "hidden_act": "gelu" if open_clip else "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": shape(PROJECTION)[1] if projects else width,  # the other way round in this layout
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,  # as published: the end of a text is its largest id
    }
