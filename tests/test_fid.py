"""FID, KID, precision and recall: golden values, samples in parts, and input that is an error.

Their equality with torch-fidelity, pytorch-fid and clean-fid is in test_parity_fid.py.
"""

import jax
import numpy as np
import pytest
from random_inception import random_inception

from lcm_jax.evaluation import inception
from lcm_jax.evaluation.evaluate import Resources, concatenate
from lcm_jax.evaluation.fid import FID, SMALL_SAMPLE, extrapolate, save_reference, small_sample_warning
from lcm_jax.evaluation.frechet import Gaussian, distances_to, fit_gaussian, frechet_distance, make_gaussian, moments
from lcm_jax.evaluation.inception import inception_features, make_measure, read_flavour
from lcm_jax.evaluation.inception_inputs import (
    FLAVOURS,
    clean_fid,
    gigagan,
    prepare_images,
    pytorch_fid,
    torch_fidelity,
)
from lcm_jax.evaluation.kid import KID, discrepancy, kernel_distance
from lcm_jax.evaluation.metrics import METRICS
from lcm_jax.evaluation.precision import Precision, coverage, neighbor_distances
from lcm_jax.evaluation.statistics import Statistics, read_statistics, write_statistics
from lcm_jax.models.inception import InceptionV3, abstract_inception
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.published import Weights


def project(inputs: np.ndarray) -> np.ndarray:
    """Eight features in place of Inception's: means of eight bands of the image."""
    return inputs[:, :296].reshape(len(inputs), 8, -1).mean(-1)


def make_images(count: int, seed: int = 0, size: tuple[int, int] = (9, 7)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8)


def make_resources(images, flavour: str = "torch-fidelity", **options) -> Resources:
    batches = lambda: [(images[i : i + 5], [""] * len(images[i : i + 5])) for i in range(0, len(images), 5)]  # noqa: E731
    settings = {"fid_flavour": flavour}
    resources = Resources(real_images=batches, reference="val2014", settings=settings, **options)
    resources.once(("inception", flavour), lambda: make_measure(project, flavour))
    return resources


# ---- the network and its weights ------------------------------------------------------------------------------------


def test_the_network_has_the_parameters_of_the_published_file():
    params = abstract_inception(InceptionV3())
    assert len(jax.tree.leaves(params)) == 94 * 5  # convolutions, each with a kernel and four arrays of its norm
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 21_785_568 + 2 * 17_216  # with statistics of the norms


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop("Mixed_6c.branch7x7dbl_2.conv.weight"),
            r"- Mixed_6c\.branch7x7dbl_2\.conv\.weight",
        ),
        (lambda tensors: tensors.update(aux=np.zeros(1, np.float32)), r"1 extra \+.*\n\+ aux"),
        (
            lambda tensors: tensors.update({"Mixed_7a.branch3x3_1.bn.bias": np.zeros(3, np.float32)}),
            r"! Mixed_7a\.branch3x3_1\.bn\.bias \[3\], which should be \[192\]",
        ),
    ],
)
def test_other_weights_are_an_error_that_names_the_keys(change, message):
    tensors = random_inception() | {"Mixed_5b.branch1x1.bn.num_batches_tracked": np.zeros((), np.int64)}
    change(tensors)
    with pytest.raises(ModelError, match=message):
        inception_features(tensors, 2)


def test_missing_weights_are_an_error_that_names_the_file(tmp_path):
    resources = Resources(real_images=lambda: [], reference="val2014", weights=Weights(tmp_path))
    with pytest.raises(ModelError, match=r"pt_inception-2015-12-05-6726825d\.pth does not exist; get .* from https://"):
        KID.create(resources)


# ---- its inputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flavour", "white"), [("torch-fidelity", 127 / 128), ("pytorch-fid", 1), ("clean-fid", 127 / 128)]
)
def test_white_and_black(flavour, white):
    images = np.stack([np.full((5, 6, 3), value, np.uint8) for value in (255, 0)])
    prepared = prepare_images(images, flavour)
    assert prepared.shape == (2, 299, 299, 3) and prepared.dtype == np.float32
    np.testing.assert_allclose(prepared[0], white, atol=1e-6)
    np.testing.assert_allclose(prepared[1], -1, atol=1e-6)


def test_positions_of_pixels():
    """TensorFlow 1 aligns the first pixel's center with the first one's, PyTorch the borders."""
    ramp = np.tile(np.array([0, 128, 255], np.uint8)[None, :, None], (1, 1, 3))
    tensorflow, pytorch = torch_fidelity(ramp)[0, :, 0] * 128 + 128, (pytorch_fid(ramp)[0, :, 0] + 1) * 127.5
    at = np.arange(299) * 3 / 299
    np.testing.assert_allclose(tensorflow, np.interp(at, [0, 1, 2], [0, 128, 255]), atol=1e-3)
    at = (np.arange(299) + 0.5) * 3 / 299 - 0.5
    np.testing.assert_allclose(pytorch, np.interp(at, [0, 1, 2], [0, 128, 255]), atol=1e-3)


def test_gigagan_crops_the_center():
    image = make_images(1, size=(40, 61))[0]
    assert np.array_equal(gigagan(image), gigagan(image[:, 10:50]))  # 10.5 is rounded to even, as torchvision does
    assert not np.array_equal(gigagan(image), clean_fid(image[:, 10:50]))


@pytest.mark.parametrize(
    "image",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)],
)
def test_other_arrays_are_an_error(image):
    with pytest.raises(ValueError, match=r"an image is (uint8|float64)\[.*; use RGB images, uint8\[H, W, 3\]"):
        prepare_images([image], "clean-fid")


def test_flavours():
    assert read_flavour({}) == "torch-fidelity"
    assert read_flavour({"fid_flavour": "gigagan"}) == "gigagan"
    with pytest.raises(ValueError, match="'tf' is not supported; choose one of torch-fidelity, pytorch-fid, clean-fid"):
        read_flavour({"fid_flavour": "tf"})


# ---- the metrics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_metrics_name_their_flavour_and_reference_and_share_rows(flavour):
    resources = make_resources(make_images(12), flavour)
    metrics = [METRICS[name].create(resources) for name in ("fid", "kid", "precision")]
    assert len({metric.measure for metric in metrics}) == 1
    rows = metrics[0].measure(make_images(10, seed=1), [""] * 10)
    assert rows["features"].shape == (10, 8) and rows["sizes"].tolist() == [[9, 7]] * 10
    for metric in metrics:
        assert flavour in metric.note and "val2014" in metric.note
        assert list(metric.result(rows)) == list(metric.columns)
        assert metric.scores(rows) is None


def test_the_distance_is_that_of_all_images_whatever_the_batches():
    real, own = make_images(30), make_images(21, seed=1)
    metric = FID.create(make_resources(real))
    whole = metric.measure(own, [""] * 21)
    parts = concatenate([metric.measure(part, [""] * len(part)) for part in (own[:1], own[1:16], own[16:])])
    expected = frechet_distance(*(moments(project(prepare_images(x, "torch-fidelity"))) for x in (own, real)))
    assert metric.result(whole)["fid"] == metric.result(parts)["fid"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("count", [2, 7, 8, 9, 100])
def test_equals_the_accurate_distance(count):
    """With fewer features than dimensions, and with more; to features and to their covariance."""
    rng = np.random.default_rng(count)
    own, other = rng.normal(0, 1, (count, 8)), rng.normal(0.5, 2, (count + 1, 8))
    expected = frechet_distance(moments(own), moments(other))
    for reference in (fit_gaussian(other), make_gaussian(other.mean(0), moments(other).covariance)):
        assert distances_to(reference, own).of() == pytest.approx(expected, rel=1e-6)
        assert reference.trace == pytest.approx(np.trace(moments(other).covariance))


def test_infinitely_many_images_have_no_bias():
    """The distance of samples of one Gaussian to it is 0 in the limit."""
    rng = np.random.default_rng(0)
    reference = Gaussian(np.zeros(32), np.eye(32))
    found = [distances_to(reference, rng.normal(size=(400, 32))) for _ in range(5)]
    biased, unbiased = np.mean([each.of() for each in found]), np.mean([extrapolate(each) for each in found])
    assert biased > 0.5 and abs(unbiased) < 0.1 * biased


def test_a_small_sample_warns_and_has_a_limit_beside_it():
    assert small_sample_warning(SMALL_SAMPLE) is None
    assert "FID of 5,000 images is biased upwards" in str(small_sample_warning(5000))
    metric = FID.create(make_resources(make_images(9)))
    rows = {"features": np.random.default_rng(0).normal(size=(SMALL_SAMPLE, 8)).astype(np.float32)}
    assert list(metric.result(rows | {"sizes": np.full((SMALL_SAMPLE, 2), 9)})) == ["fid"]


def test_the_kernel_distance_by_hand():
    """Features 0 and 1 and a reference of twice 2, of one dimension: kernels (ab + 1)^3."""
    assert discrepancy(np.array([[0.0], [1.0]]), np.array([[2.0], [2.0]])) == pytest.approx(1 + 125 - 2 * (1 + 27) / 2)
    same = np.random.default_rng(0).normal(size=(50, 4))
    assert kernel_distance(same, same) < 0  # unbiased: it is 0 on average for another sample


def test_precision_and_recall_by_hand():
    """Points of a line: 20 real ones at 0 to 19, and generated ones near the first five and far from all."""
    real = np.arange(20, dtype=np.float32)[:, None]
    own = np.array([0.4, 1.4, 2.4, 3.4, 100, 101, 102, 103], np.float32)[:, None]
    radii = neighbor_distances(real, 3, 5)
    assert np.sqrt(radii[10]).tolist() == [2, 3] and np.sqrt(radii[0]).tolist() == [3, 5]
    found = coverage(real, radii, own)
    assert found["precision"] == 0.5
    assert found["recall"] == pytest.approx(7 / 20)  # 3.4 reaches to 6.4, and 0.4 to 3.4
    assert 0 < found["coverage"] < 0.5 and 0 < found["density"] < 1


def test_sizes_that_differ_between_batches_are_an_error():
    metric = FID.create(make_resources(make_images(8)))
    rows = concatenate([metric.measure(make_images(3, size=size), [""] * 3) for size in ((9, 7), (9, 8))])
    with pytest.raises(ValueError, match=r"2 sizes, such as 7 x 9 and 8 x 9, which torch-fidelity does not support"):
        metric.result(rows)
    clean = FID.create(make_resources(make_images(8), "clean-fid"))
    assert clean.result(rows)["fid"] > 0


def test_features_that_are_not_finite_are_an_error():
    measure = make_measure(lambda inputs: np.full((len(inputs), 8), np.nan), "clean-fid")
    with pytest.raises(ValueError, match=r"features\[0, 0\] is nan \(16 values are not finite\)"):
        measure(make_images(2), ["", ""])


def test_too_few_images_are_an_error():
    resources = make_resources(make_images(8))
    for kind, count, message in ((FID, 1, "2 or more"), (KID, 1, "2 or more"), (Precision, 3, "4 or more")):
        metric = kind.create(resources)
        with pytest.raises(ValueError, match=f"need.? {message} images, got {count}; use more images"):
            metric.result(metric.measure(make_images(count), [""] * count))
    with pytest.raises(ValueError, match="need 6 or more images, got 5"):
        Precision.create(make_resources(make_images(5)))
    with pytest.raises(ValueError, match="needs 2 or more images, got 1"):
        FID.create(make_resources(make_images(1)))


def test_features_of_another_dimension_are_an_error():
    with pytest.raises(ValueError, match="have 3 and 4 dimensions; use those of one network"):
        distances_to(fit_gaussian(np.eye(4)), np.eye(3))


# ---- statistics in files --------------------------------------------------------------------------------------------


@pytest.fixture
def recorded():
    features = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    return Statistics(features.mean(0), moments(features).covariance, "clean-fid", 20, "val2014")


def test_statistics_come_back(recorded, tmp_path):
    path = tmp_path / "val2014.npz"
    write_statistics(path, recorded)
    found = read_statistics(path, "clean-fid", 8)
    assert (found.flavour, found.count, found.reference, found.features) == ("clean-fid", 20, "val2014", None)
    assert np.array_equal(found.mean, recorded.mean) and np.array_equal(found.covariance, recorded.covariance)
    with np.load(path) as file:  # the way of pytorch-fid and clean-fid
        assert np.array_equal(file["mu"], recorded.mean) and np.array_equal(file["sigma"], recorded.covariance)
    assert [each.name for each in tmp_path.iterdir()] == ["val2014.npz"]


def test_files_of_other_tools_declare_no_flavour(recorded, tmp_path):
    path = tmp_path / "pytorch_fid.npz"
    np.savez_compressed(path, mu=recorded.mean, sigma=recorded.covariance)
    assert read_statistics(path, "pytorch-fid", 8).flavour is None
    features = np.random.default_rng(1).normal(size=(9, 8)).astype(np.float32)
    np.savez_compressed(path, feats=features)  # clean-fid's for KID
    found = read_statistics(path, "clean-fid", 8)
    assert found.features is not None and np.array_equal(found.features, features)
    np.testing.assert_allclose(found.covariance, np.cov(features, rowvar=False), rtol=1e-5)


def test_metrics_with_statistics_as_the_reference(recorded, tmp_path, monkeypatch):
    monkeypatch.setattr(inception, "FEATURES", 8)
    path = tmp_path / "val2014.npz"
    write_statistics(path, recorded)
    resources = make_resources(make_images(8), "clean-fid", statistics=path)
    metric = FID.create(resources)
    assert "those of val2014;" in metric.note
    rows = metric.measure(make_images(9), [""] * 9)
    own = moments(rows["features"])
    given = Gaussian(recorded.mean, np.linalg.cholesky(recorded.covariance).T)
    assert metric.result(rows)["fid"] == pytest.approx(distances_to(given, rows["features"]).of(), abs=1e-4)
    assert own.count == 9
    for kind in (KID, Precision):
        with pytest.raises(ValueError, match=r"mean and the covariance of features alone.*use a folder of images"):
            kind.create(resources)
    with pytest.raises(
        ValueError, match="of flavour 'clean-fid', which cannot be compared with 'gigagan'; use --fid_fl"
    ):
        FID.create(make_resources(make_images(8), "gigagan", statistics=path))


def test_the_statistics_of_a_reference_take_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(inception, "FEATURES", 8)
    path = tmp_path / "val2014.npz"
    resources = make_resources(make_images(30))
    save_reference(resources, path)
    found = read_statistics(path, "torch-fidelity", 8)
    assert (found.flavour, found.count, found.reference) == ("torch-fidelity", 30, "val2014")
    saved = Resources(None, str(path), statistics=path)
    saved.once(("inception", "torch-fidelity"), lambda: make_measure(project, "torch-fidelity"))
    by_images, by_statistics = FID.create(resources), FID.create(saved)
    rows = by_images.measure(make_images(12, seed=1), [""] * 12)
    assert by_images.result(rows) == pytest.approx(by_statistics.result(rows), abs=1e-4)
    assert by_images.note == by_statistics.note
    with pytest.raises(ValueError, match="has no images, whose statistics could be saved"):
        save_reference(saved, path)


def _broken(name: str, path, recorded) -> None:
    mean, covariance = recorded.mean, recorded.covariance
    arrays = {
        "keys": {"m": mean},
        "nan": {"mu": mean * np.nan, "sigma": covariance},
        "shape": {"mu": mean, "sigma": covariance[:3]},
        "rank": {"mu": covariance, "sigma": covariance},
        "integers": {"mu": mean.astype(int), "sigma": covariance},
        "pickle": {"mu": np.array([{}]), "sigma": covariance},
        "count": {"mu": mean, "sigma": covariance, "count": np.zeros(2)},
        "feats": {"feats": np.full((3, 8), np.inf)},
    }
    if name in arrays:
        np.savez(path, **arrays[name])
    elif name == "truncated":
        np.savez(path, mu=mean, sigma=covariance)
        path.write_bytes(path.read_bytes()[:200])
    elif name == "single":
        with path.open("wb") as file:
            np.save(file, mean)
    elif name == "text":
        path.write_text("mu sigma")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "does not exist; use a .npz file of statistics"),
        ("keys", "contains m, not the 'mu' and 'sigma' of statistics; use another file"),
        ("nan", "'mu' has values that are not finite"),
        ("shape", r"'sigma' is \[3, 8\] for a 'mu' of 8"),
        ("rank", r"'mu' is float64\[8, 8\], not floating-point numbers of rank 1"),
        ("integers", r"'mu' is int64\[8\], not floating-point"),
        ("pickle", r"is not a .npz file of statistics \(Object arrays cannot be loaded"),
        ("count", r"'count' is float64\[2\]"),
        ("feats", "'feats' has values that are not finite"),
        ("truncated", "is not a .npz file of statistics"),
        ("single", r"is not a .npz file of statistics \(it is a single array\)"),
        ("text", "is not a .npz file of statistics"),
    ],
)
def test_broken_statistics_are_an_error_that_names_the_file(name, message, recorded, tmp_path):
    path = tmp_path / "stats.npz"
    _broken(name, path, recorded)
    with pytest.raises(ValueError, match=rf"stats\.npz.*{message}") as caught:
        read_statistics(path, "clean-fid", 8)
    assert "\n" not in str(caught.value)


def test_other_statistics_are_an_error(recorded, tmp_path):
    write_statistics(tmp_path / "a.npz", recorded)
    with pytest.raises(ValueError, match="statistics of 8 dimensions, and the features have 2048"):
        read_statistics(tmp_path / "a.npz", "clean-fid", 2048)
    with pytest.raises(ValueError, match="a cache of torch-fidelity, which only torch can read"):
        read_statistics(tmp_path / "input-stat-fid-2048.pt", "torch-fidelity", 8)
    with pytest.raises(ValueError, match="does not end in .npz"):
        write_statistics(tmp_path / "a.npy", recorded)
