"""Mask2Former with a Swin backbone, compared with transformers on random weights."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from lcm_jax.evaluation import detector
from lcm_jax.models import mask2former, pixel_decoder, swin
from lcm_jax.models.mask2former import Mask2Former, Mask2FormerConfig
from lcm_jax.weights import naming
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.mask2former import abstract_params, mask2former_params
from lcm_jax.weights.published import Weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

STAGES = ["stage1", "stage2", "stage3", "stage4"]
# Windows of 3 do not divide any of the features, so that all of them are filled up; the last ones are smaller.
SIZE = (64, 96)


def reference_config(num_labels=5):
    backbone = transformers.SwinConfig(
        embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 2), window_size=3, out_features=STAGES
    )
    sizes = {"feature_size": 32, "mask_feature_size": 12, "hidden_dim": 16, "encoder_feedforward_dim": 24}
    sizes |= {"encoder_layers": 1, "decoder_layers": 4, "num_attention_heads": 2, "dim_feedforward": 24}
    return transformers.Mask2FormerConfig(
        backbone_config=backbone, **sizes, num_queries=7, num_labels=num_labels, attn_implementation="eager"
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
    return network, mask2former_params(tensors, network.config, "a file"), tensors


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
    published = config.to_dict()
    published["backbone_config"] |= {"path_norm": True, "pruned_heads": {}, "is_decoder": False, "torch_dtype": None}
    assert mask2former.read_config(published | {"num_hidden_layers": 10, "torch_dtype": "float32"}) == network.config
    params = flatten_dict(abstract_params(network.config))
    own = {name: p for name, p in theirs.named_parameters() if ".swin.layernorm." not in name}
    assert len(params) == len(own)
    assert sum(leaf.size for leaf in params.values()) == sum(p.numel() for p in own.values()) == 68_739_547


def test_every_key_comes_back(converted):
    _, params, tensors = converted
    keys = {naming.to_key(path) for path in flatten_dict(params)}
    assert keys <= tensors.keys()
    assert tensors.keys() - keys == {
        "criterion.empty_weight",
        "model.pixel_level_module.encoder.swin.layernorm.bias",
        "model.pixel_level_module.encoder.swin.layernorm.weight",
    }


def test_old_files_have_more_that_is_not_read(converted):
    network, _, tensors = converted
    block = "model.pixel_level_module.encoder.encoder.layers.0.blocks.0.attention.self.relative_position_index"
    mask2former_params(tensors | {block: np.zeros((9, 9), np.int64)}, network.config, "a file")


def test_weights_of_another_network_are_an_error(converted):
    network, _, tensors = converted
    lacking = {key: tensor for key, tensor in tensors.items() if key != "class_predictor.bias"}
    with pytest.raises(ModelError, match=r"1 keys missing.*\n.*- class_predictor\.bias"):
        mask2former_params(lacking, network.config, "a file")
    with pytest.raises(ModelError, match=r"1 extra.*\n.*\+ model\.more float32\[1\]"):
        mask2former_params(tensors | {"model.more": np.zeros(1, np.float32)}, network.config, "a file")
    other = tensors | {"class_predictor.bias": np.zeros(7, np.float32)}
    with pytest.raises(ModelError, match=r"! class_predictor\.bias \[7\], which should be \[6\]"):
        mask2former_params(other, network.config, "a file")


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


# ---- the detector ---------------------------------------------------------------------------------------------------


def test_instances_equal_transformers_at_its_own_size():
    """transformers resizes masks to 384 x 384; for an image of this size, that is what GenEval's detector does."""
    rng = np.random.default_rng(0)
    classes, masks = rng.normal(size=(1, 7, 6)), rng.normal(size=(1, 7, 12, 12)).repeat(8, 2).repeat(8, 3)
    classes, masks = (3 * classes).astype(np.float32), (masks - 0.3).astype(np.float32)
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

    outputs = SimpleNamespace(
        class_queries_logits=torch.from_numpy(classes), masks_queries_logits=torch.from_numpy(masks)
    )
    theirs = Mask2FormerImageProcessorPil().post_process_instance_segmentation(
        outputs, threshold=0.0, target_sizes=[(384, 384)], return_binary_maps=True
    )[0]
    predictions = mask2former.Predictions(jnp.asarray(classes), jnp.asarray(masks))
    scores, labels, inside = detector.find_instances(predictions, (384, 384), (384, 384))
    assert len(scores) == 35, "every pair of query and label; transformers has as many as queries"
    best = {round(segment["score"], 4): segment for segment in theirs["segments_info"]}
    maps = {
        round(s["score"], 4): m.numpy() for s, m in zip(theirs["segments_info"], theirs["segmentation"], strict=True)
    }
    for score, label, mask in list(zip(np.asarray(scores), np.asarray(labels), np.asarray(inside), strict=True))[:7]:
        key = min(best, key=lambda each: abs(each - float(score)))
        assert abs(key - score) < 2e-4 and best[key]["label_id"] == label
        assert (maps[key] != mask).mean() < 1e-4


def test_masks_of_padded_images_are_those_of_the_image():
    """A mask of the upper half of the padded input: the image is 60 of its 96 rows, and half as large."""
    masks = np.where(np.arange(24)[:, None] < 12, 5.0, -5.0) * np.ones((24, 16))
    predictions = mask2former.Predictions(jnp.array([[[9.0, 0, 0]]]), jnp.asarray(masks, jnp.float32)[None, None])
    scores, labels, inside = detector.find_instances(predictions, (30, 32), (60, 64))
    assert inside.shape == (2, 30, 32) and labels[0] == 0
    assert inside[0].all(1).tolist() == [True] * 24 + [False] * 6, "48 rows of the input"
    assert 0.97 < scores[0] < 1.0
    assert detector.mask_boxes(np.asarray(inside)).tolist() == [[0, 0, 32, 24]] * 2
    assert detector.mask_boxes(np.zeros((1, 3, 3), bool)).tolist() == [[0, 0, 0, 0]]


def test_objects_have_a_score_above_genevals():
    scores, masks = np.array([0.3, 0.31, 0.9], np.float32), np.ones((3, 4, 5), bool)
    kept = detector.keep_objects(scores, np.array([0, 1, 1]), masks, ("person", "bicycle"))
    assert kept.names == ("bicycle", "bicycle") and kept.scores.tolist() == scores[1:].tolist()
    assert kept.boxes.tolist() == [[0, 0, 5, 4]] * 2 and kept.masks.shape == (2, 4, 5)
    with pytest.raises(ValueError, match="the detector's scores are not finite; check the weights of facebook/mask2"):
        detector.keep_objects(np.array([0.9, np.nan, 0.1]), np.array([0, 1, 1]), masks, ("person", "bicycle"))


@pytest.mark.parametrize(
    ("size", "fitted"), [((512, 512), (800, 800)), ((1024, 1024), (800, 800)), ((300, 1000), (400, 1333))]
)
def test_images_are_fitted_as_mmdet_does(size, fitted):
    assert detector.fitted_size(*size) == fitted


def test_images_are_resized_normalized_and_padded(monkeypatch):
    monkeypatch.setattr(detector, "SHORT", 60)
    monkeypatch.setattr(detector, "LONG", 100)
    image = np.random.default_rng(0).integers(0, 256, (45, 50, 3), np.uint8)
    prepared = np.asarray(detector.prepare(jnp.asarray(image)))
    assert prepared.shape == (1, 64, 96, 3)
    pixels = prepared[0] * np.float32(detector.STD) + np.float32(detector.MEAN)
    tensor = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(tensor, (60, 67), mode="bilinear", align_corners=False).round()
    difference = np.abs(pixels[:60, :67] - expected[0].permute(1, 2, 0).numpy())
    assert difference.max() < 1.01 and difference.mean() < 0.01, "some halves are rounded down"
    np.testing.assert_allclose(pixels[60:], 128, atol=1e-4)
    np.testing.assert_allclose(pixels[:, 67:], 128, atol=1e-4)


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory):
    """A folder of weights with the detector in a small size, with the 80 classes."""
    own = tmp_path_factory.mktemp("weights") / detector.FOLDER
    network = transformers.Mask2FormerForUniversalSegmentation(reference_config(num_labels=80))
    network.save_pretrained(own)
    return own.parent


def test_a_detector_is_opened_by_its_folder(folder, monkeypatch):
    monkeypatch.setattr(detector, "SHORT", 32)
    monkeypatch.setattr(detector, "MIN_SCORE", 0.0)
    detect = detector.open_detector(Weights(folder))
    found = detect(np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8))
    assert len(found.boxes) == len(found.scores) == len(found.names) == len(found.masks) <= 100
    assert found.masks.shape[1:] == (24, 20) and set(found.names) <= set(detector.NAMES)
    assert len(detector.NAMES) == len(set(detector.NAMES)) == 80 and detector.NAMES[64:67] == (
        "computer mouse",
        "tv remote",
        "computer keyboard",
    )


def test_missing_or_foreign_weights_are_one_line(folder, tmp_path):
    with pytest.raises(ModelError, match=r"config\.json does not exist; get config\.json from facebook/mask2former"):
        detector.open_detector(Weights(tmp_path))
    own = tmp_path / detector.FOLDER
    own.mkdir()
    config = json.loads((folder / detector.FOLDER / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"model\.safetensors does not exist"):
        detector.open_detector(Weights(tmp_path))
    (own / "config.json").write_text(json.dumps(config | {"pre_norm": True}))
    with pytest.raises(ModelError, match=r"config\.json: Mask2Former config .* pre_norm=True"):
        detector.open_detector(Weights(tmp_path))
    (own / "config.json").write_text(json.dumps(config | {"id2label": {"0": "person"}}))
    with pytest.raises(ModelError, match="has 1 classes; use facebook/mask2former"):
        detector.open_detector(Weights(tmp_path))
