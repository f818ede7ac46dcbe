"""A random text-to-image model of a few thousand parameters in diffusers layout, by this project's own code."""

from pathlib import Path

import jax
import numpy as np

from lcm_jax.data import shapes
from lcm_jax.data import tokenizer as tokenizers
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.recipes.diffusion import SCHEDULE
from lcm_jax.weights import diffusers_folder as folders

UNET = {
    "sample_size": 16,
    "block_out_channels": (16, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
}
VAE = {
    "block_out_channels": (8, 8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "scaling_factor": 0.5,
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 20,
}


# Of one level: half the time to trace and to compile, where many whole runs are tested.
SHALLOW = UNET | {
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}


def write(folder: Path, prediction_type: str = "v_prediction", unet=UNET, scheduler="DDIMScheduler", **options) -> Path:
    """Writes a teacher (or another model, by its scheduler) to `folder` and returns it."""
    tokens = folder.with_name(folder.name + "-tokenizer")
    tokenizers.build(shapes.words(), tokens, model_max_length=20)
    tokenizer = tokenizers.load(tokens)
    text = TEXT | {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_token_id}
    settings = SCHEDULE | {"_class_name": scheduler, "prediction_type": prediction_type} | options
    configs = {"unet": unet, "vae": VAE, "text_encoder": text, "scheduler": settings}
    abstract = StableDiffusion.from_configs(configs).abstract_params()
    rng = np.random.default_rng(0)
    random = lambda leaf: np.asarray(rng.standard_normal(leaf.shape) * (0.2 if leaf.ndim > 1 else 0.05), np.float32)  # noqa: E731
    params = jax.tree.map(random, abstract)
    params = jax.tree_util.tree_map_with_path(  # norms near the identity
        lambda path, leaf: leaf + 1 if path[-1].key == "scale" else leaf, params
    )
    with folders.new_folder(folder) as temporary:
        folders.write_pipeline(temporary, configs, params, tokens, settings)
    return folder
