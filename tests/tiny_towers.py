"""CLIP models and a DINOv2 of a few thousand parameters, and the same ones by transformers with random weights."""

from dataclasses import asdict, replace

from lcm_jax.models.clip import TextConfig
from lcm_jax.models.vit import CLIPConfig, VisionConfig


def small_clip(act: str = "quick_gelu", width: int = 24, heads: int = 2, mlp: int = 40) -> CLIPConfig:
    """Images of 24 x 24 in patches of 8, texts of 77 tokens of CLIP's vocabulary cut to 600 ids."""
    return CLIPConfig(
        VisionConfig(width, mlp, 2, heads, act, patch_size=8, image_size=24),
        TextConfig(16, 32, 2, 2, act, vocab_size=600, eos_token_id=599, projection_dim=12),
    )


def small_dinov2() -> VisionConfig:
    return VisionConfig(24, 96, 2, 3, "gelu", 1e-6, layer_scale=True, patch_size=4, image_size=20, pre_norm=False)


def randomize(model, seed: int = 0):
    """Return a torch module with every parameter random, norms and biases included, so that no term can hide."""
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "ln_1.weight", "ln_2.weight")):
                weight.copy_(1 + 0.2 * noise)
            else:
                weight.copy_(0.2 * noise)
    return model.eval()


def transformers_clip(config: CLIPConfig, seed: int = 0):
    """Return transformers' CLIPModel of a config, with random weights."""
    import transformers

    names = ("hidden_size intermediate_size num_hidden_layers num_attention_heads hidden_act layer_norm_eps").split()
    own = lambda part, *more: {name: asdict(part)[name] for name in [*names, *more]}  # noqa: E731
    text = own(config.text, "vocab_size", "max_position_embeddings", "eos_token_id")
    vision = own(config.vision, "patch_size", "image_size")
    options = transformers.CLIPConfig(
        text_config=text | {"projection_dim": config.text.projection_dim, "bos_token_id": 0, "pad_token_id": 1},
        vision_config=vision | {"projection_dim": config.text.projection_dim},
        projection_dim=config.text.projection_dim,
    )
    return randomize(transformers.CLIPModel(options), seed)


WORDS = ("a", "red", "blue", "circle", "square", "photo", "of", ",", "left")


def write_tokenizer(folder) -> CLIPConfig:
    """Write a CLIP tokenizer of a few words; return the small CLIP model that it fits."""
    from lcm_jax.data import tokenizer

    tokenizer.build(WORDS, folder, 77)
    size = len(tokenizer.load(folder))
    config = small_clip()
    return replace(config, text=replace(config.text, vocab_size=size, eos_token_id=size - 1))
