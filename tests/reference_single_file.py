"""The families of single files in small, as networks of diffusers and as files of their authors."""

from functools import cache

import numpy as np
import pytest
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lcm_jax.models.families import FAMILIES
from lcm_jax.weights.single_file import to_ldm

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

CLASSES = {
    "UNet2DConditionModel": diffusers.UNet2DConditionModel,
    "AutoencoderKL": diffusers.AutoencoderKL,
    "CLIPTextModel": CLIPTextModel,
    "CLIPTextModelWithProjection": CLIPTextModelWithProjection,
}

# The families made small: the levels, the layers and what tells a family from another are those of the real ones.
VAE = FAMILIES["sd15"]["vae"] | {"block_out_channels": [32, 32, 64, 64]}
SMALL_TEXT = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 80, "num_attention_heads": 1}
SMALL_TEXT |= {"num_hidden_layers": 2, "projection_dim": 64, "max_position_embeddings": 7}
SD1 = {
    "unet": FAMILIES["sd15"]["unet"] | {"block_out_channels": [32, 64, 64, 64], "cross_attention_dim": 64},
    "vae": VAE,
    "text_encoder": FAMILIES["sd15"]["text_encoder"] | SMALL_TEXT,
}
SD2 = {
    "unet": FAMILIES["sd21"]["unet"]
    | {"block_out_channels": [64, 128, 128, 128], "cross_attention_dim": 64, "attention_head_dim": [1, 2, 2, 2]},
    "vae": VAE,
    "text_encoder": FAMILIES["sd21"]["text_encoder"] | SMALL_TEXT | {"num_hidden_layers": 23},
}
XL = {
    "unet": FAMILIES["sdxl"]["unet"]
    | {
        "block_out_channels": [32, 64, 64],
        "cross_attention_dim": 96,
        "attention_head_dim": [1, 1, 1],
        "transformer_layers_per_block": [1, 2, 3],
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 48 + 6 * 8,
    },
    "vae": FAMILIES["sdxl"]["vae"] | {"block_out_channels": [32, 32, 64, 64]},
    "text_encoder": FAMILIES["sdxl"]["text_encoder"] | SMALL_TEXT | {"hidden_size": 32, "projection_dim": 32},
    "text_encoder_2": FAMILIES["sdxl"]["text_encoder_2"] | SMALL_TEXT | {"projection_dim": 48},
}
GUIDED = {"time_cond_proj_dim": 24}
TINY = {"block_out_channels": [32, 64], "layers_per_block": 1}
SMALL = {
    "sd1": SD1,
    "sd1 inpainting": SD1 | {"unet": SD1["unet"] | {"in_channels": 9}},
    "sd1 guided": SD1 | {"unet": SD1["unet"] | GUIDED},
    "sd1 of two levels": {
        "unet": SD1["unet"]
        | TINY
        | {
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        },
        "vae": VAE
        | TINY
        | {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2},
        "text_encoder": SD1["text_encoder"],
    },
    "sd2": SD2,
    "sdxl": XL,
    "sdxl guided": XL | {"unet": XL["unet"] | GUIDED},
    "sdxl without a middle's attention": XL
    | {
        "unet": XL["unet"]
        | {
            "mid_block_type": "UNetMidBlock2D",
            "transformer_layers_per_block": [1, [2, 2], [1, 3]],
            "reverse_transformer_layers_per_block": [[1, 1, 2], [2, 1, 1], 1],
        }
    },
}
MAIN = ["sd1", "sd2", "sdxl"]


def build(config):
    """The PyTorch network of a config.json."""
    if "_class_name" in config:
        return CLASSES[config["_class_name"]].from_config(config)
    return CLASSES[config["architectures"][0]](CLIPTextConfig(**config))


@cache
def networks(name):
    torch.manual_seed(0)
    return {component: build(config) for component, config in SMALL[name].items()}


def tensors_of(component, network):
    """Under the keys of published files: transformers 5 says `text_model.` for one of the two encoders only."""
    tensors = {key: tensor.detach() for key, tensor in network.state_dict().items()}
    if component.startswith("text") and not any(key.startswith("text_model.") for key in tensors):
        tensors = {f"text_model.{key}": tensor for key, tensor in tensors.items()}
    return {key: tensor for key, tensor in tensors.items() if not key.endswith("position_ids")}


@cache
def components(name):
    return {
        component: {key: tensor.numpy() for key, tensor in tensors_of(component, network).items()}
        for component, network in networks(name).items()
    }


def family_of(name):
    return name.split()[0]


def published(name):
    """A file with all that published ones have besides: (tensors, what no component takes)."""
    rng = np.random.default_rng(0)
    random = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    tensors = to_ldm(components(name), family_of(name))
    extra = {
        "betas": random(1000),
        "alphas_cumprod": random(1000),
        "model_ema.decay": random(),
        "scale_factor": random(),
        "first_stage_model.loss.logvar": random(),
        "first_stage_model.model_ema.decay": random(),
    }
    if family_of(name) == "sd1":
        extra["cond_stage_model.transformer.text_model.embeddings.position_ids"] = np.arange(7)[None]
    elif family_of(name) == "sd2":
        prefix = "cond_stage_model.model."
        extra |= {prefix + "text_projection": random(64, 64), prefix + "logit_scale": random()}
        for key in [key for key in tensors if ".resblocks.22." in key]:
            extra[key.replace(".22.", ".23.")] = random(*tensors[key].shape)
    else:
        extra |= {"conditioner.embedders.1.model.logit_scale": random(), "denoiser.sigmas": random(1000)}
        extra["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = np.arange(7)[None]
    return tensors | extra, extra
