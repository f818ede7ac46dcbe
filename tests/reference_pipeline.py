"""Tiny random pipelines of diffusers, written by diffusers itself: what other people's folders look like."""

from functools import cache
from pathlib import Path

import pytest
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lcm_jax.data import tokenizer as tokenizers

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

WORDS = "a red blue circle square above below photo of".split()
LENGTH = 12
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "lcm": lambda: diffusers.LCMScheduler(**SCHEDULE),
    "ddim": lambda: diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    "trailing": lambda: diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False, timestep_spacing="trailing"),
    "pndm": lambda: diffusers.PNDMScheduler(**SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
    "dpm": lambda: diffusers.DPMSolverMultistepScheduler(
        **SCHEDULE, timestep_spacing="trailing", final_sigmas_type="zero", lower_order_final=True
    ),
}


@cache
def networks(student: bool) -> dict:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        time_cond_proj_dim=32 if student else None,
    )
    if student:
        with torch.no_grad():
            unet.time_embedding.cond_proj.weight.mul_(30.0)  # so that the weight of guidance is seen in the pictures
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=1000,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            eos_token_id=2,
        )
    )
    return {"unet": unet.eval(), "vae": vae.eval(), "text_encoder": text.eval()}


def build(folder: Path, scheduler: str = "lcm"):
    """A float32 pipeline of diffusers with its tokenizer's files in `folder`."""
    tokenizers.build(WORDS, folder, model_max_length=LENGTH)
    kind = diffusers.LatentConsistencyModelPipeline if scheduler == "lcm" else diffusers.StableDiffusionPipeline
    pipe = kind(
        **networks(scheduler == "lcm"),
        tokenizer=CLIPTokenizer.from_pretrained(str(folder)),
        scheduler=SCHEDULERS[scheduler](),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
