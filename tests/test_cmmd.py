"""CMMD and FD-DINOv2 against their formulas written out."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny_towers
from scipy.linalg import sqrtm

from lcm_jax.evaluation import clip_towers, cmmd, fd_dinov2
from lcm_jax.evaluation.clip_inputs import for_cmmd, for_dinov2
from lcm_jax.evaluation.clip_towers import unit
from lcm_jax.evaluation.evaluate import Resources
from lcm_jax.models.layers import abstract_network
from lcm_jax.models.vit import CLIPModel, VisionTransformer
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.published import Weights
from lcm_jax.weights.stored import write_safetensors
from lcm_jax.weights.trees import from_params

RNG = np.random.default_rng(0)
REAL = [(RNG.integers(0, 256, (3, 20, 27, 3), np.uint8), [""] * 3) for _ in range(2)]
MADE = list(RNG.integers(0, 256, (5, 30, 22, 3), np.uint8))


def published_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """The estimator of google-research's cmmd by its formula, in float64."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    kernel = lambda a, b: np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / (2 * 10.0**2)).mean()  # noqa: E731
    return 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))


def test_cmmd_equals_its_formula(monkeypatch):
    monkeypatch.setattr(cmmd, "BLOCK", 16)  # several, and a shorter last one
    rng = np.random.default_rng(1)
    x, y = (unit(rng.normal(shift, 1, (n, 24))).astype(np.float32) for shift, n in ((0, 37), (0.4, 50)))
    assert cmmd.cmmd(x, y) == pytest.approx(published_mmd(x, y), rel=1e-5)
    assert cmmd.cmmd(x, y, cmmd.mean_kernel(y, y)) == cmmd.cmmd(x, y)
    assert cmmd.cmmd(x, x) == pytest.approx(0, abs=1e-6)


def test_cmmd_of_two_points():
    """Of one image each, a quarter turn apart: 1000 (1 + 1 - 2 exp(-2 / 200))."""
    x, y = np.array([[1.0, 0.0]], np.float32), np.array([[0.0, 1.0]], np.float32)
    assert cmmd.cmmd(x, y) == pytest.approx(1000 * (2 - 2 * np.exp(-0.01)), rel=1e-6)


def random_params(network, *shapes):
    rng = np.random.default_rng(2)
    draw = lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, abstract_network(network, *shapes))


def test_cmmd_of_images(tmp_path, monkeypatch):
    config = tiny_towers.small_clip()
    tower = clip_towers.TOWERS[cmmd.MODEL]._replace(config=config)
    monkeypatch.setitem(clip_towers.TOWERS, cmmd.MODEL, tower)
    network = CLIPModel(config)
    shapes = jax.ShapeDtypeStruct((1, 24, 24, 3), np.float32), jax.ShapeDtypeStruct((1, 8), np.int32)
    params = random_params(network, *shapes)
    (tmp_path / "clip-vit-large-patch14-336").mkdir()
    write_safetensors(tmp_path / "clip-vit-large-patch14-336" / "model.safetensors", from_params(params))
    resources = Resources(lambda: iter(REAL), "six images", weights=Weights(tmp_path), batch_size=4)
    metric = cmmd.CMMD.create(resources)
    encode = jax.jit(lambda x: network.apply({"params": params}, x, method="embed_images"))

    def embedded(images):
        return unit(np.asarray(encode(np.stack([for_cmmd(image, 24) for image in images]))))

    expected = published_mmd(embedded(MADE), embedded([image for images, _ in REAL for image in images]))
    rows = metric.measure(MADE, [""] * 5)
    assert metric.result(rows) == {"cmmd": pytest.approx(expected, rel=1e-3, abs=2e-5)}
    assert metric.scores(rows) is None and "to those of six images." in metric.note


def test_fd_dinov2_equals_its_formula(tmp_path, monkeypatch):
    config = tiny_towers.small_dinov2()
    network = VisionTransformer(config)
    params = random_params(network, jax.ShapeDtypeStruct((1, 20, 20, 3), np.float32))
    monkeypatch.setattr(fd_dinov2, "DINOV2_LARGE", config)
    monkeypatch.setattr(fd_dinov2, "SIZE", 12)
    write_safetensors(tmp_path / fd_dinov2.FILE, from_params(params))
    resources = Resources(lambda: iter(REAL * 6), "images", weights=Weights(tmp_path), batch_size=4)
    metric = fd_dinov2.FDDinov2.create(resources)
    encode = jax.jit(lambda x: network.apply({"params": params}, x))

    def statistics(images):
        features = np.asarray(encode(np.stack([for_dinov2(image, 12) for image in images]))).astype(np.float64)
        return features.mean(0), np.cov(features, rowvar=False)

    (mean, covariance), (other, theirs) = statistics(MADE), statistics([i for images, _ in REAL * 6 for i in images])
    root = sqrtm(covariance + 1e-9 * np.eye(24))
    cross = np.trace(sqrtm(root @ theirs @ root).real)
    expected = ((mean - other) ** 2).sum() + np.trace(covariance + theirs) - 2 * cross
    rows = metric.measure(MADE, [""] * 5)
    assert rows["features"].shape == (5, 24)
    assert metric.result(rows)["fd_dinov2"] == pytest.approx(expected, rel=1e-3, abs=1e-4)
    with pytest.raises(ValueError, match="a covariance needs 2 or more images, got 1"):
        metric.result({"features": rows["features"][:1]})


def test_a_reference_without_images_is_refused(monkeypatch):
    monkeypatch.setattr(cmmd, "open_image_encoder", lambda *arguments, **options: None)
    with pytest.raises(ValueError, match="a metric compares with real images, and some.npz has none; use a folder"):
        cmmd.CMMD.create(Resources(None, "some.npz"))


def test_missing_weights_are_named(tmp_path):
    resources = Resources(lambda: iter(REAL), "images", weights=Weights(tmp_path))
    with pytest.raises(ModelError, match=r"dinov2_vitl14_pretrain.pth does not exist; get .*dl.fbaipublicfiles.com"):
        fd_dinov2.FDDinov2.create(resources)
    with pytest.raises(ModelError, match="clip-vit-large-patch14-336/pytorch_model.bin does not exist"):
        cmmd.CMMD.create(resources)


def test_features_that_are_not_finite_are_an_error():
    config = tiny_towers.small_dinov2()
    params = random_params(VisionTransformer(config), jax.ShapeDtypeStruct((1, 20, 20, 3), np.float32))
    params["post_layernorm"]["scale"][3] = np.inf
    features = fd_dinov2.dinov2_features(replace(config), params, 20, 4)
    with pytest.raises(ValueError, match="the embedding of image 0 of a batch is not finite; check the weights"):
        features(MADE)
