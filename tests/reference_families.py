"""Tiny random pipelines of diffusers in the shape of each family, written by diffusers itself."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lcm_jax.data import tokenizer as tokenizers

WORDS = "a red blue circle square above below photo of".split()
LENGTH = 12
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
UNET = {
    "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
    "cross_attention_dim": 16, "attention_head_dim": (1, 2), "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
XL = UNET | {
    "cross_attention_dim": 16 + 24, "transformer_layers_per_block": (1, 2), "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 20 + 6 * 8,
}  # fmt: skip
SSD = XL | {
    "mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": (1, (2,)),
    "reverse_transformer_layers_per_block": ((1, 3), 1),
}  # fmt: skip
TRAILING = {"timestep_spacing": "trailing"}

# family -> (UNet, options of the scheduler's constructor, tiny autoencoder)
FAMILIES = {
    "sd21-768": (UNET, lambda: DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1,
                                             prediction_type="v_prediction"), False),
    "sd-turbo": (UNET, lambda: EulerDiscreteScheduler(**SCHEDULE, **TRAILING), False),
    "sd15-taesd": (UNET, lambda: DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False), True),
    "sdxl": (XL, lambda: EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading", steps_offset=1), False),
    "sdxl-turbo": (XL, lambda: EulerAncestralDiscreteScheduler(**SCHEDULE, **TRAILING), False),
    "lcm-sdxl": (XL | {"time_cond_proj_dim": 32}, lambda: LCMScheduler(**SCHEDULE), False),
    "ssd1b": (SSD, lambda: EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading", steps_offset=1), False),
    "lcm-ssd1b-taesdxl": (SSD | {"time_cond_proj_dim": 32}, lambda: LCMScheduler(**SCHEDULE), True),
}  # fmt: skip


def text_encoder(kind, width: int, act: str, **more):
    config = CLIPTextConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=LENGTH, eos_token_id=2, hidden_act=act, **more,
    )  # fmt: skip
    return kind(config).eval()


def build(folder: Path, family: str):
    """A float32 pipeline of diffusers; `folder` takes its tokenizers' files."""
    torch.manual_seed(0)
    config, scheduler, tiny = FAMILIES[family]
    unet = UNet2DConditionModel(**config).eval()
    if tiny:
        vae = AutoencoderTiny(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        )  # fmt: skip
    else:
        vae = AutoencoderKL(
            block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=16,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            scaling_factor=0.13025, force_upcast=True,
        )  # fmt: skip
    tokenizers.build(WORDS, folder / "first", model_max_length=LENGTH)
    first = CLIPTokenizer.from_pretrained(str(folder / "first"))
    shared = {"unet": unet, "vae": vae.eval(), "tokenizer": first, "scheduler": scheduler()}
    if "addition_embed_type" not in config:
        pipe = StableDiffusionPipeline(
            **shared, text_encoder=text_encoder(CLIPTextModel, 16, "gelu"), safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
    else:
        second = CLIPTokenizer.from_pretrained(str(folder / "first"), pad_token="!")  # as OpenCLIP
        second.save_pretrained(str(folder / "second"))
        pipe = StableDiffusionXLPipeline(
            **shared, text_encoder=text_encoder(CLIPTextModel, 16, "quick_gelu"), tokenizer_2=second,
            text_encoder_2=text_encoder(CLIPTextModelWithProjection, 24, "gelu", projection_dim=20),
            add_watermarker=False,
        )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe
