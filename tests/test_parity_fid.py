"""FID, KID, precision and recall from PNG files to the number, as torch-fidelity, pytorch-fid and clean-fid give them.

Both sides have the same weights that nobody trained. The tools' own functions take minutes for 2048 features, so the
numbers are compared for some of them here, and for all in the slow test.
"""

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from random_inception import random_inception
from reference_tools import reference

from lcm_jax.evaluation import kid
from lcm_jax.evaluation.evaluate import Resources
from lcm_jax.evaluation.fid import FID
from lcm_jax.evaluation.frechet import distances_to, fit_gaussian, make_gaussian, moments
from lcm_jax.evaluation.inception import FILE, inception_features, make_measure
from lcm_jax.evaluation.inception_inputs import FLAVOURS
from lcm_jax.evaluation.kid import kernel_distance
from lcm_jax.evaluation.precision import DENSITY_NEIGHBORS, NEIGHBORS, coverage, neighbor_distances
from lcm_jax.evaluation.statistics import Statistics, write_statistics
from lcm_jax.weights.published import Weights

torch_fidelity = reference("torch_fidelity")
pytorch_fid_inception = reference("pytorch_fid.inception")
pytorch_fid = reference("pytorch_fid.fid_score")
cleanfid = reference("cleanfid.fid")
torchvision = reference("torchvision.transforms.functional")
torch = pytest.importorskip("torch")

BATCH = 8
MODES = ("RGB", "L", "P", "I;16", "RGBA", "1", "RGB", "CMYK")


def _write(folder: Path, rng: np.random.Generator, sizes: list[tuple[int, int]]) -> Path:
    """Write an image of each size, (width, height), in the modes that PNG and TIFF files have."""
    folder.mkdir()
    for i, (width, height) in enumerate(sizes):
        coarse = rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)
        pixels = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
        image, mode = Image.fromarray(pixels), MODES[i % len(MODES)]
        if mode == "I;16":
            image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
        else:
            image = image.convert(mode)
        image.save(folder / f"{i:02}.{'tiff' if mode == 'CMYK' else 'png'}")
    return folder


def _read(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.iterdir())]


@pytest.fixture(scope="module")
def tensors():
    return random_inception()


@pytest.fixture(scope="module")
def weights(tensors, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / FILE
    torch.save({key: torch.from_numpy(value) for key, value in tensors.items()}, path)
    return path


@pytest.fixture(scope="module")
def features(tensors):
    return inception_features(tensors, BATCH // 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Eight images of 61 x 47 pixels."""
    return _write(tmp_path_factory.mktemp("set") / "one_size", np.random.default_rng(1), [(61, 47)] * BATCH)


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    """Eight images of odd sizes, smaller and larger than the network's."""
    sizes = [(31, 57), (300, 301), (299, 299), (13, 13), (401, 77), (64, 64), (257, 255), (512, 384)]
    return _write(tmp_path_factory.mktemp("set") / "odd", np.random.default_rng(2), sizes)


@pytest.fixture(scope="module")
def network(weights):
    """pytorch-fid's network, which clean-fid has as a file of TorchScript."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytorch_fid_inception, "load_state_dict_from_url", lambda *_, **__: torch.load(weights))
        return pytorch_fid_inception.InceptionV3([3]).eval()


@pytest.fixture(scope="module")
def measured(features, folder) -> dict[str, np.ndarray]:
    images = _read(folder)
    return {name: make_measure(features, name)(images, [])["features"] for name in ("torch-fidelity", "pytorch-fid")}


def clean_model(network):
    """The features of images as clean-fid resizes them: float32[B, 3, 299, 299] in [0, 255]."""

    def model(images):
        x = (images - 128) / 128
        for block in network.blocks:
            x = block(x)
        return x[..., 0, 0]

    return model


def assert_close(own: np.ndarray, expected: np.ndarray) -> None:
    """Within 1e-5 of the features, of which each image has its own."""
    spread = np.linalg.norm(expected - expected.mean(0))
    assert spread > 0.01 * np.linalg.norm(expected)
    assert np.linalg.norm(own - expected) <= 1e-5 * spread


def test_features_are_torch_fidelitys(measured, folder, weights):
    name, extractor = "inception-v3-compat", torch_fidelity.utils.create_feature_extractor
    options = {"cuda": False, "verbose": False, "save_cpu_ram": True, "samples_find_ext": "png,tiff"}
    network = extractor(name, ["2048"], feature_extractor_weights_path=str(weights), **options)
    expected = torch_fidelity.utils.extract_featuresdict_from_input_id(1, network, input1=str(folder), **options)
    assert_close(measured["torch-fidelity"], expected["2048"].numpy())


def test_features_are_pytorch_fids(measured, folder, network):
    expected = pytorch_fid.get_activations(sorted(folder.iterdir()), network, batch_size=BATCH, num_workers=0)
    assert_close(measured["pytorch-fid"], expected)


@pytest.mark.parametrize("flavour", ["clean-fid", "gigagan"])
def test_features_are_clean_fids(flavour, features, odd, network):
    """GigaGAN's evaluation gives clean-fid a function that crops and resizes."""

    def crop(image):
        square = torchvision.center_crop(Image.fromarray(image), min(image.shape[:2]))
        return np.array(square.resize((256, 256), Image.Resampling.LANCZOS))

    chosen = sorted(odd.iterdir())[:: 1 if flavour == "clean-fid" else 3]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Pillow's, of fromarray's mode
        expected = cleanfid.get_files_features(
            [str(path) for path in chosen],
            clean_model(network),
            num_workers=0,
            batch_size=BATCH,
            device="cpu",
            verbose=False,
            custom_image_tranform=crop if flavour == "gigagan" else None,
        )
    images = [np.asarray(Image.open(path).convert("RGB")) for path in chosen]
    assert_close(make_measure(features, flavour)(images, [])["features"], expected)


def test_sets_of_several_sizes_fail_there_and_here(features, odd, network):
    """torch-fidelity and pytorch-fid stack a batch as it is."""
    with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"):
        pytorch_fid.get_activations(sorted(odd.iterdir()), network, batch_size=BATCH, num_workers=0)
    for flavour in ("torch-fidelity", "pytorch-fid"):
        with pytest.raises(ValueError, match="have 8 sizes, such as .*; resize them, or use --fid_flavour=clean-fid"):
            make_measure(features, flavour)(_read(odd), [])


def _tools(own: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Return the distance of two sets of features by each tool's own functions."""
    statistics = [torch_fidelity.metric_fid.fid_features_to_statistics(torch.from_numpy(x)) for x in (own, other)]
    found = torch_fidelity.metric_fid.fid_statistics_to_metric(*statistics, verbose=False)
    double = [(x.astype(np.float64).mean(0), np.cov(x.astype(np.float64), rowvar=False)) for x in (own, other)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SciPy's, of sqrtm's `disp`, and of matrices that are singular
        return {
            "torch-fidelity": found["frechet_inception_distance"],
            "pytorch-fid": float(pytorch_fid.calculate_frechet_distance(*double[0], *double[1])),
            "clean-fid": float(cleanfid.fid_from_feats(own, other)),
        }


@pytest.mark.parametrize(("count", "dimensions"), [(6, 40), (60, 40), (300, 40)])
def test_distances_are_the_tools(count, dimensions):
    """With fewer images than dimensions, with a few more, and with many."""
    rng = np.random.default_rng(count)
    turn = rng.normal(size=(dimensions, dimensions))
    own = np.maximum(rng.normal(0.3, 1, (count, dimensions)) @ turn, 0).astype(np.float32)
    other = np.maximum(rng.normal(0.4, 1.2, (count + 3, dimensions)) @ turn, 0).astype(np.float32)
    for tool, expected in _tools(own, other).items():
        mean = FLAVOURS[tool].mean
        assert distances_to(fit_gaussian(other, mean), own, mean).of() == pytest.approx(expected, rel=1e-3), tool
        recorded = make_gaussian(other.mean(0, mean), np.cov(other.astype(np.float64), rowvar=False))
        assert distances_to(recorded, own, mean).of() == pytest.approx(expected, rel=1e-3), tool


def test_pytorch_fid_reads_our_statistics(tmp_path):
    features = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    path = tmp_path / "real.npz"
    write_statistics(path, Statistics(features.mean(0), moments(features).covariance, "pytorch-fid", 20, "real"))
    mean, covariance = pytorch_fid.compute_statistics_of_path(str(path), None, 1, 8, "cpu")
    np.testing.assert_allclose(mean, features.mean(0))
    np.testing.assert_allclose(covariance, np.cov(features, rowvar=False), rtol=1e-5)


def test_kid_is_torch_fidelitys(monkeypatch):
    """Also its random subsets, of which ten are enough here."""
    monkeypatch.setattr(kid, "SUBSETS", 10)
    rng = np.random.default_rng(3)
    own, other = (rng.gamma(shape, 0.4, (1200, 64)).astype(np.float32) for shape in (1.0, 1.1))
    options = {"verbose": False, "kid_subsets": 10}
    expected = torch_fidelity.metric_kid.kid_features_to_metric(
        torch.from_numpy(own), torch.from_numpy(other), **options
    )
    assert kernel_distance(own, other) == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)
    few = torch_fidelity.metric_kid.kid_features_to_metric(
        torch.from_numpy(own[:50]), torch.from_numpy(other[:40]), **options, kid_subset_size=40
    )
    assert kernel_distance(own[:50], other[:40]) == pytest.approx(few["kernel_inception_distance_mean"], rel=1e-4)


def test_precision_and_recall_are_torch_fidelitys():
    rng = np.random.default_rng(4)
    own, real = (rng.normal(shift, scale, (1500, 16)).astype(np.float32) for shift, scale in ((0.4, 0.8), (0, 1)))
    expected = torch_fidelity.metric_prc.prc_features_to_metric(
        torch.from_numpy(own), torch.from_numpy(real), verbose=False
    )
    found = coverage(real, neighbor_distances(real, NEIGHBORS, DENSITY_NEIGHBORS), own)
    assert 0.2 < found["recall"] < found["precision"] < 1
    assert found["precision"] == pytest.approx(expected["precision"], abs=1e-3)
    assert found["recall"] == pytest.approx(expected["recall"], abs=1e-3)


@pytest.mark.slow
def test_whole_tools_from_folders_to_the_number(weights, network, tmp_path, monkeypatch):
    """FID of two folders of a dozen images by each tool as a user calls it: minutes, for roots of 2048 x 2048."""
    rng = np.random.default_rng(5)
    own, real = (_write(tmp_path / name, rng, [(61, 47)] * 12) for name in ("own", "real"))
    monkeypatch.setattr(pytorch_fid_inception, "load_state_dict_from_url", lambda *_, **__: torch.load(weights))
    options = {"feature_extractor_weights_path": str(weights), "samples_find_ext": "png,tiff", "cache": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch_fidelity.calculate_metrics(
            input1=str(own), input2=str(real), fid=True, cuda=False, verbose=False, save_cpu_ram=True, **options
        )
        expected = {
            "torch-fidelity": found["frechet_inception_distance"],
            "pytorch-fid": pytorch_fid.calculate_fid_given_paths([str(own), str(real)], 12, "cpu", 2048, 0),
        }
        expected["clean-fid"] = cleanfid.compute_fid(
            str(own), str(real), custom_feat_extractor=clean_model(network), num_workers=0, device="cpu", verbose=False
        )
    for flavour, value in expected.items():
        resources = Resources(
            real_images=lambda: [(_read(real), [""] * 12)],
            reference="real",
            weights=Weights(weights.parent),
            settings={"fid_flavour": flavour},
            batch_size=12,
        )
        metric = FID.create(resources)
        result = metric.result(metric.measure(_read(own), [""] * 12))
        print(f"{flavour}: {result['fid']}, expected {value}")
        assert result["fid"] == pytest.approx(float(value), rel=1e-3), flavour
