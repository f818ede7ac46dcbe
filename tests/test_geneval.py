"""GenEval's rules, one by one at their boundaries; its prompts, its folder of images, and detections from a file."""

import json
from functools import partial

import numpy as np
import pytest
from PIL import Image

from lcm_jax import config_files
from lcm_jax.evaluation import geneval
from lcm_jax.evaluation.detector import Objects
from lcm_jax.evaluation.evaluate import Resources
from lcm_jax.evaluation.geneval import GenEval, judge, overlap, relations, select_objects
from lcm_jax.evaluation.geneval_files import (
    COLORS,
    TASKS,
    Prompt,
    Requirement,
    find_prompt,
    image_path,
    list_images,
    make_folders,
    read_detections,
    read_metadata,
)
from lcm_jax.evaluation.prompt_sets import open_geneval
from lcm_jax.recipes.evaluation import score_images
from lcm_jax.weights.published import Weights


def spots(*objects: tuple) -> Objects:
    """Objects (class, score) or (class, score, left, top, right, bottom), 10 pixels wide by default."""
    boxes = [each[2:] or (0, 0, 10, 10) for each in objects]
    scores = np.array([each[1] for each in objects], np.float32)
    return Objects(np.array(boxes, np.float32).reshape(-1, 4), scores, tuple(each[0] for each in objects))


def prompt(tag: str, *include: Requirement, exclude: tuple[Requirement, ...] = ()) -> Prompt:
    return Prompt("a prompt", tag, include, exclude, {})


def no_colors(name, numbers):
    raise AssertionError("nothing is asked for its color")


decide = partial(judge, classify=no_colors)
ONE_DOG = prompt("single_object", Requirement("dog", 1))


# ---- the rules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("score", "correct"), [(0.3, False), (np.nextafter(np.float32(0.3), 1), True), (1.0, True)])
def test_a_score_exceeds_the_threshold(score, correct):
    assert decide(ONE_DOG, spots(("dog", score))).correct == correct


@pytest.mark.parametrize(("score", "correct"), [(0.9, False), (np.nextafter(np.float32(0.9), 1), True)])
def test_counting_has_a_higher_threshold(score, correct):
    two = Requirement("dog", 2)
    dogs = spots(("dog", 0.99), ("dog", score))
    assert decide(prompt("counting", two), dogs).correct == correct
    assert decide(prompt("two_object", two), dogs).correct


def test_other_classes_do_not_count():
    verdict = decide(prompt("two_object", Requirement("dog", 1), Requirement("cat", 1)), spots(("dog", 0.9)))
    assert verdict == (False, ("missing",), ("1 cat expected, 0 found",))


def test_more_objects_than_required_are_right_unless_excluded():
    three, four = Requirement("dog", 3), Requirement("dog", 4)
    counting = prompt("counting", three, exclude=(four,))
    for count, errors in [(2, ("missing",)), (3, ()), (4, ("too_many",)), (9, ("too_many",))]:
        dogs = spots(*[("dog", 0.95)] * count)
        assert decide(counting, dogs).errors == errors
        assert decide(prompt("counting", three), dogs).correct == (count >= 3)
    assert decide(counting, spots(*[("dog", 0.95)] * 4)).reasons == ("fewer than 4 dog expected, 4 found",)


def test_at_most_16_objects_of_a_class_count():
    scores = np.linspace(0.95, 0.99, 17, dtype=np.float32)
    chosen = select_objects(np.zeros((17, 4), np.float32), scores, 0.3)
    assert chosen == list(range(16, 0, -1)), "the most confident ones, in this order"
    sixteen, seventeen = (prompt("counting", Requirement("dog", n)) for n in (16, 17))
    dogs = spots(*[("dog", score) for score in scores])
    assert decide(sixteen, dogs).correct and decide(seventeen, dogs).reasons == ("17 dog expected, 16 found",)


def test_overlap_covers_the_last_pixels():
    box = np.array([0, 0, 9, 9], np.float32)
    assert overlap(box, box) == 1
    assert overlap(box, np.array([5, 0, 14, 9], np.float32)) == pytest.approx(50 / 150)
    assert overlap(box, np.array([9, 9, 18, 18], np.float32)) == pytest.approx(1 / 199), (
        "corners that touch share a pixel"
    )
    assert overlap(box, np.array([10, 0, 19, 9], np.float32)) == 0
    assert overlap(np.array([5, 5, 3, 3], np.float32), np.array([9, 9, 7, 7], np.float32)) == 0


def test_overlapping_objects_are_left_out_only_where_a_limit_is_set():
    boxes = np.array([[0, 0, 9, 9], [0, 0, 9, 9], [5, 0, 14, 9], [50, 50, 59, 59]], np.float32)
    scores = np.array([0.5, 0.9, 0.8, 0.7], np.float32)
    assert select_objects(boxes, scores, 0.3) == [1, 2, 3, 0], "the published default, even for equal boxes"
    assert select_objects(boxes, scores, 0.3, max_overlap=0.9) == [1, 2, 3]
    assert select_objects(boxes, scores, 0.3, max_overlap=1 / 3) == [1, 3], "as much as the limit is too much"


def test_equal_scores_are_ordered_from_the_last():
    assert select_objects(np.zeros((3, 4), np.float32), np.full(3, 0.5, np.float32), 0.3) == [2, 1, 0]


BOX = (100, 100, 120, 120)


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0, 100, 20, 120), {"left of"}),
        ((200, 100, 220, 120), {"right of"}),
        ((100, 0, 120, 20), {"above"}),
        ((100, 200, 120, 220), {"below"}),
        ((0, 0, 20, 20), {"left of", "above"}),  # (100 - 4) / 141 along both axes
        (BOX, set()),
        ((104, 100, 124, 120), set()),  # 4 pixels, as much as a tenth of both sizes
        ((104.0005, 100, 124.0005, 120), set()),  # less than a thousandth of a pixel is left
        ((104.01, 100, 124.01, 120), set()),  # 0.01 of 4.01 is left
        ((105, 100, 125, 120), set()),  # 1 / 5 is left
        ((108, 100, 128, 120), set()),  # (8 - 4) / 8 is exactly a half
        ((108.01, 100, 128.01, 120), {"right of"}),
        ((92, 100, 112, 120), set()),
        ((91.99, 100, 111.99, 120), {"left of"}),
        ((100, 92, 120, 112), set()),
        ((100, 91.99, 120, 111.99), {"above"}),
        ((100, 108.01, 120, 128.01), {"below"}),
        # The offset (30, 40) has length 50 and is shortened to (26, 36): by its own length, 44.4, x would count.
        ((130, 140, 150, 160), {"right of", "below"}),
        ((124, 132, 144, 152), {"below"}),  # x: (24 - 4) / 40 is a half; by the shortened length it would be 0.58
    ],
)
def test_a_position_is_a_share_of_the_whole_offset(box, expected):
    assert relations(np.array(box), np.array(BOX)) == expected


def test_the_margin_is_of_both_sizes_on_each_axis():
    wide, narrow = np.array([0, 0, 100, 20]), np.array([140, 0, 160, 20])  # offset 100, margin 12
    assert relations(narrow, wide) == {"right of"} and relations(wide, narrow) == {"left of"}
    tall = np.array([0, -190, 20, 210])  # offset (0, 0), then (30, 0): margins of 4 across, 42 along
    assert relations(tall, np.array([0, 0, 20, 20])) == set()
    assert relations(tall + np.array([30, 0, 30, 0]), np.array([0, 0, 20, 20])) == {"right of"}


LEFT = prompt("position", Requirement("cat", 1), Requirement("dog", 1, position=("left of", 0)))


def test_a_position_is_that_of_the_most_confident_objects():
    cat, dog, other = ("cat", 0.9, 100, 0, 120, 20), ("dog", 0.8, 0, 0, 20, 20), ("dog", 0.7, 200, 0, 220, 20)
    assert decide(LEFT, spots(cat, dog, other)).correct
    verdict = decide(LEFT, spots(cat, (*dog[:1], 0.6, *dog[2:]), other))
    assert verdict == (False, ("wrong_position",), ("dog left of its target expected, is right of",))
    assert decide(LEFT, spots(cat, ("dog", 0.9, 100, 0, 120, 20))).reasons == (
        "dog left of its target expected, is neither left, right, above nor below",
    )


def test_every_pair_has_the_position():
    pairs = prompt("position", Requirement("cat", 2), Requirement("dog", 2, position=("left of", 0)))
    cats = [("cat", 0.9, 100, 0, 120, 20), ("cat", 0.9, 200, 0, 220, 20)]
    dogs = [("dog", 0.9, 0, 0, 20, 20), ("dog", 0.9, 50, 0, 70, 20)]
    assert decide(pairs, spots(*cats, *dogs)).correct
    assert not decide(pairs, spots(*cats, dogs[0], ("dog", 0.9, 150, 0, 170, 20))).correct, "between both cats"


def test_a_position_needs_its_target_and_its_object():
    dog, cat = ("dog", 0.9, 0, 0, 20, 20), ("cat", 0.9, 100, 0, 120, 20)
    verdict = decide(LEFT, spots(dog))
    assert verdict.errors == ("missing", "wrong_position")
    assert verdict.reasons == ("1 cat expected, 0 found", "nothing that dog could be left of")
    assert decide(LEFT, spots(cat)).errors == ("missing",), "an object that is missing has no position"


def test_a_target_of_the_wrong_color_is_no_target():
    both = prompt("position", Requirement("cat", 1, "red"), Requirement("dog", 1, position=("left of", 0)))
    placed = spots(("dog", 0.9, 0, 0, 20, 20), ("cat", 0.9, 100, 0, 120, 20))
    assert judge(both, placed, lambda name, numbers: ["red"]).correct
    assert judge(both, placed, lambda name, numbers: ["blue"]).errors == ("wrong_color", "wrong_position")


def test_a_color_is_that_of_the_most_confident_objects():
    asked = []

    def classify(name, numbers):
        asked.append((name, list(numbers)))
        return [("red", "blue", "red")[i] for i in numbers]

    cups = spots(("cup", 0.5), ("cup", 0.9), ("cup", 0.8))  # red, blue, red
    assert judge(prompt("colors", Requirement("cup", 1, "blue")), cups, classify).correct
    verdict = judge(prompt("colors", Requirement("cup", 1, "red")), cups, classify)
    assert verdict == (False, ("wrong_color",), ("1 red cup expected, found blue",))
    assert judge(prompt("colors", Requirement("cup", 2, "red")), cups, classify).reasons == (
        "2 red cup expected, found blue, red",
    )
    assert asked == [("cup", [1]), ("cup", [1]), ("cup", [1, 2])], "beyond their number none is looked at"


# ---- colors ---------------------------------------------------------------------------------------------------------


def test_a_crop_is_gray_outside_of_the_mask():
    image = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    mask = np.zeros((6, 8), bool)
    mask[1:3, 2:5] = True
    crop = geneval.crop_object(image, np.array([1, 1, 5, 4], np.float32), mask)
    assert crop.shape == (3, 4, 3)
    np.testing.assert_array_equal(crop[:2, 1:], image[1:3, 2:5])
    assert (crop[2] == 0x99).all() and (crop[:, 0] == 0x99).all()
    np.testing.assert_array_equal(geneval.crop_object(image, np.array([1, 1, 5, 4]), None), image[1:4, 1:5])


def test_the_nearest_of_ten_colors_in_three_templates():
    """Texts are embedded by their color, of any length; the mean of their directions decides."""
    seen = []

    def embed_texts(texts):
        seen.extend(texts)
        colors = [next(color for color in COLORS if f" {color}" in text) for text in texts]
        return np.eye(10)[[COLORS.index(color) for color in colors]] * np.arange(1, 31)[:, None]

    def embed_images(crops):
        return np.stack([np.eye(10)[crop[0, 0, 0]] + 0.5 * np.eye(10)[0] for crop in crops])

    classify = geneval.ColorClassifier(embed_images, embed_texts)
    crops = [np.full((2, 3, 3), i, np.uint8) for i in range(10)]
    assert classify(crops, "tv remote") == list(COLORS) and classify(crops[3:4], "tv remote") == ["green"]
    assert len(seen) == 30, "embedded once for a class"
    assert seen[:4] == [
        "a photo of a red tv remote",
        "a photo of a red-colored tv remote",
        "a photo of a red object",
        "a photo of a orange tv remote",
    ]


# ---- the figures ----------------------------------------------------------------------------------------------------


def test_the_overall_score_is_the_mean_over_tasks():
    """By hand: 3 of 4 images of one task, 0 of 1 of another: 0.375, though 60% of the images are correct."""
    rows = {
        "task": np.array([0, 0, 0, 0, 2], np.int8),
        "prompt": np.array([0, 0, 1, 1, 2], np.int32),
        "correct": np.array([True, True, False, True, False]),
        "errors": np.array([[0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]], bool),
    }
    figures = geneval.summarize(rows)
    assert figures["overall"] == 0.375 and figures["tasks"] == {"single_object": 0.75, "counting": 0.0}
    assert figures["prompts"] == pytest.approx(2 / 3), "prompts with a correct image"
    assert figures["errors"] == {"missing": 0.4, "wrong_color": 0.0, "wrong_position": 0.0, "too_many": 0.2}


# ---- files ----------------------------------------------------------------------------------------------------------

LINES = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "dog", "count": 2}],
        "exclude": [{"class": "dog", "count": 3}],
        "prompt": "a photo of two dogs",
    },
    {
        "tag": "position",
        "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
        "prompt": "a photo of a dog left of a cat",
    },
    {
        "tag": "colors",
        "include": [{"class": "tv remote", "count": 1, "color": "red"}],
        "prompt": "a photo of a red tv remote",
    },
]


@pytest.fixture
def metadata(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def test_prompts_are_read_with_what_they_require(metadata):
    prompts = read_metadata(metadata)
    assert [each.text for each in prompts] == [line["prompt"] for line in LINES]
    assert prompts[1].include == (Requirement("dog", 2),) and prompts[1].exclude == (Requirement("dog", 3),)
    assert prompts[2].include[1] == Requirement("dog", 1, None, ("left of", 0))
    assert prompts[3].include == (Requirement("tv remote", 1, "red"),) and prompts[3].tag == "colors"


def change(**fields) -> str:
    return json.dumps(LINES[0] | fields)


def require(**fields) -> str:
    return change(include=[{"class": "cat", "count": 1}, {"class": "dog", "count": 1} | fields])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not valid JSON"),
        ("[" * 100_000, "line 2 is not valid JSON"),
        ("[1]", r"line 2 is \[1\], which is not supported; use an object"),
        (
            json.dumps({"tag": "colors", "prompt": "x"}),
            "line 2 has no 'include'; its keys are tag, include, prompt, ex",
        ),
        (change(prompt=3), "line 2: prompt is 3, which is not supported; use a text"),
        (change(prompt="\ud800"), "line 2: prompt is .* not valid Unicode"),
        (change(tag="size"), "line 2: tag is 'size', which is not supported; use one of single_object, "),
        (change(tag=["colors"]), r"line 2: tag is \['colors'\]"),
        (change(include={}), "line 2: include is {}, which is not supported; use a list"),
        (change(more=1), "line 2 has the unknown key 'more'"),
        (change(exclude=[{"class": "dog", "count": 1, "color": "red"}]), r"exclude\[0\] has the unknown key 'color'"),
        (require(**{"class": "unicorn"}), r"include\[1\]\.class is 'unicorn'.* one of GenEval's 80 classes"),
        (require(**{"class": "mouse"}), "class is 'mouse'"),
        (require(count=0), r"include\[1\]\.count is 0, which is not supported; use an integer in 1\.\.100"),
        (require(count=10**4000), r"include\[1\]\.count is 1000.*000, which is not supported"),
        (require(count=True), r"include\[1\]\.count is True"),
        (require(count=1e400), r"include\[1\]\.count is inf"),
        (require(color="teal"), r"include\[1\]\.color is 'teal', .* use one of red, orange"),
        (require(position=["left of", 1]), r"include\[1\]\.position is \['left of', 1\]"),
        (require(position=["left of", -1]), r"include\[1\]\.position is"),
        (require(position=["near", 0]), r"include\[1\]\.position is \['near', 0\].* a relation \(left of, right of, "),
        (require(position="above"), r"include\[1\]\.position is 'above'"),
    ],
)
def test_metadata_that_is_not_genevals_is_one_line(tmp_path, line, message):
    path = tmp_path / "metadata.jsonl"
    path.write_text(f"{json.dumps(LINES[0])}\n{line}\n")
    with pytest.raises(ValueError, match=message) as caught:
        read_metadata(path)
    assert str(caught.value).startswith(str(path)) and len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 600


def test_missing_and_empty_metadata(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be read \(No such file or directory\); use an existing file"):
        read_metadata(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="has no prompts"):
        read_metadata(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="has no prompts"):
        read_metadata(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(LINES[0]).encode() + b"\xe9")
    with pytest.raises(ValueError, match="is not UTF-8"):
        read_metadata(tmp_path / "latin.jsonl")


def test_one_text_with_two_requirements_is_an_error(metadata):
    other = {"tag": "single_object", "include": [{"class": "bed", "count": 1}], "prompt": "a photo of a bench"}
    metadata.write_text(metadata.read_text() + json.dumps(other) + "\n" + json.dumps(LINES[1]))
    with pytest.raises(ValueError, match=r"'a photo of a bench' is in lines 1 and 5 .* different requirements"):
        geneval.index_prompts(read_metadata(metadata))


def test_the_folder_is_genevals_and_is_made_once(tmp_path, metadata):
    prompts, folder = read_metadata(metadata), tmp_path / "images"
    images = list_images(prompts)
    assert len(images) == 16 and images[5] == ("a photo of two dogs", 5)
    assert image_path(folder, 0) == folder / "00000" / "samples" / "0000.png"
    assert image_path(folder, 7) == folder / "00001" / "samples" / "0003.png"
    make_folders(folder, prompts)
    assert json.loads((folder / "00002" / "metadata.jsonl").read_text()) == LINES[2]
    make_folders(folder, prompts)
    assert read_metadata(folder) == prompts and find_prompt(image_path(folder, 6)) == "a photo of two dogs"
    assert find_prompt(folder / "00000" / "grid.png") is None and find_prompt(tmp_path / "samples" / "0.png") is None
    with pytest.raises(ValueError, match=r"00000/metadata\.jsonl belongs to another prompt than 'a photo of two dogs'"):
        make_folders(folder, prompts[1:])


# ---- detections and the metric --------------------------------------------------------------------------------------


def noise(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (12, 16, 3), np.uint8)


def write_detections(folder, *lines) -> None:
    (folder / "detections.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def found(name: str, score: float, *box: float, **color) -> dict:
    return {"class": name, "score": score, "box": list(box) or [1, 1, 9, 9]} | color


@pytest.fixture
def images(tmp_path):
    for number in range(6):
        Image.fromarray(noise(number)).save(tmp_path / f"{number}.png")
    return [noise(number) for number in range(6)]


def test_detections_from_a_file_are_judged(tmp_path, metadata, images, monkeypatch):
    """Two images of a bench, two of dogs, one of a position and one of a color: every kind of error once."""
    two_dogs, remote = [found("dog", 0.95)] * 2, found("tv remote", 0.5)
    placed = [found("cat", 0.9, 1, 1, 5, 5), found("dog", 0.9, 10, 1, 14, 5)]
    contents = [[found("bench", 0.4)], [], two_dogs, [*two_dogs, found("dog", 0.91)], placed, [remote]]
    lines = [{"image": f"{i}.png", "objects": objects} for i, objects in enumerate(contents)]
    write_detections(tmp_path, *lines)
    crops = []

    def classify(some, name):
        crops.extend(some)
        return ["blue"] * len(some)

    monkeypatch.setattr(geneval, "open_classifier", lambda resources: classify)
    settings = {"metadata": str(metadata), "detections": str(tmp_path / "detections.jsonl")}
    metric = GenEval.create(Resources(None, "none", settings=settings))
    texts = [LINES[i]["prompt"] for i in (0, 0, 1, 1, 2, 3)]
    rows = metric.measure(images, texts)
    assert rows["correct"].tolist() == [True, False, True, False, False, False]
    assert rows["task"].tolist() == [TASKS.index(LINES[i]["tag"]) for i in (0, 0, 1, 1, 2, 3)]
    assert rows["prompt"].tolist() == [0, 0, 1, 1, 2, 3]
    assert [np.flatnonzero(errors).tolist() for errors in rows["errors"]] == [[], [0], [], [3], [2], [1]]
    np.testing.assert_array_equal(crops, [images[5][1:9, 1:9]])
    result = metric.result(rows)
    assert result.keys() == metric.columns.keys() and result["geneval"] == 0.25 and result["geneval_prompts"] == 0.5
    assert result["geneval_tasks"] == {"single_object": 0.5, "counting": 0.5, "colors": 0.0, "position": 0.0}
    assert metric.scores(rows).tolist() == [1, 0, 1, 0, 0, 0]
    parts = [metric.measure(images[:2], texts[:2]), metric.measure(images[2:], texts[2:])]
    assert all((np.concatenate([part[name] for part in parts]) == rows[name]).all() for name in rows)
    with pytest.raises(ValueError, match="'a photo of two dogs' is not a prompt|'a cat' is not a prompt of settings"):
        metric.measure(images[:1], ["a cat"])
    with pytest.raises(ValueError, match="has no detections of one of the images"):
        metric.measure([noise(9)], texts[:1])


def test_colors_of_a_file_need_no_classifier(tmp_path, metadata, images):
    remote = {"image": "0.png", "objects": [found("tv remote", 0.5, color="red")]}
    write_detections(tmp_path, remote)
    settings = {"metadata": str(metadata), "detections": str(tmp_path / "detections.jsonl")}
    metric = GenEval.create(Resources(None, "none", settings=settings))
    assert metric.measure(images[:1], [LINES[3]["prompt"]])["correct"].tolist() == [True]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"image": "0.png"}, "line 2 has no 'objects'; its keys are image, objects"),
        ({"image": 3, "objects": []}, "line 2: image is 3"),
        ({"image": "none.png", "objects": []}, r"line 2: image 'none\.png' cannot be read .* path relative to"),
        ({"image": "0.png", "objects": [found("unicorn", 0.5)]}, r"objects\[0\]\.class is 'unicorn'"),
        ({"image": "0.png", "objects": [found("dog", 1.5)]}, r"objects\[0\]\.score is 1\.5.* a number in \[0, 1\]"),
        ({"image": "0.png", "objects": [found("dog", float("nan"))]}, r"objects\[0\]\.score is nan"),
        ({"image": "0.png", "objects": [found("dog", 0.5, 1, 2, 3)]}, r"objects\[0\]\.box is \[1, 2, 3\]"),
        ({"image": "0.png", "objects": [found("dog", 0.5, 5, 2, 5, 4)]}, r"box is .* \[left, top, right, bottom\]"),
        ({"image": "0.png", "objects": [found("dog", 0.5, 0, 0, 5, 1e400)]}, r"objects\[0\]\.box is"),
        ({"image": "0.png", "objects": [found("dog", 0.5, color="teal")]}, r"objects\[0\]\.color is 'teal'"),
        (
            {"image": "1.png", "objects": [found("dog", 0.5)]},
            r"image '1\.png' has the pixels of .*line 1 and other obj",
        ),
    ],
)
def test_detections_that_do_not_fit_are_one_line(tmp_path, images, line, message):
    write_detections(tmp_path, {"image": "1.png", "objects": []}, line)
    with pytest.raises(ValueError, match=message) as caught:
        read_detections(tmp_path / "detections.jsonl")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "requires GenEval's evaluation_metadata.jsonl; set settings.metadata"),
        ({"metadata": "none.jsonl"}, "none.jsonl cannot be read"),
        ({"max_overlap": 2.0}, r"max_overlap 2\.0 is not supported; use a number in \[0, 1\]"),
        ({"detections": "none.jsonl"}, "none.jsonl cannot be read"),
    ],
)
def test_options_of_the_metric_are_checked(metadata, settings, message):
    with pytest.raises(ValueError, match=message):
        GenEval.create(Resources(None, "none", settings={"metadata": str(metadata)} | settings if settings else {}))


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def config(metadata):
    config = config_files.load("eval/geneval")
    config.settings.metadata, config.report.prompts = str(metadata), len(LINES)
    return config


def test_a_model_draws_all_images_of_all_prompts_into_genevals_folder(config, tmp_path):
    prompts = open_geneval(config, range, tmp_path)
    assert prompts.prompts == [line["prompt"] for line in LINES for _ in range(4)]
    assert [str(path) for path in prompts.paths[3:5]] == ["00000/samples/0003.png", "00001/samples/0000.png"]
    prompts.prepare(tmp_path / "row")
    assert json.loads((tmp_path / "row" / "00003" / "metadata.jsonl").read_text()) == LINES[3]
    config.report.prompts, config.data.images_per_prompt = 2, 1
    assert open_geneval(config, range, tmp_path).prompts == [line["prompt"] for line in LINES[:2]]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "settings.metadata",
            "",
            "data.source 'geneval' requires its evaluation_metadata.jsonl; set --config.settings",
        ),
        ("settings.metadata", "none.jsonl", "none.jsonl cannot be read"),
        ("report.prompts", 5, "report.prompts 5 is more than the 4 of .*; lower it"),
    ],
)
def test_a_config_that_cannot_be_is_one_line(config, tmp_path, key, value, message):
    group, name = key.split(".")
    config[group][name] = value
    with pytest.raises(ValueError, match=message):
        open_geneval(config, range, tmp_path)


def test_a_folder_of_genevals_is_measured_without_any_list_of_prompts(metadata, tmp_path):
    """As GenEval's own generation leaves it, with a grid beside the images of a prompt; in it, half is right."""
    folder = tmp_path / "images"
    prompts = read_metadata(metadata)
    make_folders(folder, prompts)
    lines = []
    for number in range(16):
        Image.fromarray(noise(number)).save(image_path(folder, number))
        objects = [found("bench", 0.5)] if number < 2 else [found("dog", 0.95), found("dog", 0.95)]
        lines.append({"image": str(image_path(folder, number).relative_to(folder)), "objects": objects})
    Image.new("RGB", (8, 8)).save(folder / "00000" / "grid.png")
    write_detections(folder, *lines)
    settings = {"metadata": str(folder), "detections": str(folder / "detections.jsonl")}
    update = lambda count: None  # noqa: E731
    report = score_images(folder, None, None, ["geneval"], settings, Weights(None), False, 5, update)
    assert report["images"]["count"] == 16
    assert report["geneval_tasks"] == {"single_object": 0.5, "counting": 1.0, "colors": 0.0, "position": 0.0}
    assert report["geneval"] == 0.375 and report["geneval_prompts"] == 0.5
