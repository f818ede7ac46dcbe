"""Images that are there already: folders that are read as they are, their errors, and COCO's captions."""

import json
import urllib.error
import urllib.request

import huggingface_hub.constants
import numpy as np
import pytest
from evaluating import calling
from ml_collections import ConfigDict
from PIL import Image

from lcm_jax.data import shapes
from lcm_jax.data.coco import read_coco
from lcm_jax.evaluation.evaluate import Column
from lcm_jax.evaluation.image_folder import open_folder, read_image
from lcm_jax.evaluation.metrics import METRICS
from lcm_jax.evaluation.prompt_sets import PROMPT_SETS
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.published import Published, Weights


@pytest.fixture
def call(monkeypatch):
    yield from calling(monkeypatch)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of 12 real images of `shapes` with their captions, of which the last shows something else."""
    folder = tmp_path_factory.mktemp("made")
    records = [shapes.Shapes("test", 12)[i] for i in range(12)]
    for number, record in enumerate(records):
        image = records[0]["image"] * 0 if number == 11 else record["image"]
        Image.fromarray(image).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(record["caption"])
    return folder


class Distance:
    """The distance of the mean color to the reference's, as a metric of images alone."""

    columns = {"distance": Column("distance", ".3f")}
    lower_is_better = True
    note = "The distance is that of means."
    sources = None
    packages = {}
    resamplings = 10
    reads_prompts = False

    def __init__(self, reference):
        self.reference = reference

    @classmethod
    def create(cls, resources):
        return cls(resources.reference_rows(cls.measure).mean(0))

    @staticmethod
    def measure(images, prompts):
        return np.array([image.mean((0, 1)) for image in images])

    def result(self, rows):
        return {"distance": float(np.linalg.norm(rows.mean(0) - self.reference))}

    def scores(self, rows):
        return None


def test_figures_of_a_folder_stand_by_their_names(made, call, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(METRICS, "distance", Distance)
    output = tmp_path / "report"
    arguments = [f"--images={made}", f"--reference={made}", f"--output={output}", "--config.report.batch_size=5"]
    call(*arguments, "--metrics=distance,verifier")
    report = json.loads((output / "report.json").read_text())
    assert report["distance"] < 1e-9 and 0.8 < report["verifier"] < 1 and report["intervals"]["verifier"][0] < 1
    assert report["images"] == {"folder": str(made), "count": 12} and report["reference"] == f"12 images of {made}"
    text = (output / "report.md").read_text()
    assert f"12 images of {made} compared with 12 images of {made}" in text and "| distance | verifier |" in text
    assert "The distance is that of means." in text and "The distance is that of means." in capsys.readouterr().out
    with pytest.raises(ValueError, match="report.json exists already; use another --output, or --overwrite"):
        call(*arguments, "--metrics=distance")
    call(*arguments, "--metrics=distance", "--overwrite")  # of images that may have changed
    assert "verifier" not in json.loads((output / "report.json").read_text())
    (output / "settings.json").write_text("{}")
    with pytest.raises(ValueError, match="has an evaluation of models; use another --output"):
        call(*arguments, "--metrics=distance", "--overwrite")
    # Sizes may differ, for a metric that reads one image at a time.
    for number in range(3):
        Image.new("RGB", (20 + number, 30), (10, 20, 30)).save(tmp_path / f"{number}.png")
    call(f"--images={tmp_path}", f"--reference={made}", "--metrics=distance")
    assert f"3 images of {tmp_path} compared with 12 images of {made}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "^--images needs --metrics, such as --metrics=fid"),
        (["--metrics=fed"], "^metrics 'fed' is not supported; use verifier"),
        (["--metrics=frechet"], "^metrics 'frechet' needs an autoencoder's features; remove it"),
        (["--metrics=distance"], "^a metric compares with real images, and --reference is missing; use a"),
        (["--metrics=distance", "--reference=nowhere"], "^--reference=nowhere is not a folder; use a folder of images"),
        (["--metrics=distance", "--reference=nowhere.npz"], "^--reference=nowhere.npz is not a file; use a .npz"),
        (["--metrics=verifier", "--prompts=nowhere"], "^--prompts=nowhere is not a file; use a text file with a line"),
        (["--metrics=verifier", "--prompts=setup.cfg"], r"^--prompts=setup.cfg has \d+ lines, and .* has 12 images"),
        (["--images=nowhere", "--metrics=verifier"], "^--images=nowhere is not a folder"),
        (["--images=docs/../launch", "--metrics=verifier"], r"launch has no images \(.bmp, .*\); use another folder"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, made, call, monkeypatch):
    monkeypatch.setitem(METRICS, "distance", Distance)
    with pytest.raises(ValueError, match=message) as error:
        call(f"--images={made}", *arguments)
    assert "\n" not in str(error.value)


def test_images_that_cannot_be_read_are_named_and_left_out_only_if_asked(tmp_path, call, monkeypatch, capsys):
    monkeypatch.setitem(METRICS, "distance", Distance)
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:40])
    arguments = [f"--images={tmp_path}", f"--reference={tmp_path}", "--metrics=distance"]
    with pytest.raises(
        ValueError, match=rf"^1 of 3 images in {tmp_path} cannot be read: {tmp_path}/1.png; use --skip_b"
    ):
        call(*arguments)
    call(*arguments, "--skip_bad")
    printed = capsys.readouterr().out
    assert f"1 of 3 images in {tmp_path} cannot be read and are left out: {tmp_path}/1.png" in printed
    assert f"2 images of {tmp_path} compared with 2 images of {tmp_path}\n" in printed
    for path in (tmp_path / "0.png", tmp_path / "2.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="has no image that can be read; use another folder"):
        open_folder(tmp_path, "--images", skip_bad=True)


def test_prompts_that_are_missing_or_empty_are_errors(made, tmp_path, call):
    for path in made.glob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(
        ValueError, match=f"^12 of 12 images in {tmp_path} have no prompt, first 00.txt; add these files"
    ):
        call(f"--images={tmp_path}", "--metrics=verifier")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n" * 3 + "\n" + "a red circle\n" * 8)
    with pytest.raises(ValueError, match=f"^the prompt of {tmp_path}/03.png is empty; write one"):
        call(f"--images={tmp_path}", "--metrics=verifier", f"--prompts={prompts}")


def test_modes_are_converted_as_pillow_does(tmp_path):
    wide = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(wide).save(tmp_path / "16.png")
    Image.fromarray((wide >> 8).astype(np.uint8)).save(tmp_path / "gray.png")
    Image.fromarray((wide >> 8).astype(np.uint8)).convert("P").save(tmp_path / "palette.png")
    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            np.testing.assert_array_equal(read_image(path), np.asarray(image.convert("RGB")))


def coco(tmp_path, **changes):
    content = {
        "images": [{"id": 9, "file_name": "b.png"}, {"id": 4, "file_name": "a.png"}],
        "annotations": [
            {"id": 3, "image_id": 9, "caption": "third "},
            {"id": 2, "image_id": 4, "caption": "second"},
            {"id": 1, "image_id": 9, "caption": "first"},
        ],
    } | changes
    (tmp_path / "captions.json").write_text(json.dumps(content))
    images = tmp_path / "images"
    images.mkdir(exist_ok=True)
    for name, width in (("a", 40), ("b", 24)):
        Image.new("RGB", (width, 30), (width, 0, 0)).save(images / f"{name}.png")
    return tmp_path / "captions.json", images


def test_captions_of_coco_pair_with_their_images(tmp_path):
    captions, images = coco(tmp_path)
    read = read_coco(captions, images)
    assert [(each.caption, each.image.name) for each in read.captions] == [
        ("second", "a.png"),
        ("first", "b.png"),
        ("third", "b.png"),
    ]
    assert [each.caption for each in read.choose(2, "first", 0)] == ["second", "first"]
    drawn = read.choose(3, "any", 5)
    assert drawn == read.choose(3, "any", 5) and {each.caption for each in drawn} == {"first", "second", "third"}
    with pytest.raises(ValueError, match="^report.prompts 3 is more than the 2 captions there are; lower it"):
        read.choose(3, "first", 0)

    data = {"source": "coco", "captions": str(captions), "images": str(images), "size": 16, "real_size": 16}
    config = ConfigDict(
        {
            "data": data | {"per_image": "first", "compared": "paired"},
            "report": {"prompts": 1, "batch_size": 2, "seed": 0},
        }
    )
    whole = lambda count: range(count)  # noqa: E731
    prompts = PROMPT_SETS["coco"](config, whole, tmp_path)
    ((real, texts),) = prompts.real_images()
    assert prompts.prompts == ["second"] == texts and real.shape == (1, 16, 16, 3) and (real[..., 0] == 40).all()
    assert prompts.reference == "1 images of images (paired with the prompts, cropped to 16 pixels)"
    config.data.update({"compared": "all", "real_size": 0})
    ((real, texts),) = PROMPT_SETS["coco"](config, whole, tmp_path).real_images()
    assert [each.shape for each in real] == [(30, 40, 3), (30, 24, 3)] and texts == ["second", "first"]
    second = PROMPT_SETS["coco"](config, lambda count: range(1, count), tmp_path)
    assert [texts for _, texts in second.real_images()] == [["first"]], "the part of one of two processes"
    config.data.captions = ""
    with pytest.raises(ValueError, match="^data.captions is missing; set --config.data.captions to that of COCO"):
        PROMPT_SETS["coco"](config, whole, tmp_path)
    config.data.compared = "some"
    with pytest.raises(ValueError, match="^data.compared 'some' is not supported; use paired or all"):
        PROMPT_SETS["coco"](config, whole, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": []}, "has no list of objects 'images'"),
        ({"annotations": {}}, "has no list of objects 'annotations'"),
        ({"images": [{"id": "4", "file_name": "a.png"}]}, "has id '4', which is not a number"),
        ({"images": [{"id": 4, "file_name": "../a.png"}]}, "has file_name '../a.png', which is not a file's name"),
        (
            {"annotations": [{"id": 1, "image_id": 5, "caption": "x"}]},
            "has a caption of image 5, which it does not list",
        ),
        ({"annotations": [{"id": 1, "image_id": 4, "caption": 7}]}, "has no text in a caption of image 4"),
    ],
)
def test_captions_that_are_not_cocos_are_named(changes, message, tmp_path):
    captions, images = coco(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        read_coco(captions, images)
    for text, message in (("[]", "is a JSON list"), ("{", "is not JSON"), ("[" * 9999, "is not JSON")):
        captions.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_coco(captions, images)
    with pytest.raises(ValueError, match="is not a file; use captions_val2014.json"):
        read_coco(tmp_path / "none", images)
    with pytest.raises(ValueError, match="is not a folder; use that of COCO's images"):
        read_coco(captions, tmp_path / "none")


def test_published_weights_are_found_or_named(tmp_path, monkeypatch):
    published = Published("w.safetensors", "https://example.org/weights.safetensors", "00")
    with pytest.raises(
        ModelError, match=r"w.safetensors does not exist; get w.safetensors from https://example.org/wei"
    ):
        Weights(tmp_path).find(published)
    (tmp_path / "w.safetensors").write_bytes(b"x")
    assert Weights(tmp_path).find(published) == tmp_path / "w.safetensors"
    with pytest.raises(ModelError, match="w.safetensors"):
        Weights(tmp_path).open(published)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def offline(*_, **__):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    with pytest.raises(ModelError, match="cannot be fetched .*; put w.safetensors of .* and name it by --weights_dir$"):
        Weights(None).find(published)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: (tmp_path / "w.safetensors").open("rb"))
    with pytest.raises(ModelError, match="is damaged: its sha256 is 2d71.* and should begin with 00"):
        Weights(None).find(published)
    assert not list((tmp_path / "cache" / "lcm_jax").iterdir())
    fetched = Weights(None).find(published._replace(sha256="2d71"))
    assert fetched.read_bytes() == b"x" and fetched.is_relative_to(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="w.safetensors of org/name is not in the hub's cache and cannot be fetched"):
        Weights(None).find(published._replace(source="org/name"))
