"""The colors of GenEval by a small CLIP model, as the metric opens it."""

import numpy as np
import pytest
import tiny_towers

from lcm_jax.evaluation import clip_towers, geneval
from lcm_jax.evaluation.evaluate import Resources
from lcm_jax.evaluation.geneval_files import COLORS
from lcm_jax.weights.published import Weights

pytest.importorskip("torch")


def test_crops_of_any_size_have_a_color_of_ten(tmp_path, monkeypatch):
    folder = tmp_path / "clip-vit-large-patch14"
    folder.mkdir()
    config = tiny_towers.write_tokenizer(folder)
    tiny_towers.transformers_clip(config).save_pretrained(folder)
    tower = clip_towers.TOWERS[geneval.CLIP]._replace(config=config)
    monkeypatch.setitem(clip_towers.TOWERS, geneval.CLIP, tower)
    resources = Resources(None, "none", weights=Weights(tmp_path))
    classify = geneval.open_classifier(resources)
    rng = np.random.default_rng(0)
    crops = [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((9, 20), (30, 7), (1, 1))]
    names = classify(crops, "dog")
    assert len(names) == 3 and set(names) <= set(COLORS) and classify(crops[1:2], "dog") == names[1:2]
    assert geneval.open_classifier(resources) is classify
