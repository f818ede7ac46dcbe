"""CLIP towers, their inputs and their scores against OpenCLIP, torchvision and torchmetrics, with random weights."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from reference_tools import reference
from tiny_towers import randomize, small_clip

from lcm_jax.evaluation import clip_inputs
from lcm_jax.models.vit import CLIP_CONFIGS, CLIPModel
from lcm_jax.weights.towers import clip_params

torch = pytest.importorskip("torch")
open_clip = reference("open_clip")
transforms = reference("torchvision.transforms")

SIZES = [(37, 53), (53, 37), (24, 24), (24, 31), (90, 25), (25, 90), (47, 48)]


def image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)


# Heads of 8 to 13 channels, and MLPs of a width that is no multiple of the model's, as ViT-g and ViT-bigG have them.
@pytest.mark.parametrize(
    ("width", "heads", "ratio", "act"), [(22, 2, 4.3637, "gelu"), (26, 2, 4.9231, "gelu"), (24, 3, 4.0, "quick_gelu")]
)
def test_clip_equals_open_clip(width, heads, ratio, act):
    config = small_clip(act, width, heads, int(width * ratio))
    vision = {"image_size": 24, "layers": 2, "width": width, "head_width": width // heads, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 600, "width": 16, "heads": 2, "layers": 2, "mlp_ratio": 2.0}
    model = randomize(open_clip.CLIP(12, vision | {"mlp_ratio": ratio}, text, quick_gelu=act == "quick_gelu"))
    pixels = np.random.default_rng(0).normal(size=(2, 24, 24, 3)).astype(np.float32)
    ids = np.random.default_rng(1).integers(0, 598, (2, 77)).astype(np.int32)
    ids[0, 9], ids[0, 10:], ids[1, 76] = 599, 0, 599  # OpenCLIP pads by 0
    with torch.no_grad():
        expected = (
            model.encode_image(torch.from_numpy(pixels).permute(0, 3, 1, 2)),
            model.encode_text(torch.from_numpy(ids).long()),
            model.logit_scale.exp(),
        )
    tensors = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    assert "visual.transformer.resblocks.1.attn.in_proj_weight" in tensors
    ours = jax.jit(CLIPModel(config).apply)({"params": clip_params(tensors, config, "file")}, pixels, ids)
    for mine, theirs in zip(ours, expected, strict=True):
        assert np.abs(np.asarray(mine) - theirs.numpy()).max() <= 1e-5 * np.abs(theirs.numpy()).max()


@pytest.mark.parametrize("name", CLIP_CONFIGS)
def test_every_option_is_that_of_open_clip(name):
    """Of the same model with OpenAI's activation where OpenAI made it."""
    config, by_openai = CLIP_CONFIGS[name], name.startswith(("ViT-B", "ViT-L"))
    file = name.replace("/", "-").replace("@336px", "-336") + ("-quickgelu" if by_openai else "")
    published = json.loads((Path(open_clip.__file__).parent / "model_configs" / f"{file}.json").read_text())
    vision, text = published["vision_cfg"], published["text_cfg"]
    width = vision["width"]
    assert (config.vision.hidden_size, config.vision.num_hidden_layers) == (width, vision["layers"])
    assert config.vision.num_attention_heads == width // vision.get("head_width", 64)
    assert config.vision.intermediate_size == int(width * vision.get("mlp_ratio", 4.0))
    assert (config.vision.patch_size, config.vision.image_size) == (vision["patch_size"], vision["image_size"])
    assert config.text.hidden_size == text["width"] and config.text.intermediate_size == 4 * text["width"]
    assert (config.text.num_attention_heads, config.text.num_hidden_layers) == (text["heads"], text["layers"])
    assert (config.text.vocab_size, config.text.max_position_embeddings) == (text["vocab_size"], text["context_length"])
    assert config.text.projection_dim == published["embed_dim"]
    act = "quick_gelu" if published.get("quick_gelu") else "gelu"
    assert config.vision.hidden_act == config.text.hidden_act == act


@pytest.mark.parametrize("size", SIZES)
def test_inputs_equal_open_clip(size):
    theirs = open_clip.transform.image_transform(24, is_train=False)(Image.fromarray(image(*size)))
    np.testing.assert_array_equal(clip_inputs.for_open_clip(image(*size), 24), theirs.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("size", SIZES)
def test_inputs_equal_those_of_dgm_eval(size):
    """Its transform, written from torchvision's parts."""
    parts = [transforms.Resize((24, 24), transforms.InterpolationMode.BICUBIC), transforms.ToTensor()]
    parts.append(transforms.Normalize(clip_inputs.IMAGENET_MEAN, clip_inputs.IMAGENET_STD))
    theirs = transforms.Compose(parts)(Image.fromarray(image(*size)))
    np.testing.assert_array_equal(clip_inputs.for_dinov2(image(*size), 24), theirs.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("size", SIZES)
def test_inputs_equal_those_of_hps(size):
    """A tensor resized by torchvision, which rounds nothing, then padded by 0."""
    functional = transforms.functional
    theirs = functional.to_tensor(Image.fromarray(image(*size)))
    height, width = (round(side * (24 / max(size))) for side in size)
    theirs = functional.resize(theirs, [height, width], transforms.InterpolationMode.BICUBIC)
    rows, columns = 24 - height, 24 - width
    theirs = functional.pad(theirs, [columns // 2, rows // 2, columns - columns // 2, rows - rows // 2])
    theirs = functional.normalize(theirs, clip_inputs.MEAN, clip_inputs.STD).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(clip_inputs.for_hps(image(*size), 24), theirs, atol=2e-5)
