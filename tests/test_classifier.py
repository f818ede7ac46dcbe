"""The classifier of captions: on real digits, on broken sets, and without its package."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from lcm_jax.data.folder import FolderSource
from lcm_jax.evaluation import evaluate, metrics
from lcm_jax.evaluation.classifier import Classifier
from lcm_jax.evaluation.evaluate import Resources, make_resources
from lcm_jax.evaluation.metrics import check_metrics

pytest.importorskip("sklearn")
SCRIPT = Path(__file__).parents[1] / "docs" / "digits.py"


def features(images):
    return images


def load_script():
    spec = importlib.util.spec_from_file_location("digits", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def solid(*colors: int) -> np.ndarray:
    return np.stack([np.full((32, 32, 3), color, np.uint8) for color in colors])


def test_real_digits_are_told_apart(tmp_path, monkeypatch, capsys):
    digits = load_script()
    assert digits.write(tmp_path / "digits") == 1797
    data = FolderSource(folder=str(tmp_path / "digits"), size=64, held_out=180).open(0, tmp_path / "index", print)
    prompts = data.prompts(180)
    assert set(prompts) == set(digits.CAPTIONS) and min(map(prompts.count, digits.CAPTIONS)) >= 10
    monkeypatch.setattr(evaluate, "MAX_TRAIN_IMAGES", 500)
    classifier = Classifier.create(make_resources(features, data.held_out, 180, data.train, 36))
    assert "of 180 held-out images to their captions" in capsys.readouterr().out
    images = np.stack([data.held_out[i]["image"] for i in range(180)])
    assert images.shape == (180, 64, 64, 3) and (images[:, 0] == 255).all()
    score = lambda captions: classifier.result(classifier.measure(images, captions))["classifier"]  # noqa: E731
    assert score(prompts) > 0.95 and score(prompts[1:] + prompts[:1]) < 0.25


def test_the_script_writes_a_new_folder_alone(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    digits = load_script()
    with pytest.raises(FileExistsError):
        digits.write(tmp_path / "there")
    monkeypatch.setattr(sys, "argv", ["digits.py"])
    assert digits.upscale(np.full((8, 8), 16.0)).getpixel((32, 32)) == (44, 84, 226)
    assert json.dumps(digits.CAPTIONS).count("drawing") == 10


def test_training_images_are_spread_over_a_set_that_is_sorted(monkeypatch):
    monkeypatch.setattr(evaluate, "MAX_TRAIN_IMAGES", 4)
    records = [{"image": solid(i)[0], "caption": str(i)} for i in range(10)]
    resources = make_resources(features, records[:3], 2, records, 3)
    for _ in range(2):  # from the first one on at each call
        assert [captions for _, captions in resources.train_images()] == [["0", "3", "6"], ["9"]]
        assert [captions for _, captions in resources.real_images()] == [["0", "1"]]


@pytest.mark.parametrize("count", [1, 101])
def test_too_few_or_too_many_captions_are_an_error(count):
    captions = [str(i) for i in range(count)]
    batches = lambda: [(solid(*range(count)), captions)]  # noqa: E731
    message = (
        f"^metrics 'classifier' is not supported: the training images have {count} different captions, and it supports"
    )
    with pytest.raises(ValueError, match=message) as error:
        Classifier.create(Resources(batches, "grays", batches, features))
    assert "remove it from --config.metrics" in str(error.value)


def test_a_caption_that_was_not_trained_on_is_an_error():
    batches = lambda: [(solid(0, 10, 200, 210), ["dark", "dark", "light", "light"])]  # noqa: E731
    classifier = Classifier.create(Resources(batches, "grays", batches, features))
    assert classifier.measure(solid(5, 190, 3), ["dark", "dark", "light"]).tolist() == [True, False, False]
    with pytest.raises(ValueError, match="no training image has the caption 'gray' of a held-out one; remove it"):
        classifier.measure(solid(0, 1), ["dark", "gray"])


def test_a_package_that_is_missing_is_named(monkeypatch):
    check_metrics(("classifier",), "folder")
    monkeypatch.setattr(metrics, "find_spec", lambda module: None)
    check_metrics(("verifier", "frechet"), "shapes")
    with pytest.raises(ValueError, match=r"^metrics 'classifier' requires scikit-learn; install it \(pip install sci"):
        check_metrics(("classifier", "frechet"), "folder")
