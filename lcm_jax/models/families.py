"""The published latent diffusion models as data: the config.json of each component, as its authors ship it.

Values that equal the defaults of the class are omitted. `StableDiffusion.from_configs` accepts `FAMILIES[name]`.
"""

from typing import Any

# fmt: off
Config = dict[str, Any]

SCHEDULE: Config = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon", "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False,
}
DDIM = SCHEDULE | {"_class_name": "DDIMScheduler"}
EULER = SCHEDULE | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
TURBO = SCHEDULE | {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
LCM = SCHEDULE | {"_class_name": "LCMScheduler", "original_inference_steps": 50, "timestep_scaling": 10.0}
VELOCITY = {"prediction_type": "v_prediction"}

VAE: Config = {
    "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": 4, "layers_per_block": 2,
    "block_out_channels": [128, 256, 512, 512], "norm_num_groups": 32, "sample_size": 512, "scaling_factor": 0.18215,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}
VAE_XL = VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}
# Rescaled weights, so that no activation overflows in half precision.
VAE_XL_FP16_FIX = VAE_XL | {"force_upcast": False}
TAESD: Config = {"_class_name": "AutoencoderTiny", "latent_channels": 4, "scaling_factor": 1.0}

CLIP_L: Config = {
    "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": 49408, "hidden_size": 768,
    "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 77,
    "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 768, "bos_token_id": 0, "eos_token_id": 2,
    "pad_token_id": 1,
}
# OpenCLIP's ViT-H without the last layer, which Stable Diffusion 2 does not use.
OPENCLIP_H = CLIP_L | {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
    "hidden_act": "gelu", "projection_dim": 512,
}
OPENCLIP_BIGG = CLIP_L | {
    "architectures": ["CLIPTextModelWithProjection"], "hidden_size": 1280, "intermediate_size": 5120,
    "num_hidden_layers": 32, "num_attention_heads": 20, "hidden_act": "gelu", "projection_dim": 1280,
}

UNET_SD1: Config = {
    "_class_name": "UNet2DConditionModel", "sample_size": 64, "in_channels": 4, "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
UNET_SD2 = UNET_SD1 | {
    "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True,
}
UNET_XL = UNET_SD2 | {
    "sample_size": 128, "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20], "transformer_layers_per_block": [1, 2, 10],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}
UNET_SSD1B = UNET_XL | {
    "mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
}
GUIDED = {"time_cond_proj_dim": 256}  # the guidance weight input of a latent consistency model
MASKED = {"in_channels": 9}  # latents, mask, latents of the masked image

SD1 = {"unet": UNET_SD1, "vae": VAE, "text_encoder": CLIP_L, "scheduler": DDIM}
SD2 = {"unet": UNET_SD2, "vae": VAE, "text_encoder": OPENCLIP_H, "scheduler": DDIM}
XL = {"unet": UNET_XL, "vae": VAE_XL, "text_encoder": CLIP_L, "text_encoder_2": OPENCLIP_BIGG, "scheduler": EULER}
TURBO_XL = {"model_index": {"force_zeros_for_empty_prompt": True}, "scheduler": TURBO}

FAMILIES: dict[str, dict[str, Config]] = {
    "sd15": SD1,  # 1.4, 1.5 and models fine-tuned from them
    "sd15-inpainting": SD1 | {"unet": UNET_SD1 | MASKED},
    "lcm-dreamshaper": SD1 | {"unet": UNET_SD1 | GUIDED, "scheduler": LCM},
    "sd21": SD2,  # 2.0 and 2.1 base, 512 pixels
    "sd21-768": SD2 | {"unet": UNET_SD2 | {"sample_size": 96, "upcast_attention": True}, "scheduler": DDIM | VELOCITY},
    "sd2-inpainting": SD2 | {"unet": UNET_SD2 | MASKED},
    "sd-turbo": SD2 | {"scheduler": EULER | {"timestep_spacing": "trailing"}},
    "sdxl": XL,
    "sdxl-fp16-fix": XL | {"vae": VAE_XL_FP16_FIX},
    "sdxl-inpainting": XL | {"unet": UNET_XL | MASKED},
    "sdxl-turbo": XL | TURBO_XL | {"unet": UNET_XL | {"sample_size": 64}},
    "lcm-sdxl": XL | {"unet": UNET_XL | GUIDED, "scheduler": LCM},
    "ssd1b": XL | {"unet": UNET_SSD1B},
    "lcm-ssd1b": XL | {"unet": UNET_SSD1B | GUIDED, "scheduler": LCM},
    "sd15-taesd": SD1 | {"vae": TAESD},
    "sdxl-taesdxl": XL | {"vae": TAESD},
}
# fmt: on
