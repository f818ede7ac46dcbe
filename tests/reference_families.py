"""Tiny random pipelines of diffusers in the shape of each family, written by diffusers itself."""

from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lcm_jax.data import tokenizer as tokenizers

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

WORDS = "a red blue circle square above below photo of".split()
LENGTH = 12
PROMPTS = ["a red circle above a blue square", "a photo of a square"]
SIZE = {"height": 16, "width": 24}  # not square, and not the model's own
LATENTS = (2, 8, 12, 4)
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "attention_head_dim": (1, 2),
    "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
XL = UNET | {
    "cross_attention_dim": 16 + 24,
    "transformer_layers_per_block": (1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
}
SSD = XL | {
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": (1, (2,)),
    "reverse_transformer_layers_per_block": ((1, 3), 1),
}
TRAILING = {"timestep_spacing": "trailing"}

LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
DDIM = {"clip_sample": False, "set_alpha_to_one": False}


def scheduler(name: str, **options):
    """Return a function that makes the scheduler `name` of diffusers on this schedule."""
    return lambda: getattr(diffusers, name)(**SCHEDULE, **options)


# family -> (UNet, a function that makes the scheduler, tiny autoencoder)
FAMILIES = {
    "sd21-768": (UNET, scheduler("DDIMScheduler", **DDIM, steps_offset=1, prediction_type="v_prediction"), False),
    "sd-turbo": (UNET, scheduler("EulerDiscreteScheduler", **TRAILING), False),
    "sd15-taesd": (UNET, scheduler("DDIMScheduler", **DDIM), True),
    "sdxl": (XL, scheduler("EulerDiscreteScheduler", **LEADING), False),
    "sdxl-turbo": (XL, scheduler("EulerAncestralDiscreteScheduler", **TRAILING), False),
    "lcm-sdxl": (XL | {"time_cond_proj_dim": 32}, scheduler("LCMScheduler"), False),
    "ssd1b": (SSD, scheduler("EulerDiscreteScheduler", **LEADING), False),
    "lcm-ssd1b-taesdxl": (SSD | {"time_cond_proj_dim": 32}, scheduler("LCMScheduler"), True),
}


def text_encoder(kind, width: int, act: str, **more):
    config = CLIPTextConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        eos_token_id=2,
        hidden_act=act,
        **more,
    )
    return kind(config).eval()


def build(folder: Path, family: str):
    """A float32 pipeline of diffusers; `folder` takes its tokenizers' files."""
    torch.manual_seed(0)
    config, scheduler, tiny = FAMILIES[family]
    unet = diffusers.UNet2DConditionModel(**config).eval()
    if tiny:
        vae = diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        )
    else:
        vae = diffusers.AutoencoderKL(
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=16,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            scaling_factor=0.13025,
            force_upcast=True,
        )
    tokenizers.build(WORDS, folder / "first", model_max_length=LENGTH)
    first = CLIPTokenizer.from_pretrained(str(folder / "first"))
    shared = {"unet": unet, "vae": vae.eval(), "tokenizer": first, "scheduler": scheduler()}
    if "addition_embed_type" not in config:
        pipe = diffusers.StableDiffusionPipeline(
            **shared,
            text_encoder=text_encoder(CLIPTextModel, 16, "gelu"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    else:
        second = CLIPTokenizer.from_pretrained(str(folder / "first"), pad_token="!")  # as OpenCLIP
        second.save_pretrained(str(folder / "second"))
        pipe = diffusers.StableDiffusionXLPipeline(
            **shared,
            text_encoder=text_encoder(CLIPTextModel, 16, "quick_gelu"),
            tokenizer_2=second,
            text_encoder_2=text_encoder(CLIPTextModelWithProjection, 24, "gelu", projection_dim=20),
            add_watermarker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


# Each published model as a tiny random one of diffusers, in the shape of its family.
SMALL = UNET | {
    "block_out_channels": (8,),
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}


def ddim_scheduler(**more):
    shared = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    return diffusers.DDIMScheduler(**SCHEDULE, **shared, **more)


SMALL_XL = XL | SMALL | {"cross_attention_dim": 16 + 24, "transformer_layers_per_block": (2,)}
SMALL_SSD = SMALL_XL | {
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": ((2,),),
    "reverse_transformer_layers_per_block": ((1, 2),),
}
PUBLISHED = {
    "sd15": (SMALL | {"use_linear_projection": False}, ddim_scheduler, False),
    "sd21": (SMALL, ddim_scheduler, False),
    "sd21-768": (SMALL, lambda: ddim_scheduler(prediction_type="v_prediction"), False),
    "sdxl": (SMALL_XL, *FAMILIES["sdxl"][1:]),
    "ssd1b": (SMALL_SSD, *FAMILIES["ssd1b"][1:]),
}


def to_torch(latents) -> torch.Tensor:
    """NHWC -> NCHW."""
    return torch.from_numpy(np.ascontiguousarray(np.asarray(latents).transpose(0, 3, 1, 2)))
