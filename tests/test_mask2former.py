"""Mask2Former with a Swin backbone, compared with transformers on random weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from lcm_jax.models import mask2former, pixel_decoder, swin
from lcm_jax.models.layers import abstract_network
from lcm_jax.models.mask2former import Mask2Former, Mask2FormerConfig
from lcm_jax.weights import naming
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.trees import match_params, to_params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

STAGES = ["stage1", "stage2", "stage3", "stage4"]
# Windows of 3 do not divide any of the features, so that all of them are filled up; the last ones are smaller.
SIZE = (64, 96)


def reference_config(**options):
    backbone = transformers.SwinConfig(
        embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 2), window_size=3, out_features=STAGES
    )
    sizes = {"feature_size": 32, "mask_feature_size": 12, "hidden_dim": 16, "encoder_feedforward_dim": 24}
    sizes |= {"encoder_layers": 1, "decoder_layers": 4, "num_attention_heads": 2, "dim_feedforward": 24}
    return transformers.Mask2FormerConfig(
        backbone_config=backbone, **sizes, num_queries=7, num_labels=5, attn_implementation="eager", **options
    )


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """transformers' network in a small size, and the folder that it writes."""
    torch.manual_seed(0)
    network = transformers.Mask2FormerForUniversalSegmentation(reference_config()).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            scale = name.endswith("weight") and parameter.ndim == 1
            parameter.copy_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.2) + scale)
    folder = tmp_path_factory.mktemp("mask2former")
    network.save_pretrained(folder)
    return network, folder


@pytest.fixture(scope="module")
def converted(reference):
    """Our network, its parameters, and the tensors of the file."""
    _, folder = reference
    network = Mask2Former.from_config(json.loads((folder / "config.json").read_text()))
    tensors = load_file(folder / "model.safetensors")
    abstract = abstract_network(network, jax.ShapeDtypeStruct((1, *SIZE, 3), jnp.float32))
    return network, to_params("mask2former", tensors, abstract), tensors


def test_predictions_equal_transformers(reference, converted):
    theirs, _ = reference
    network, params, _ = converted
    images = np.random.default_rng(0).normal(size=(2, *SIZE, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(pixel_values=torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    ours = jax.jit(lambda params, images: network.apply({"params": params}, images))(params, images)
    assert ours.classes.shape == (2, 7, 6) and ours.masks.shape == (2, 7, 16, 24)
    masks = expected.masks_queries_logits.numpy()
    assert (masks > 0).mean(axis=(2, 3)).min() < 0.9 and masks.max() > 0, "masks that leave something out"
    np.testing.assert_allclose(ours.classes, expected.class_queries_logits.numpy(), atol=1e-4)
    np.testing.assert_allclose(ours.masks, masks, atol=1e-4)


def test_a_batch_does_not_mix_images(converted):
    """One image alone has the same predictions; every mask depends on its own image only."""
    network, params, _ = converted
    backbone = swin.SwinBackbone(network.config.backbone)
    inner = params["model"]["pixel_level_module"]["encoder"]
    images = np.random.default_rng(1).normal(size=(2, 32, 32, 3)).astype(np.float32)
    run = jax.jit(lambda images: backbone.apply({"params": inner}, images))
    for both, alone in zip(run(images), run(np.stack([images[1], images[1]])), strict=True):
        np.testing.assert_allclose(both[1], alone[0], atol=1e-5)


def test_sampling_equals_grid_sample():
    rng = np.random.default_rng(0)
    values, points = rng.normal(size=(2, 5, 7, 3)), rng.uniform(-0.3, 1.3, size=(2, 50, 2))
    points[0, :4] = [[0, 0], [1, 1], [0.5 / 7, 0.5 / 5], [1 + 0.5 / 7, 0.5]]  # borders, a center, and where all is 0
    values, points = values.astype(np.float32), points.astype(np.float32)
    grid = torch.from_numpy(2 * points - 1)[:, None]
    expected = torch.nn.functional.grid_sample(
        torch.from_numpy(values).permute(0, 3, 1, 2), grid, "bilinear", "zeros", align_corners=False
    )
    ours = pixel_decoder.sample_bilinear(jnp.asarray(values), jnp.asarray(points))
    np.testing.assert_allclose(ours, expected[:, :, 0].permute(0, 2, 1), atol=1e-5)


@pytest.mark.parametrize("size", [(9, 20), (3, 4), (5, 7)])
def test_resizing_equals_interpolate(size):
    values = np.random.default_rng(0).normal(size=(1, 5, 7, 2)).astype(np.float32)
    tensor = torch.from_numpy(values).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(tensor, size, mode="bilinear", align_corners=False)
    np.testing.assert_allclose(pixel_decoder.resize(jnp.asarray(values), size), expected.permute(0, 2, 3, 1), atol=1e-6)


def test_shifted_windows_keep_apart_what_was_not_together():
    mask = swin.shift_mask(6, 6, window=3, shift=1)
    assert mask.shape == (4, 9, 9) and set(np.unique(mask)) == {-100, 0}
    assert not mask[0].any(), "the first window lies within the image"
    corner = mask[3].reshape(3, 3, 3, 3)  # of four areas: 2 x 2, 2 x 1, 1 x 2 and 1 x 1 positions
    assert (corner[0, 0] == 0).tolist() == [[True, True, False], [True, True, False], [False, False, False]]
    assert (corner[2, 2] == 0).sum() == 1
    assert swin.relative_positions(2).tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]


def test_a_query_without_a_mask_attends_to_all():
    masks = jnp.stack([jnp.full((4, 4), -1.0), jnp.where(jnp.arange(4)[:, None] < 2, 1.0, -1.0) * jnp.ones((4, 4))], -1)
    allowed = mask2former.attention_mask(masks[None], (2, 2))
    assert allowed.tolist() == [[[True] * 4, [True, True, False, False]]]


def test_the_published_network_has_its_keys_and_shapes():
    """Swin-S of the published config, both without memory; transformers holds the keys of a file in later names."""
    config = transformers.Mask2FormerConfig(num_labels=80)
    with torch.device("meta"):
        theirs = transformers.Mask2FormerForUniversalSegmentation(config)
    network = Mask2Former(Mask2FormerConfig())
    assert mask2former.read_config(config.to_dict()) == network.config
    params = flatten_dict(abstract_network(network, jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)))
    own = {name: p for name, p in theirs.named_parameters() if ".swin.layernorm." not in name}
    assert len(params) == len(own)
    assert sum(leaf.size for leaf in params.values()) == sum(p.numel() for p in own.values()) == 68_739_547


def test_every_key_comes_back(converted):
    _, params, tensors = converted
    keys = {key for key in tensors if naming.modern_key("mask2former", key)}
    assert {naming.to_key(path) for path in flatten_dict(params)} == keys
    assert tensors.keys() - keys == {
        "criterion.empty_weight",
        "model.pixel_level_module.encoder.swin.layernorm.bias",
        "model.pixel_level_module.encoder.swin.layernorm.weight",
    }


def test_old_files_have_more_that_is_not_read(converted):
    network, params, tensors = converted
    block = "model.pixel_level_module.encoder.encoder.layers.0.blocks.0.attention.self.relative_position_index"
    match_params("mask2former", tensors | {block: np.zeros((9, 9), np.int64)}, params)


def test_weights_of_another_network_are_an_error(converted):
    _, params, tensors = converted
    lacking = {key: tensor for key, tensor in tensors.items() if key != "class_predictor.bias"}
    with pytest.raises(ModelError, match=r"1 keys missing.*\n.*- class_predictor\.bias"):
        match_params("mask2former", lacking, params)
    with pytest.raises(ModelError, match=r"1 extra.*\n.*\+ model\.more float32\[1\]"):
        match_params("mask2former", tensors | {"model.more": np.zeros(1, np.float32)}, params)
    other = tensors | {"class_predictor.bias": np.zeros(7, np.float32)}
    with pytest.raises(ModelError, match=r"! class_predictor\.bias \[7\], by the config \[6\]"):
        match_params("mask2former", other, params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre_norm": True}, "pre_norm=True"),
        ({"backbone_config": None}, "backbone_config=None is not supported"),
        ({"id2label": "person"}, "id2label='person' is not supported"),
        ({"hidden_dim": 6}, "hidden_dim=6 is not a multiple of 4"),
        ({"feature_size": 48}, "feature_size=48 is not a multiple of 32"),
        ({"mystery": 1}, r"mystery=1 \(unknown option\)"),
    ],
)
def test_unsupported_configs_are_named(change, message):
    config = reference_config().to_dict() | change
    with pytest.raises(ValueError, match=message):
        mask2former.read_config(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": [1, 1]}, r"depths=\[1, 1\]"),
        ({"num_heads": [3, 2, 2, 2]}, r"not multiples of num_heads=\[3, 2, 2, 2\]"),
        ({"use_absolute_embeddings": True}, "use_absolute_embeddings=True"),
    ],
)
def test_unsupported_backbones_are_named(change, message):
    config = reference_config().to_dict()
    with pytest.raises(ValueError, match=message):
        mask2former.read_config(config | {"backbone_config": config["backbone_config"] | change})


def test_images_of_other_sizes_are_an_error(converted):
    network, params, _ = converted
    with pytest.raises(ValueError, match="40 x 64 are not supported; pad them to multiples of 32"):
        network.apply({"params": params}, jnp.zeros((1, 64, 40, 3)))
