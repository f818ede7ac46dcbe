"""Scores of images and prompts by CLIP models: formulas, files, and input that does not fit."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny_towers

from lcm_jax.evaluation import clip_towers, preference
from lcm_jax.evaluation.batches import in_batches
from lcm_jax.evaluation.clip_inputs import for_hps, for_transformers
from lcm_jax.evaluation.clip_score import ClipScore
from lcm_jax.evaluation.clip_towers import cosines, open_encoders, prepare
from lcm_jax.evaluation.evaluate import Resources, figures, measure_batches
from lcm_jax.evaluation.metrics import make_metrics
from lcm_jax.evaluation.preference import HPS, Aesthetic, PickScore, predict, read_layers
from lcm_jax.models.layers import abstract_network
from lcm_jax.models.vit import CLIPModel
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.published import Weights
from lcm_jax.weights.stored import write_safetensors
from lcm_jax.weights.trees import from_params

PROMPTS = ("a red circle", "a blue square, left of a photo", "a red circle")


def random_params(config, seed: int = 0):
    shapes = jax.ShapeDtypeStruct((1, 24, 24, 3), np.float32), jax.ShapeDtypeStruct((1, 8), np.int32)
    rng = np.random.default_rng(seed)
    draw = lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, abstract_network(CLIPModel(config), *shapes))


def images(count: int = 3, height: int = 30, width: int = 41) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of weights: every file under its published name, of a small model."""
    folder = tmp_path_factory.mktemp("weights")
    config = tiny_towers.write_tokenizer(folder / "clip-vit-large-patch14")
    write_safetensors(folder / "clip-vit-large-patch14" / "model.safetensors", from_params(random_params(config)))
    tower = folder / "CLIP-ViT-H-14-laion2B-s32B-b79K"  # the last of the names that its file may have
    for other in (folder / "PickScore_v1", tower):
        other.mkdir()
    write_safetensors(tower / "pytorch_model.bin", from_params(random_params(config, 4)))
    write_safetensors(folder / "PickScore_v1" / "model.safetensors", from_params(random_params(config, 1)))
    write_safetensors(folder / preference.HPS_WEIGHTS.file, from_params(random_params(config, 2)))
    rng = np.random.default_rng(3)
    layers = {}
    for number, (inputs, outputs) in zip(preference.WIDTHS, SMALL_WIDTHS, strict=True):
        layers[f"layers.{number}.weight"] = rng.normal(size=(outputs, inputs)).astype(np.float32)
        layers[f"layers.{number}.bias"] = rng.normal(size=outputs).astype(np.float32)
    write_safetensors(folder / preference.AESTHETIC.file, layers)
    return folder, config


SMALL_WIDTHS = ((12, 6), (6, 5), (5, 4), (4, 3), (3, 1))


@pytest.fixture
def resources(folder, monkeypatch) -> Resources:
    for name in ("ViT-L/14", "ViT-H/14"):
        monkeypatch.setitem(clip_towers.TOWERS, name, clip_towers.TOWERS[name]._replace(config=folder[1]))
    monkeypatch.setattr(preference, "WIDTHS", dict(zip(preference.WIDTHS, SMALL_WIDTHS, strict=True)))
    return Resources(None, "nothing", weights=Weights(folder[0]), batch_size=2)


def rows_of(cosine) -> dict[str, np.ndarray]:
    """Rows of embeddings that have these cosines."""
    cosine = np.asarray(cosine, np.float32)
    image = np.stack([np.ones_like(cosine), np.zeros_like(cosine)], 1)
    return {"image": image, "text": np.stack([cosine, np.sqrt(1 - cosine**2)], 1)}


def test_three_scales_of_the_clip_score():
    """100 cos; 2.5 times the mean of what is above 0; the mean above 0."""
    score = ClipScore(lambda images, prompts: None, "ViT-L/14")
    assert score.result(rows_of([0.3, 0.2, -0.2])) == {
        "clip_score": pytest.approx(10.0, abs=1e-4),
        "clipscore": pytest.approx(2.5 * 0.5 / 3, abs=1e-6),
        "clip_score_clipped": pytest.approx(10.0, abs=1e-4),
    }
    low = score.result(rows_of([-0.3, 0.1]))
    assert (low["clip_score"], low["clipscore"], low["clip_score_clipped"]) == pytest.approx((-10, 0.125, 0), abs=1e-4)
    np.testing.assert_allclose(score.scores(rows_of([0.3, -0.2])), [0.3, -0.2], atol=1e-7)


def test_pick_score_scales_the_cosine_and_hps_is_100_of_it():
    rows = rows_of([0.21, 0.25])
    encoders = clip_towers.Encoders(lambda images: images, lambda prompts: prompts, scale=100.0)
    assert PickScore(encoders).result(rows) == {"pick_score": pytest.approx(23.0, abs=1e-4)}
    assert HPS(lambda images, prompts: None).result(rows) == {"hps": pytest.approx(23.0, abs=1e-4)}


def test_the_aesthetic_score_is_that_of_its_layers_in_turn():
    layers = [(np.array([[2.0, 0.0], [0.0, -1.0]]), np.array([0.5, 0.0])), (np.array([[1.0, 3.0]]), np.array([4.0]))]
    np.testing.assert_allclose(predict(layers, np.array([[1.0, 0.0], [0.0, 1.0]])), [6.5, 1.5])


def test_all_scores_from_a_folder_of_weights(resources, monkeypatch):
    """Every figure is finite, images of one tower are embedded once, and the parts of a set are those of all."""
    metrics = make_metrics(("clip_score", "aesthetic", "pick_score", "hps"), resources)
    prepared = []
    monkeypatch.setattr(clip_towers, "prepare", lambda *inputs: prepared.append(inputs) or prepare(*inputs))
    batches = [(images()[:1], PROMPTS[:1]), (list(images()[1:]), PROMPTS[1:])]
    rows = measure_batches(batches, metrics)
    assert len(prepared) == 3 * len(batches)  # the aesthetic score has the embeddings of the CLIP score
    assert rows["aesthetic"].keys() == {"image"}
    row = figures(metrics, rows)
    assert row.keys() == {*(name for metric in metrics.values() for name in metric.columns), "intervals"}
    assert "by CLIP ViT-L/14" in metrics["clip_score"].note
    whole = metrics["clip_score"].measure(images(), PROMPTS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), rows["clip_score"], whole)
    np.testing.assert_array_equal(whole["text"][0], whole["text"][2])  # of the same prompt
    for name, metric in metrics.items():
        assert metric.scores(rows[name]).shape == (3,)


def test_each_metric_reads_its_own_weights_and_inputs(resources, folder):
    config = folder[1]
    assert (
        HPS.create(resources).measure == open_encoders(resources, "ViT-H/14", preference.HPS_WEIGHTS, for_hps).measure
    )
    rows = PickScore.create(resources).measure(images(), PROMPTS)
    pixels = np.stack([for_transformers(image, 24) for image in images()])
    params = {"params": random_params(config, 1)}
    embedded = np.asarray(jax.jit(lambda p, x: CLIPModel(config).apply(p, x, method="embed_images"))(params, pixels))
    np.testing.assert_allclose(rows["image"], clip_towers.unit(embedded), atol=1e-5)


def test_the_option_clip_model_selects_the_network(resources):
    other = replace(resources, settings={"clip_model": "ViT-H/14"})
    metric = ClipScore.create(other)
    assert "by CLIP ViT-H/14" in metric.note
    assert metric.measure == open_encoders(other, "ViT-H/14").measure


def test_a_tower_that_does_not_exist_is_named(resources):
    with pytest.raises(ValueError, match=r"clip_model 'ViT-B/16' is not supported; choose one of ViT-B/32, ViT-L/14"):
        ClipScore.create(replace(resources, settings={"clip_model": "ViT-B/16"}))


def test_missing_weights_are_named(resources):
    with pytest.raises(
        ModelError, match="clip-vit-base-patch32/pytorch_model.bin does not exist; get .* openai/clip-vit-base-patch32"
    ):
        ClipScore.create(replace(resources, settings={"clip_model": "ViT-B/32"}))
    with pytest.raises(ModelError, match="PickScore_v1/model.safetensors does not exist; get"):
        PickScore.create(replace(resources, weights=Weights(resources.weights.folder / "nowhere")))


def test_weights_of_another_model_are_named(resources, folder, monkeypatch):
    wider = replace(folder[1], vision=replace(folder[1].vision, intermediate_size=44))
    monkeypatch.setitem(clip_towers.TOWERS, "ViT-L/14", clip_towers.TOWERS["ViT-L/14"]._replace(config=wider))
    with pytest.raises(ModelError, match=r"clip-vit-large-patch14/model.safetensors: .* 6 of another shape"):
        ClipScore.create(resources)


def test_a_tokenizer_of_another_model_is_refused(resources, folder):
    larger = replace(folder[1], text=replace(folder[1].text, vocab_size=9999))
    tokenizer = clip_towers.open_tokenizer(resources.weights)
    with pytest.raises(ValueError, match="the tokenizer has .* and the model .*'tokens': 9999.*; use the tokenizer of"):
        clip_towers.text_encoder(larger, random_params(folder[1]), tokenizer, 2)


def test_prompts_that_do_not_pair_are_refused(resources):
    with pytest.raises(ValueError, match="there are 3 images and 2 prompts; use a prompt for each image"):
        open_encoders(resources, "ViT-L/14").measure(images(), PROMPTS[:2])


@pytest.mark.parametrize("bad", [np.zeros((3, 8, 8), np.uint8), np.zeros((1, 8, 8, 4), np.uint8), images() / 255])
def test_images_of_another_kind_are_named(bad):
    with pytest.raises(ValueError, match=r"image 0 is \w+\[.*; use uint8\[H, W, 3\]"):
        prepare(bad, for_transformers, 24)


def test_weights_that_are_not_finite_are_an_error(folder):
    params = random_params(folder[1])
    params["visual_projection"]["kernel"][0, 0] = np.nan
    embed = clip_towers.image_encoder(folder[1], params, for_transformers, 2)
    with pytest.raises(ValueError, match="the embedding of image 0 of a batch is not finite; check the weights"):
        embed(images())


def test_layers_of_another_predictor_are_named():
    with pytest.raises(ModelError, match=r"has layers.0.bias of shape None, and the predictor has \(1024,\); use the"):
        read_layers({"layers.0.weight": np.zeros((1024, 768), np.float32)})


def test_batches_of_one_program_give_every_row():
    sizes = []

    def encode(batch):
        sizes.append(len(batch))
        return batch * 2.0

    inputs = np.arange(7.0)[:, None]
    np.testing.assert_array_equal(in_batches(encode, inputs, 3), inputs * 2)
    assert sizes == [3, 3, 3]


def test_cosines_are_those_of_the_rows():
    np.testing.assert_allclose(cosines(rows_of([0.5, -1.0])), [0.5, -1.0], atol=1e-7)


def test_layers_come_from_their_file(resources):
    metric = Aesthetic.create(resources)
    assert [weight.shape[::-1] for weight, _ in metric.layers] == list(SMALL_WIDTHS)
