import hashlib
import re
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from lcm_jax.data import shapes
from lcm_jax.data.shapes import SPLITS, TASKS, Shapes, ShapesSource, Specification, Thing, captions, describe, parse


def _scenes(split: str, count: int = 600) -> list[shapes.Scene]:
    data = Shapes(split, count)
    return [data.scene(i) for i in range(count)]


# ---- captions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_parse_inverts_describe_for_every_content(task):
    contents = shapes._contents(task)
    assert len(set(contents)) == len(contents)
    for specification in contents:
        for opener in shapes.OPENERS:
            assert parse(describe(specification, opener)) == specification


def test_grammar_reads_as_english():
    assert parse("A photo of  an orange circle") == Specification("colors", (Thing("circle", "orange"),))
    assert parse("three crosses") == Specification("counting", (Thing("cross"),) * 3)
    position = Specification("position", (Thing("circle", "red"), Thing("square", "blue")), "above")
    assert describe(position, "a drawing of ") == "a drawing of a red circle above a blue square"
    assert describe(Specification("colors", (Thing("cross", "orange", "small"),))) == "a small orange cross"


@pytest.mark.parametrize(
    ("caption", "culprit"),
    [
        ("a pink circle", "'pink'"),
        ("seven circles", "'seven'"),
        ("a red circle above a blue hexagon", "'hexagon'"),
        ("a circle red", "order"),
        ("", "order"),
    ],
)
def test_caption_outside_the_grammar_names_the_word(caption, culprit):
    with pytest.raises(ValueError, match=f"caption {re.escape(repr(caption))}.*{culprit}.*try "):
        parse(caption)


def test_words_are_exactly_those_of_the_captions():
    used = {word for split in SPLITS for caption in captions(split) for word in caption.split()}
    assert used == set(shapes.words())
    assert list(shapes.words()) == sorted(shapes.words())


# ---- splits ---------------------------------------------------------------------------------------------------------


def test_splits_share_no_caption_and_leave_none_out():
    of = {split: captions(split) for split in SPLITS}
    assert all(len(set(listed)) == len(listed) for listed in of.values())
    for first, second in combinations(SPLITS, 2):
        assert not set(of[first]) & set(of[second]), (first, second)
    every = {describe(s, opener) for task in TASKS for s in shapes._contents(task) for opener in shapes.OPENERS}
    assert set().union(*of.values()) == every


@pytest.mark.parametrize("task", ["colors", "position", "color_attribution"])
def test_tasks_of_many_contents_hold_out_contents_not_wordings(task):
    contents = [{parse(caption) for caption in captions(split, task)} for split in SPLITS]
    assert all(not first & second for first, second in combinations(contents, 2))


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_captions_to_test(task):
    assert len(captions("test", task)) >= 5
    assert len(captions("val", task)) >= 3
    assert len(captions("train", task)) > 2 * len(captions("test", task))


def test_captions_of_the_splits_have_not_moved():
    # The shipped model was trained on one side of this line and is measured on the other.
    digest = hashlib.sha256("\n".join(c for split in SPLITS for c in captions(split)).encode()).hexdigest()
    assert digest[:16] == "e8a038dfd0a315e1"


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_held_out_pairs_are_in_no_picture_outside_composition(split):
    for scene in _scenes(split, 3000):
        assert not {(o.color, o.shape) for o in scene.objects} & set(shapes.HELD_OUT_PAIRS), scene.caption


def test_composition_always_names_a_held_out_pair_and_draws_it():
    for caption in captions("composition"):
        assert any((t.color, t.shape) in shapes.HELD_OUT_PAIRS for t in parse(caption).things), caption
    for scene in _scenes("composition", 300):
        assert {(o.color, o.shape) for o in scene.objects} & set(shapes.HELD_OUT_PAIRS), scene.caption


# ---- scenes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_draw_what_their_captions_say(split):
    allowed = set(captions(split))
    for scene in _scenes(split):
        assert scene.caption in allowed and parse(scene.caption) == scene.specification
        for thing, seen in zip(scene.specification.things, scene.objects, strict=True):
            assert thing.shape == seen.shape and thing.color in (None, seen.color)
            if thing.size:
                assert shapes.SIZES[thing.size][0] <= seen.radius <= shapes.SIZES[thing.size][1]


def test_tasks_take_turns():
    assert [scene.specification.task for scene in _scenes("train", 12)] == [*TASKS, *TASKS]
    assert {scene.specification.task for scene in _scenes("composition", 30)} == set(TASKS[3:])


@pytest.mark.parametrize("split", ["train", "composition"])
def test_objects_lie_inside_and_apart(split):
    for scene in _scenes(split, 1200):
        for o in scene.objects:
            reach = shapes.REACH * o.radius + shapes.BORDER
            assert reach <= o.x <= shapes.BASE - reach and reach <= o.y <= shapes.BASE - reach
        for a, b in combinations(scene.objects, 2):
            assert np.hypot(a.x - b.x, a.y - b.y) >= shapes.REACH * (a.radius + b.radius) + shapes.GAP - 1e-9


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_no_shape_leaves_its_reach(shape):
    axis = np.linspace(-2, 2, 801)
    inside = shapes.outline(shape, axis[None, :], axis[:, None], 1.0) < 0
    assert np.hypot(axis[None, :], axis[:, None])[inside].max() <= shapes.REACH


def test_positions_are_clear():
    axes = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}  # of the first from the second
    seen = set()
    for scene in _scenes("train", 1800):
        if scene.specification.task == "position":
            first, second = scene.objects
            dx, dy = first.x - second.x, first.y - second.y
            ax, ay = axes[scene.specification.relation]
            assert dx * ax + dy * ay > 2 * abs(dx * ay + dy * ax), scene
            seen.add(scene.specification.relation)
    assert seen == set(axes)


# ---- records --------------------------------------------------------------------------------------------------------


def test_records_depend_on_seed_split_and_index_alone():
    forwards, backwards = Shapes("train", 24), Shapes("train", 1000)
    records = [forwards[i] for i in range(24)]
    for i in reversed(range(24)):
        again = backwards[i]
        assert again["caption"] == records[i]["caption"]
        np.testing.assert_array_equal(again["image"], records[i]["image"])
    assert any((Shapes("train", 24, seed=1)[i]["image"] != records[i]["image"]).any() for i in range(24))
    assert len({record["image"].tobytes() for record in records}) == 24


@pytest.mark.parametrize("size", [64, 128])
def test_pictures_have_the_size_asked_for(size):
    image = Shapes("val", 4, size)[3]["image"]
    assert image.shape == (size, size, 3) and image.dtype == np.uint8


def test_both_sizes_show_the_same_picture():
    small, large = Shapes("train", 60), Shapes("train", 60, 128)
    for i in range(60):
        halved = large[i]["image"].reshape(64, 2, 64, 2, 3).mean((1, 3))
        difference = np.abs(halved - small[i]["image"])
        assert small[i]["caption"] == large[i]["caption"]
        assert difference.mean() < 1 and difference.max() < 70  # the rims differ by how coverage is estimated


def test_edges_are_anti_aliased():
    disc = shapes.Object("circle", "red", 32, 32, 12, (255, 0, 0))
    plain = shapes.Ground("plain", (0.0, 0.0, 0.0), (0.0, 0.0, 0.0), 0.0, 20.0, 0.0)
    red = shapes.render(shapes.Scene("a red circle", parse("a red circle"), (disc,), plain))[..., 0]
    assert len(np.unique(red)) >= 8  # hard edges would leave two
    assert red.sum() / 255 == pytest.approx(np.pi * 12**2, rel=0.01)


def test_every_color_shape_and_ground_is_drawn():
    scenes = _scenes("train", 1200)
    assert {o.shape for s in scenes for o in s.objects} == set(shapes.SHAPES)
    assert {o.color for s in scenes for o in s.objects} == set(shapes.COLORS) and len(shapes.COLORS) >= 6
    assert {s.ground.kind for s in scenes} == {"plain", "gradient", "stripes", "checks", "dots"}


@pytest.mark.parametrize("index", [-1, 5])
def test_records_outside_the_set_are_errors(index):
    with pytest.raises(IndexError, match=f"record {index} of 5"):
        Shapes("train", 5)[index]


def test_unknown_split_is_an_error():
    with pytest.raises(ValueError, match="'training'.*train, val, test, composition"):
        Shapes("training", 5)


def test_a_task_that_is_named_twice_comes_twice_as_often():
    data = Shapes("train", 60, tasks=("position", "counting", "position"))
    assert [data.scene(i).specification.task for i in range(6)] == ["position", "counting", "position"] * 2
    half = Shapes("train", 60, tasks=("position", "counting"), relations=("left", "above"))
    assert {half.scene(i).specification.relation for i in range(60)} == {"left", "above", None}
    for wrong in (("behind",), ()):
        with pytest.raises(
            ValueError, match="data.relations .* is not supported; use some of left, right, above, below"
        ):
            Shapes("train", 60, relations=wrong)
    with pytest.raises(ValueError, match="data.tasks 'texture' is not supported; use some of single_object"):
        Shapes("train", 60, tasks=("texture",))
    with pytest.raises(ValueError, match="have no captions in split 'composition'"):
        Shapes("composition", 60, tasks=("counting",))


# ---- styles ---------------------------------------------------------------------------------------------------------


def test_fills_have_not_moved(tmp_path):
    # The bundled models were trained on these images.
    data = Shapes("train", 24)
    digest = hashlib.sha256(b"".join(data[i]["image"].tobytes() for i in range(24))).hexdigest()
    assert digest[:16] == "a80c5111048435cb"
    manifest = ShapesSource(5000, 64, 8).open(0, tmp_path, print).manifest
    assert manifest["tasks"] == "single_object two_object counting colors position color_attribution"
    assert {name: manifest[name] for name in ("source", "size", "length", "style", "relations")} == {
        "source": "shapes",
        "size": "64",
        "length": "5000",
        "style": "fill",
        "relations": "left right above below",
    }


@pytest.mark.parametrize("split", SPLITS)
def test_styles_draw_the_same_scenes(split):
    fills, outlines = Shapes(split, 40), Shapes(split, 40, style="outline")
    for i in range(40):
        fill, outline = fills.scene(i), outlines.scene(i)
        assert (fill.caption, fill.ground) == (outline.caption, outline.ground)
        for a, b in zip(fill.objects, outline.objects, strict=True):
            assert a == replace(b, rgb=a.rgb) and a.rgb != b.rgb
            assert np.abs(np.array(b.rgb) - shapes.OUTLINE_COLORS[b.color]).max() <= 8


@pytest.mark.parametrize("shape", shapes.SHAPES)
@pytest.mark.parametrize("radius", [7.0, 8.5, 14.0])
def test_an_outline_has_a_hole_and_the_extent_of_a_fill(shape, radius):
    thing = shapes.Object(shape, "red", 32, 32, radius, (255, 0, 0))
    ground = shapes.Ground("plain", (0.0, 0.0, 0.0), (0.0, 0.0, 0.0), 0.0, 20.0, 0.0)
    scene = shapes.Scene("", parse("a red circle"), (thing,), ground)
    fill, outline = (shapes.render(replace(scene, style=style), 256)[..., 0] for style in ("fill", "outline"))
    for axis in (0, 1):  # whichever pixels it reaches
        np.testing.assert_array_equal(fill.max(axis) > 128, outline.max(axis) > 128)
    assert fill[128, 128] == 255 and outline[128, 128] == 0 and np.all(outline <= fill)


def test_colors_of_both_styles_are_apart():
    named = [(name, np.array(rgb)) for palette in shapes.STYLES.values() for name, rgb in palette.items()]
    assert all(list(palette) == list(shapes.COLORS) for palette in shapes.STYLES.values())
    for (a, first), (b, second) in combinations(named, 2):
        assert np.linalg.norm(first - second) >= (30 if a == b else 77), (a, b)


def test_a_source_has_its_style_everywhere_and_in_its_fingerprint(tmp_path):
    fill, outline = (ShapesSource(8, 64, 8, style=style).open(0, tmp_path, print) for style in ("fill", "outline"))
    assert fill.fingerprint != outline.fingerprint and fill.prompts(8) == outline.prompts(8)
    for part, split in ((outline.train, "train"), (outline.held_out, "test")):
        np.testing.assert_array_equal(part[3]["image"], Shapes(split, 8, style="outline")[3]["image"])
    with pytest.raises(ValueError, match="^data.style 'dots' is not supported; use one of fill, outline$"):
        ShapesSource(8, 64, 8, style="dots").check(4)
