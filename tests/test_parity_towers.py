"""CLIP towers, their inputs and their scores against OpenCLIP, torchvision and torchmetrics, with random weights."""

import gzip
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from reference_tools import reference
from tiny_towers import randomize, small_clip, small_dinov2, transformers_clip, write_tokenizer

from lcm_jax.data import tokenizer as tokenizers
from lcm_jax.evaluation import clip_inputs
from lcm_jax.evaluation.clip_score import ClipScore
from lcm_jax.evaluation.clip_towers import Encoders, image_encoder, text_encoder
from lcm_jax.models.vit import CLIP_CONFIGS, CLIPModel, VisionTransformer
from lcm_jax.weights.towers import clip_params, dinov2_params

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


def test_dinov2_equals_timm():
    """Its weights have the names of DINOv2's authors, who have a token for masked patches beside them."""
    timm = reference("timm.models.vision_transformer")
    model = randomize(timm.VisionTransformer(20, 4, num_classes=0, embed_dim=24, depth=2, num_heads=3, init_values=1.0))
    tensors = {key: tensor.numpy() for key, tensor in model.state_dict().items()} | {"mask_token": np.zeros((1, 24))}
    pixels = np.random.default_rng(0).normal(size=(2, 20, 20, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(pixels).permute(0, 3, 1, 2)).numpy()
    ours = jax.jit(VisionTransformer(small_dinov2()).apply)(
        {"params": dinov2_params(tensors, small_dinov2(), "file")}, pixels
    )
    assert np.abs(np.asarray(ours) - theirs).max() <= 1e-5 * np.abs(theirs).max()


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


PROMPTS = [
    "a photo of a cat",
    "  Two   DOGS, one of them (black) -- isn't it?\n",
    "un caf\u00e9 \u00e0 c\u00f4t\u00e9 de l'\u00e9glise, 24.5% \U0001f600 \u7e41\u9ad4",
    "",
    "very " * 90 + "long",
]


def test_prompts_become_the_tokens_of_open_clip(tmp_path):
    """With the published vocabulary; padding differs, which comes after the end of text."""
    lines = gzip.open(open_clip.tokenizer.default_bpe(), "rt", encoding="utf-8").read().split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    theirs = open_clip.SimpleTokenizer()
    vocabulary = {token: id for token, id in theirs.encoder.items() if id < 49406}
    vocabulary |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}  # as published; OpenCLIP has other names
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    config = names | {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "unk_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = tokenizers.load(tmp_path)
    assert len(tokenizer) == CLIP_CONFIGS["ViT-L/14"].text.vocab_size
    ours, expected = tokenizers.encode(tokenizer, PROMPTS), theirs(PROMPTS).numpy()
    expected = np.where(np.cumsum(expected == 49407, axis=1) > 0, 49407, expected)
    np.testing.assert_array_equal(ours, expected)


class Features(torch.nn.Module):
    """A CLIPModel that returns features alone, as it did when torchmetrics was written."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, *inputs):
        return self.model.get_image_features(*inputs).pooler_output

    def get_text_features(self, *inputs):
        return self.model.get_text_features(*inputs).pooler_output


def test_scores_equal_torchmetrics(tmp_path):
    """On images of the size of the tower, which its processor leaves as they are."""
    torchmetrics = reference("torchmetrics.multimodal.clip_score")
    from transformers import CLIPProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    config = write_tokenizer(tmp_path)
    tokenizer = tokenizers.load(tmp_path)
    model = transformers_clip(config)
    images = [image(24, 24), image(24, 24)[::-1], image(24, 24)[:, ::-1]]
    prompts = ["a red circle", "a photo of a blue square", "left"]
    processor = CLIPProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}), tokenizer
    )
    metric = torchmetrics.CLIPScore(lambda: (Features(model), processor))
    with torch.no_grad():
        metric.update([torch.from_numpy(each.transpose(2, 0, 1).copy()) for each in images], prompts)
    params = clip_params({key: tensor.numpy() for key, tensor in model.state_dict().items()}, config, "file")
    encoders = Encoders(
        image_encoder(config, params, clip_inputs.for_transformers, 2), text_encoder(config, params, tokenizer, 2), 1.0
    )
    row = ClipScore(encoders.measure, "small").result(encoders.measure(images, prompts))
    assert row["clip_score_clipped"] == pytest.approx(float(metric.compute()), abs=2e-4)
    assert row["clip_score"] == pytest.approx(float(metric.score / metric.n_samples), abs=2e-4)
