"""`shapes`: an endless, deterministic set of captioned images of simple shapes, rendered on demand.

Captions come from a grammar that covers the six tasks of GenEval (arXiv 2310.11513): a single object, two objects,
counting, colors, position, color attribution. Some captions are kept for validation and test, and three color-shape
pairs appear in no training image at all, so that composition can be measured.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from lcm_jax.data.captioned import CaptionedDataset
from lcm_jax.data.loader import check_length

SHAPES = ("circle", "square", "triangle", "cross")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
COLORS = {  # sRGB
    "red": (222, 38, 44),
    "green": (36, 166, 60),
    "blue": (44, 84, 226),
    "yellow": (242, 220, 30),
    "purple": (152, 54, 196),
    "orange": (246, 130, 20),
}
OUTLINE_COLORS = {  # sRGB; at least 77 away from colors of other names, here and above
    "red": (166, 40, 30),
    "green": (0, 130, 20),
    "blue": (16, 84, 170),
    "yellow": (255, 255, 60),
    "purple": (236, 26, 224),
    "orange": (255, 150, 60),
}
STYLES = {"fill": COLORS, "outline": OUTLINE_COLORS}  # the palette of each style
STROKE = 3.0  # width of an outline in pixels of an image of 64, inside the shape, so that its size is that of a fill
HOLE = 0.5  # and the least distance from the stroke to the center: the arms of a small cross have a thinner stroke
HELD_OUT_PAIRS = (("yellow", "triangle"), ("purple", "square"), ("blue", "cross"))
SIZES = {"small": (7.0, 8.5), "large": (11.5, 14.0)}  # radius in pixels of an image of 64
NUMBERS = {"two": 2, "three": 3, "four": 4}
RELATIONS = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attribution")
OPENERS = ("", "a picture of ", "a photo of ", "a drawing of ", "an image of ", "a painting of ")
SPLITS = ("train", "val", "test", "composition")
BASE = 64  # radii and gaps are in pixels of an image of this size
GAP = 3.0  # minimum distance between two objects
BORDER = 1.5  # minimum distance from the edge of the image
REACH = 1.22  # a shape of radius r is within a circle of radius REACH * r


@dataclass(frozen=True)
class Thing:
    """One object as a caption names it; None for an attribute that the caption does not specify."""

    shape: str
    color: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Specification:
    """The content of a caption: exactly these things; `relation` places the first relative to the second."""

    task: str
    things: tuple[Thing, ...]
    relation: str | None = None


@dataclass(frozen=True)
class Object:
    """One object of a scene: center and radius in pixels of an image of 64, color in sRGB."""

    shape: str
    color: str
    x: float
    y: float
    radius: float
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Ground:
    """The background: kind is plain, gradient, stripes, checks or dots, between two grays or beiges."""

    kind: str
    first: tuple[float, float, float]
    second: tuple[float, float, float]
    angle: float
    period: float
    phase: float


@dataclass(frozen=True)
class Scene:
    caption: str
    specification: Specification
    objects: tuple[Object, ...]
    ground: Ground
    style: str = "fill"


# ---- the grammar ----------------------------------------------------------------------------------------------------


def _phrase(thing: Thing) -> str:
    parts = [word for word in (thing.size, thing.color, thing.shape) if word]
    return " ".join(["an" if parts[0] == "orange" else "a", *parts])


def describe(specification: Specification, opener: str = "") -> str:
    """Return the caption of a specification. opener: one of OPENERS."""
    first = specification.things[0]
    if specification.task == "counting":
        number = {v: k for k, v in NUMBERS.items()}[len(specification.things)]
        return f"{opener}{number} {PLURALS[first.shape]}"
    if len(specification.things) == 1:
        return opener + _phrase(first)
    link = RELATIONS[specification.relation] if specification.relation else "and"
    return f"{opener}{_phrase(first)} {link} {_phrase(specification.things[1])}"


_THING = (
    rf"an? (?:(?P<size{{0}}>{'|'.join(SIZES)}) )?(?:(?P<color{{0}}>{'|'.join(COLORS)}) )?"
    rf"(?P<shape{{0}}>{'|'.join(SHAPES)})"
)
_LINK = "|".join(["and", *RELATIONS.values()])
_PATTERN = re.compile(rf"{_THING.format(1)}(?: (?P<link>{_LINK}) {_THING.format(2)})?")
_COUNTING = re.compile(rf"(?P<number>{'|'.join(NUMBERS)}) (?P<plural>{'|'.join(PLURALS.values())})")


def parse(caption: str) -> Specification:
    """Return the specification of a caption. Raises ValueError if the grammar does not generate it."""
    text = " ".join(caption.lower().split())
    text = next((text.removeprefix(opener) for opener in OPENERS[1:] if text.startswith(opener)), text)
    if match := _COUNTING.fullmatch(text):
        shape = next(s for s, plural in PLURALS.items() if plural == match["plural"])
        return Specification("counting", (Thing(shape),) * NUMBERS[match["number"]])
    match = _PATTERN.fullmatch(text)
    if not match:
        unknown = [word for word in text.split() if word not in words()]
        why = f"unknown word {', '.join(map(repr, unknown))}" if unknown else "the word order is unknown"
        raise ValueError(
            f"caption {caption!r} is outside the grammar of shapes ({why}); try 'a red circle above a blue square'"
        )
    first = Thing(match["shape1"], match["color1"], match["size1"])
    if not match["link"]:
        return Specification("colors" if first.color else "single_object", (first,))
    second = Thing(match["shape2"], match["color2"], match["size2"])
    if match["link"] != "and":
        relation = next(name for name, phrase in RELATIONS.items() if phrase == match["link"])
        return Specification("position", (first, second), relation)
    return Specification("color_attribution" if first.color or second.color else "two_object", (first, second))


@cache
def words() -> tuple[str, ...]:
    """Return every word of the grammar, sorted: the vocabulary of the bundled model's tokenizer."""
    text = [*SHAPES, *PLURALS.values(), *COLORS, *SIZES, *NUMBERS, *RELATIONS.values(), *OPENERS, "a an and"]
    return tuple(sorted({word for phrase in text for word in phrase.split()}))


@cache
def _contents(task: str) -> tuple[Specification, ...]:
    """Return every specification of a task, including those with held-out pairs."""
    every = [(c, s) for c in COLORS for s in SHAPES]
    sizes = (None, *SIZES)
    different = [(a, b) for a in SHAPES for b in SHAPES if a != b]
    attributed = [(Thing(s1, c1), Thing(s2, c2)) for c1, s1 in every for c2, s2 in every if (c1, s1) != (c2, s2)]
    return {
        "single_object": lambda: tuple(Specification(task, (Thing(s, None, z),)) for s in SHAPES for z in sizes),
        "two_object": lambda: tuple(Specification(task, (Thing(a), Thing(b))) for a, b in different),
        "counting": lambda: tuple(Specification(task, (Thing(s),) * n) for s in SHAPES for n in NUMBERS.values()),
        "colors": lambda: tuple(Specification(task, (Thing(s, c, z),)) for c, s in every for z in sizes),
        "position": lambda: tuple(
            Specification(task, things, relation)
            for relation in RELATIONS
            for things in [*((Thing(a), Thing(b)) for a, b in different), *attributed]
        ),
        "color_attribution": lambda: tuple(Specification(task, things) for things in attributed),
    }[task]()


def _split(specification: Specification, caption: str) -> str:
    if any((thing.color, thing.shape) in HELD_OUT_PAIRS for thing in specification.things):
        return "composition"
    # Tasks with many contents hold out contents. Others have so few that each must be trained: they hold out wordings.
    split_by_wording = specification.task in ("single_object", "two_object", "counting")
    key = caption if split_by_wording else describe(specification)
    bucket = int.from_bytes(hashlib.sha256(f"shapes {key}".encode()).digest()[:4], "big") % 100
    return "test" if bucket < 12 else "val" if bucket < 22 else "train"


@cache
def _captions(split: str, task: str) -> tuple[tuple[str, Specification], ...]:
    return tuple(
        (describe(spec, opener), spec)
        for spec in _contents(task)
        for opener in OPENERS
        if _split(spec, describe(spec, opener)) == split
    )


def captions(split: str, task: str | None = None) -> list[str]:
    """Return every caption of a split, for one task or all; a caption belongs to one split only."""
    return [caption for name in ([task] if task else TASKS) for caption, _ in _captions(split, name)]


# ---- scenes ---------------------------------------------------------------------------------------------------------


def _ground(rng: np.random.Generator) -> Ground:
    kind = str(rng.choice(["plain", "gradient", "stripes", "checks", "dots"], p=[0.4, 0.36, 0.08, 0.08, 0.08]))
    level = rng.uniform(95, 235)
    step = rng.uniform(25, 55) * (1 if level < 165 else -1)
    tint = np.array([rng.uniform(0, 9), rng.uniform(0, 4), rng.uniform(-9, 0)])
    first, second = (tuple(np.clip(g + tint, 0, 255).tolist()) for g in (level, level + step))
    angle = float(rng.uniform(0, 2 * np.pi)) if kind != "checks" else 0.0
    return Ground(kind, first, second, angle, float(rng.uniform(14, 24)), float(rng.uniform(0, 2 * np.pi)))


def _radius(rng: np.random.Generator, thing: Thing, count: int) -> float:
    if thing.size:
        return float(rng.uniform(*SIZES[thing.size]))
    if count == 1:
        return float(rng.uniform(*SIZES[str(rng.choice(list(SIZES)))]))
    return float(rng.uniform(7.2, {2: 10.5, 3: 9.8, 4: 8.8}[count]))


def _holds(relation: str, dx: float, dy: float) -> bool:
    """Return True if the offset (dx, dy) of the first object from the second clearly satisfies `relation`.

    Clearly: it is more than twice as far along the relation's axis as across it.
    """
    along, across = {"left": (-dx, dy), "right": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[relation]
    return along > 2 * abs(across)


def _place(rng: np.random.Generator, radii: list[float], relation: str | None) -> list[tuple[float, float]]:
    """Sample centers that keep objects apart and inside, by rejection. Shrinks `radii` in place if too large."""
    while True:
        for _ in range(60):
            spots = []
            for r in radii:
                reach = REACH * r + BORDER
                spots.append(tuple(float(v) for v in rng.uniform(reach, BASE - reach, 2)))
            apart = all(
                np.hypot(x1 - x2, y1 - y2) >= REACH * (radii[i] + radii[j]) + GAP
                for i, (x1, y1) in enumerate(spots)
                for j, (x2, y2) in enumerate(spots[:i])
            )
            if apart and (relation is None or _holds(relation, spots[0][0] - spots[1][0], spots[0][1] - spots[1][1])):
                return spots
        radii[:] = [max(7.0, 0.92 * r) for r in radii]  # too crowded: smaller objects


def compose(caption: str, specification: Specification, rng: np.random.Generator, style: str = "fill") -> Scene:
    """Sample a scene that satisfies `specification`. Colors that it leaves open never make a held-out pair.

    style: one of STYLES; the same draws of `rng` give the same scene in each.
    """
    things = []
    for thing in specification.things:
        free = [c for c in COLORS if (c, thing.shape) not in HELD_OUT_PAIRS]
        things.append(replace(thing, color=thing.color or str(rng.choice(free))))
    radii = [_radius(rng, thing, len(things)) for thing in things]
    objects = []
    for thing, r, (x, y) in zip(things, radii, _place(rng, radii, specification.relation), strict=True):
        rgb = tuple(np.clip(np.array(STYLES[style][thing.color]) + rng.integers(-8, 9, 3), 0, 255).tolist())
        objects.append(Object(thing.shape, thing.color, x, y, r, rgb))
    return Scene(caption, specification, tuple(objects), _ground(rng), style)


# ---- rendering ------------------------------------------------------------------------------------------------------


def outline(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Return the signed distance from the outline (or a bound, exact at straight edges), negative inside.

    x, y: from the center, y downwards. r: the radius.
    """
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.86 * r
    if shape == "triangle":
        r = 1.2 * r
        return np.maximum(y - 0.5 * r, 0.866 * np.abs(x) - 0.5 * y - 0.5 * r)
    x, y = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(x - 1.05 * r, y - 0.36 * r), np.maximum(y - 1.05 * r, x - 0.36 * r))


def render(scene: Scene, size: int = BASE) -> np.ndarray:
    """Return uint8[size, size, 3]; edges are anti-aliased by the covered fraction of each pixel."""
    scale = BASE / size
    axis = (np.arange(size, dtype=np.float32) + 0.5) * np.float32(scale)
    x, y = axis[None, :], axis[:, None]
    g = scene.ground
    along = (x - BASE / 2) * np.float32(np.cos(g.angle)) + (y - BASE / 2) * np.float32(np.sin(g.angle))
    turn = np.float32(2 * np.pi / g.period)
    if g.kind == "plain":
        mix = np.zeros((size, size), np.float32)
    elif g.kind == "gradient":
        mix = np.clip(along / BASE + 0.5, 0, 1)
    elif g.kind == "stripes":
        mix = 0.5 + 0.5 * np.sin(turn * along + g.phase)
    elif g.kind == "checks":
        mix = np.clip(0.5 + 2 * np.sin(turn * x / 2 + g.phase) * np.sin(turn * y / 2 + g.phase), 0, 1)
    else:
        mix = np.clip(2 * np.sin(turn * x + g.phase) * np.sin(turn * y + g.phase) - 0.6, 0, 1)
    first, second = np.array(g.first, np.float32), np.array(g.second, np.float32)
    image = first + (0.75 * mix)[..., None].astype(np.float32) * (second - first)
    for thing in scene.objects:
        distance = outline(thing.shape, x - thing.x, y - thing.y, thing.radius)
        if scene.style == "outline":
            inradius = -float(outline(thing.shape, np.zeros(()), np.zeros(()), thing.radius))
            distance = np.maximum(distance, -distance - min(STROKE, inradius - HOLE))
        cover = np.clip(0.5 - distance / scale, 0, 1)[..., None]
        image += cover.astype(np.float32) * (np.array(thing.rgb, np.float32) - image)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


class Shapes:
    """Random access to {"image": uint8[size, size, 3], "caption": str}.

    Record i depends on (seed, split, i) and the style alone.
    """

    def __init__(
        self,
        split: str,
        length: int,
        size: int = BASE,
        seed: int = 0,
        tasks: Sequence[str] = TASKS,
        relations: Sequence[str] = tuple(RELATIONS),
        style: str = "fill",
    ):
        """Raise ValueError for settings without scenes.

        tasks: of the scenes, in turn; a task that is listed twice is twice as frequent. relations: of the scenes of the
        task position. style: one of STYLES, in which the same scenes are drawn.
        """
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is not supported; use one of {', '.join(SPLITS)}")
        if unknown := [task for task in tasks if task not in TASKS]:
            raise ValueError(f"data.tasks {unknown[0]!r} is not supported; use some of {', '.join(TASKS)}")
        if not relations or (unknown := [relation for relation in relations if relation not in RELATIONS]):
            raise ValueError(f"data.relations {list(relations)} is not supported; use some of {', '.join(RELATIONS)}")
        if style not in STYLES:
            raise ValueError(f"data.style {style!r} is not supported; use one of {', '.join(STYLES)}")
        self.split, self.length, self.size, self.seed, self.style = split, length, size, seed, style
        self._relations = tuple(relations)
        self._tasks = [task for task in tasks if _captions(split, task)]
        if not self._tasks:
            raise ValueError(f"data.tasks {list(tasks)} have no captions in split {split!r}; use other tasks")

    def __len__(self) -> int:
        return self.length

    def scene(self, i: int) -> Scene:
        """Return the i-th scene: the next task in turn, one of its captions, and samples of all it leaves open."""
        if not 0 <= i < self.length:
            raise IndexError(f"record {i} of {self.length}")
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), i])
        task = self._tasks[i % len(self._tasks)]
        options = _captions(self.split, task)
        if task == "position" and self.split != "composition":
            colored = bool(rng.integers(2))  # captions with colors far outnumber the others
            options = [
                option
                for option in options
                if bool(option[1].things[0].color) == colored and option[1].relation in self._relations
            ]
        caption, specification = options[rng.integers(len(options))]
        return compose(caption, specification, rng, self.style)

    def __getitem__(self, i: int) -> dict:
        scene = self.scene(i)
        return {"image": render(scene, self.size), "caption": scene.caption}


# ---- the source -----------------------------------------------------------------------------------------------------


def evaluation_prompts(split: str, count: int) -> list[str]:
    """Return the same `count` captions of a split each time: spread evenly over its tasks, in the order of TASKS."""
    tasks = [listed for listed in (captions(split, task) for task in TASKS) if listed]
    chosen = []
    for number, listed in enumerate(tasks):
        order = np.random.default_rng(0).permutation(len(listed))
        share = count // len(tasks) + (number < count % len(tasks))
        chosen += [listed[order[i % len(listed)]] for i in range(share)]
    return chosen


@dataclass(frozen=True)
class ShapesSource:
    """The source `shapes`: `length` training images of size x size pixels, and `held_out` of other captions.

    tasks, relations: of the training images; style: of all images; see `Shapes`.
    """

    length: int
    size: int
    held_out: int
    tasks: Sequence[str] = TASKS
    relations: Sequence[str] = tuple(RELATIONS)
    style: str = "fill"

    def check(self, batch_size: int) -> None:
        self._train()
        check_length(self.length, batch_size)

    def open(self, seed: int, folder: Path, log: Callable[[str], None]) -> CaptionedDataset:
        return CaptionedDataset(
            train=self._train(),
            held_out=Shapes("test", self.held_out, self.size, style=self.style),
            prompts=lambda n: evaluation_prompts("test", n),
            compositional_prompts=lambda n: evaluation_prompts("composition", n),
            manifest={
                "source": "shapes",
                "size": str(self.size),
                "length": str(self.length),
                "style": self.style,
                "tasks": " ".join(self.tasks),
                "relations": " ".join(self.relations),
            },
        )

    def _train(self) -> Shapes:
        return Shapes("train", self.length, self.size, 0, self.tasks, self.relations, self.style)
