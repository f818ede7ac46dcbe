from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from lcm_jax.data import shapes
from lcm_jax.data.shapes import COLORS, RELATIONS, SHAPES, SIZES, TASKS, Shapes, Specification
from lcm_jax.evaluation.verifier import detect, score, verify

PER_TASK = 300
WRONG = 150  # scenes for each task and kind of wrong fact


def _scenes(task: str, count: int, split: str = "test", style: str = "fill") -> list[shapes.Scene]:
    turn = len(TASKS)
    data = Shapes(split, turn * count, style=style)
    return [data.scene(turn * i + TASKS.index(task)) for i in range(count)]


def _degrade(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add the blur and noise of a decoder."""
    soft = ndimage.gaussian_filter(image.astype(np.float32), (0.7, 0.7, 0)) + rng.normal(0, 4, image.shape)
    return np.clip(soft + 0.5, 0, 255).astype(np.uint8)


# ---- ground truth is accepted ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_accepts_ground_truth_clean_and_degraded(task):
    rng = np.random.default_rng(0)
    clean = degraded = 0
    for scene in _scenes(task, PER_TASK):
        image = shapes.render(scene)
        clean += verify(image, scene.caption).ok
        degraded += verify(_degrade(image, rng), scene.caption).ok
    assert clean >= 0.99 * PER_TASK
    assert degraded >= 0.98 * PER_TASK


def test_accepts_held_out_pairs():
    data = Shapes("composition", PER_TASK)
    assert sum(verify(data[i]["image"], data[i]["caption"]).ok for i in range(PER_TASK)) >= 0.99 * PER_TASK


@pytest.mark.parametrize("task", TASKS)
def test_accepts_images_of_twice_the_size(task):
    scenes = _scenes(task, 40)
    assert sum(verify(shapes.render(scene, 128), scene.caption).ok for scene in scenes) >= 39


# ---- one wrong fact is rejected -------------------------------------------------------------------------------------
# Each of these functions returns a specification that differs in one fact, or None if the given one names no such fact.
# A scene of the result is then judged by the caption of the original.


def _other(rng: np.random.Generator, options, known: str | None) -> str:
    return str(rng.choice([option for option in options if option != known]))


def _change_one(specification: Specification, rng: np.random.Generator, **fact: Callable) -> Specification | None:
    """Give a thing that names the fact, chosen at random, another value of it."""
    ((name, options),) = fact.items()
    naming = [i for i, thing in enumerate(specification.things) if getattr(thing, name)]
    if not naming:
        return None
    i = int(rng.choice(naming))
    things = list(specification.things)
    things[i] = replace(things[i], **{name: _other(rng, options, getattr(things[i], name))})
    return replace(specification, things=tuple(things))


def _wrong_color(specification, rng):
    return _change_one(specification, rng, color=COLORS)


def _wrong_shape(specification, rng):
    return _change_one(specification, rng, shape=SHAPES)


def _wrong_size(specification, rng):
    return _change_one(specification, rng, size=SIZES)


def _one_more(specification, rng):
    things = (*specification.things, specification.things[rng.integers(len(specification.things))])
    if len(things) == 5:  # only small ones have room
        things = tuple(replace(thing, size="small") for thing in things)
    return replace(specification, things=things)


def _one_less(specification, rng):
    if len(specification.things) == 1:
        return replace(specification, things=())
    kept = list(specification.things)
    del kept[rng.integers(len(kept))]
    return replace(specification, things=tuple(kept), relation=None)


def _swapped_position(specification, rng):
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
    return replace(specification, relation=opposite[specification.relation]) if specification.relation else None


def _wrong_position(specification, rng):
    if not specification.relation:
        return None
    return replace(specification, relation=_other(rng, RELATIONS, specification.relation))


def _swapped_attribution(specification, rng):
    if len(specification.things) != 2:
        return None
    first, second = specification.things
    if first.color == second.color or first.shape == second.shape and not specification.relation:
        return None  # swapped, it would be the same specification
    swapped = (replace(first, color=second.color), replace(second, color=first.color))
    return replace(specification, things=swapped)


KINDS = {
    "wrong color": (_wrong_color, ("colors", "position", "color_attribution")),
    "wrong shape": (_wrong_shape, TASKS),
    "wrong size": (_wrong_size, ("single_object", "colors")),
    "one more": (_one_more, TASKS),
    "one less": (_one_less, TASKS),
    "swapped position": (_swapped_position, ("position",)),
    "wrong position": (_wrong_position, ("position",)),
    "swapped attribution": (_swapped_attribution, ("position", "color_attribution")),
}


@pytest.mark.parametrize(("kind", "task"), [(kind, task) for kind, (_, tasks) in KINDS.items() for task in tasks])
def test_rejects_one_wrong_fact(kind, task):
    rng = np.random.default_rng(len(kind))
    change = KINDS[kind][0]
    tried = accepted = 0
    # The verifier is tested here, not a model, so the many more training captions can join those of the test.
    for scene in (*_scenes(task, 3 * WRONG, "train"), *_scenes(task, WRONG)):
        wrong = change(scene.specification, rng)
        if wrong is None or tried == WRONG:
            continue
        image = shapes.render(shapes.compose("", wrong, rng))
        tried += 1
        accepted += verify(image, scene.caption).ok
    assert tried == WRONG
    assert accepted <= 0.02 * tried


@pytest.mark.parametrize("kind", ["wrong color", "swapped position", "swapped attribution"])
def test_rejects_wrong_facts_in_degraded_images(kind):
    rng = np.random.default_rng(7)
    accepted = tried = 0
    for scene in _scenes("position", 300):
        wrong = KINDS[kind][0](scene.specification, rng)
        if wrong is not None:
            tried += 1
            image = _degrade(shapes.render(shapes.compose("", wrong, rng)), rng)
            accepted += verify(image, scene.caption).ok
    assert tried >= 100 and accepted <= 0.02 * tried


@pytest.mark.parametrize("task", TASKS)
def test_rejects_an_empty_image(task):
    for caption in shapes.captions("test", task)[:20]:
        assert not verify(np.full((64, 64, 3), 128, np.uint8), caption).ok


def test_rejects_noise_and_flat_color():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    flat = np.full((64, 64, 3), COLORS["red"], np.uint8)
    for caption in shapes.captions("test"):
        assert not verify(noise, caption).ok and not verify(flat, caption).ok, caption


# ---- outlines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_accepts_outlines_clean_and_degraded(task):
    rng = np.random.default_rng(0)
    scenes = _scenes(task, 60, style="outline")
    images = [shapes.render(scene) for scene in scenes]
    assert sum(verify(image, s.caption).ok for image, s in zip(images, scenes, strict=True)) >= 59
    assert sum(verify(_degrade(image, rng), s.caption).ok for image, s in zip(images, scenes, strict=True)) >= 58
    assert sum(verify(shapes.render(s, 128), s.caption).ok for s in scenes[:20]) >= 19


@pytest.mark.parametrize("kind", KINDS)
def test_rejects_one_wrong_fact_of_outlines(kind):
    rng = np.random.default_rng(len(kind))
    change, tasks = KINDS[kind]
    tried = accepted = 0
    for scene in (scene for task in tasks for scene in _scenes(task, 90 // len(tasks), "train")):
        if (wrong := change(scene.specification, rng)) is not None:
            tried += 1
            accepted += verify(shapes.render(shapes.compose("", wrong, rng, "outline")), scene.caption).ok
    assert tried >= 30 and accepted <= 0.02 * tried


def test_colors_of_outlines_are_not_those_of_fills():
    """So that what is judged of fills does not depend on the palette of another style."""
    filled = shapes.compose("", shapes.parse("a large purple circle"), np.random.default_rng(0))
    thing = replace(filled.objects[0], rgb=shapes.OUTLINE_COLORS["purple"])
    filled = replace(filled, objects=(thing,))
    assert detect(shapes.render(filled))[0].color is None
    assert detect(shapes.render(replace(filled, style="outline")))[0].color == "purple"


# ---- detections, reasons and scores ---------------------------------------------------------------------------------


def test_detections_are_where_the_objects_are():
    for scene in _scenes("counting", 60):
        found = detect(shapes.render(scene))
        drawn = sorted(scene.objects, key=lambda o: o.x)
        assert len(found) == len(drawn)
        for o in drawn:
            near = min(found, key=lambda d: np.hypot(d.x - o.x, d.y - o.y))
            assert (near.shape, near.color) == (o.shape, o.color)
            assert np.hypot(near.x - o.x, near.y - o.y) < 1.5 and abs(near.radius - o.radius) < 1.0


def test_verdict_gives_its_reason():
    rng = np.random.default_rng(0)
    image = shapes.render(shapes.compose("", shapes.parse("a small red circle"), rng))
    assert verify(image, "a small red circle").ok
    assert verify(image, "a blue circle").reason == "seen: small red circle"
    assert verify(image, "two circles").reason == "2 objects expected, 1 seen: small red circle"
    two = shapes.render(shapes.compose("", shapes.parse("a red circle above a blue square"), rng))
    assert verify(two, "a red circle below a blue square").reason.startswith("not below: ")


def test_caption_outside_the_grammar_is_an_error():
    with pytest.raises(ValueError, match="'dog'"):
        verify(np.zeros((64, 64, 3), np.uint8), "a red dog")


def test_score_is_the_mean_of_the_tasks():
    rng = np.random.default_rng(0)
    circle = shapes.render(shapes.compose("", shapes.parse("a red circle"), rng))
    three = shapes.render(shapes.compose("", shapes.parse("three crosses"), rng))
    images = [circle, circle, circle, circle, three]
    asked = ["a red circle", "a blue circle", "a green circle", "a red square", "three crosses"]
    assert score(images, asked) == {"overall": 0.625, "tasks": {"counting": 1.0, "colors": 0.25}}
    with pytest.raises(ValueError):
        score(images, asked[:-1])
