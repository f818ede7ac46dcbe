"""Whether a picture of the embedded set satisfies its caption, from its pixels alone.

The grounds of `shapes` are nearly grey and its objects are not: thresholding the chroma gives the objects, their
connected components are counted, and each is named by its hue and by the outline that fits its mask best. The six tasks
and the strictness (exactly the objects named, no more) follow GenEval (arXiv 2310.11513).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage

from lcm_jax.data import shapes

CHROMA = 62  # of 255, between the ground's (below 25) and the colours' (above 100)
LEAST_AREA = 22  # pixels of a picture of 64; smaller specks are no objects
LARGEST = 16.0  # radius in pixels; a larger patch of colour (a flat or noisy picture) is no object of the set
SIZE_LIMIT = 10.0  # radius in pixels between small (up to 8.5) and large (from 11.5)


@dataclass(frozen=True)
class Detection:
    """One object as seen. x, y: centre; radius: in pixels, as `shapes` counts it. Both in units of a picture of 64."""

    shape: str
    color: str
    x: float
    y: float
    radius: float

    @property
    def size(self) -> str:
        return "large" if self.radius > SIZE_LIMIT else "small"


@dataclass(frozen=True)
class Verdict:
    ok: bool
    reason: str


def detect(image: np.ndarray) -> list[Detection]:
    """image: uint8[H, W, 3], square. Every object in it, from left to right."""
    scale = shapes.BASE / image.shape[0]
    pixels = image.astype(np.float32)
    chroma = pixels.max(2) - pixels.min(2)
    labels, count = ndimage.label(chroma > CHROMA)
    found = []
    for part, where in enumerate(ndimage.find_objects(labels), 1):
        mask = labels[where] == part
        if mask.sum() * scale**2 < LEAST_AREA:
            continue
        # Colour: of the most saturated half, which leaves the blurred border out.
        inside, strength = pixels[where][mask], chroma[where][mask]
        rgb = inside[strength >= np.median(strength)].mean(0)
        color = min(shapes.COLORS, key=lambda name: _hue_distance(rgb, shapes.COLORS[name]))
        ys, xs = np.nonzero(mask)
        shape = _fit(mask)
        radius = float(np.sqrt(mask.sum() / _unit_area(shape))) * scale
        x, y = (where[1].start + xs.mean() + 0.5) * scale, (where[0].start + ys.mean() + 0.5) * scale
        found.append(Detection(shape if radius <= LARGEST else "patch", color, x, y, radius))
    return sorted(found, key=lambda d: d.x)


def _hue(rgb) -> float:
    r, g, b = (float(v) for v in rgb)
    return float(np.arctan2(np.sqrt(3.0) * (g - b), 2 * r - g - b))


def _hue_distance(a, b) -> float:
    return abs((_hue(a) - _hue(b) + np.pi) % (2 * np.pi) - np.pi)


GRID = 24


@cache
def _templates() -> dict[str, np.ndarray]:
    """Each outline's coverage of its own bounding box, float32[GRID, GRID], centred."""
    axis = (np.arange(400) + 0.5 - 200) / 100.0
    templates = {}
    for shape in shapes.SHAPES:
        inside = shapes.outline(shape, axis[None, :], axis[:, None], 1.0) < 0
        ys, xs = np.nonzero(inside)
        templates[shape] = _to_grid(inside[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1])
    return templates


@cache
def _unit_area(shape: str) -> float:
    axis = (np.arange(400) + 0.5 - 200) / 100.0
    return float((shapes.outline(shape, axis[None, :], axis[:, None], 1.0) < 0).sum()) / 100.0**2


def _to_grid(mask: np.ndarray) -> np.ndarray:
    """A mask resampled (bilinearly) to GRID x GRID."""
    height, width = mask.shape
    ys = (np.arange(GRID) + 0.5) * height / GRID - 0.5
    xs = (np.arange(GRID) + 0.5) * width / GRID - 0.5
    grid = np.meshgrid(ys, xs, indexing="ij")
    return ndimage.map_coordinates(mask.astype(np.float32), grid, order=1, mode="nearest")


def _fit(mask: np.ndarray) -> str:
    """The shape whose outline, stretched to the mask's bounding box, differs from it least."""
    seen = _to_grid(mask)
    return min(shapes.SHAPES, key=lambda shape: float(np.abs(seen - _templates()[shape]).mean()))


def verify(image: np.ndarray, caption: str) -> Verdict:
    """image: uint8[H, W, 3]; caption: of the grammar of `shapes` (ValueError otherwise)."""
    wanted = shapes.parse(caption)
    found = detect(image)
    seen = ", ".join(f"{d.size} {d.color} {d.shape}" for d in found) or "nothing"
    if len(found) != len(wanted.things):
        return Verdict(False, f"{len(wanted.things)} objects expected, {len(found)} seen: {seen}")

    def matches(thing: shapes.Thing, d: Detection) -> bool:
        return (
            d.shape == thing.shape
            and thing.color in (None, d.color)
            and thing.size in (None, d.size)
        )

    if len(found) == 2 and wanted.task != "counting":
        orders = [(found[0], found[1]), (found[1], found[0])]
    else:
        orders = [tuple(found)]
    fitting = [o for o in orders if all(matches(t, d) for t, d in zip(wanted.things, o, strict=True))]
    if not fitting:
        return Verdict(False, f"seen: {seen}")
    if wanted.relation is None:
        return Verdict(True, seen)
    for first, second in fitting:
        dx, dy = first.x - second.x, first.y - second.y
        along, across = {"left": (-dx, dy), "right": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[wanted.relation]
        if along > abs(across):
            return Verdict(True, seen)
    return Verdict(False, f"not {shapes.RELATIONS[wanted.relation]}: {seen}")


def score(images: Sequence[np.ndarray], captions: Sequence[str]) -> dict:
    """The share of pictures that satisfy their captions: {"overall": mean over tasks, "tasks": {task: share}}.

    Like GenEval's, the overall score is the mean of the tasks' scores, so that it does not depend on how many captions
    each has.
    """
    by_task: dict[str, list[bool]] = {}
    for image, caption in zip(images, captions, strict=True):
        by_task.setdefault(shapes.parse(caption).task, []).append(verify(np.asarray(image), caption).ok)
    tasks = {task: float(np.mean(by_task[task])) for task in shapes.TASKS if task in by_task}
    return {"overall": float(np.mean(list(tasks.values()))), "tasks": tasks}
