"""Whether a picture of the embedded set satisfies its caption, from its pixels alone.

The grounds of `shapes` are nearly grey and its objects are not: chroma, relative to an object's own, says how much of
each pixel the object covers. Connected components are counted, and each is named by its colour and by the outline that,
at the component's centre and of its area, overlaps its coverage most. What resembles no colour or no outline gets no
name and satisfies no caption. The six tasks and the strictness (exactly the objects named, no more) follow GenEval
(arXiv 2310.11513).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
from scipy import ndimage

from lcm_jax.data import shapes

CHROMA = 50  # of 255, between the ground's (below 25) and the colours' (above 100)
LEAST_AREA = 12  # pixels of a picture of 64; smaller specks are no objects
LARGEST = 16.0  # radius in pixels; a larger patch of colour is no object of the set
SIZE_LIMIT = 10.0  # radius in pixels between small (up to 8.5) and large (from 11.5)
LEAST_OVERLAP = 0.78  # intersection over union with the best outline; softly decoded crosses reach 0.79
RAMPS = (1.0, 3.0)  # pixels from full to no coverage across an edge: sharp, or as soft as decoders leave it
COLOR_RADIUS = 60.0  # RGB distance to a named colour; two of them are at least 90 apart
PURITY = 0.85  # the least share of an object's inside that is nearest to its colour


@dataclass(frozen=True)
class Detection:
    """One object as seen; shape or color is None where it resembles none.

    x, y: centre; radius: in pixels, as `shapes` counts it. Both in units of a picture of 64. overlap: 0..1, with the
    outline that fits best.
    """

    shape: str | None
    color: str | None
    x: float
    y: float
    radius: float
    overlap: float

    @property
    def size(self) -> str:
        return "large" if self.radius > SIZE_LIMIT else "small"

    def __str__(self) -> str:
        return f"{self.size} {self.color or 'oddly coloured'} {self.shape or 'figure'}"


@dataclass(frozen=True)
class Verdict:
    ok: bool
    reason: str


def detect(image: np.ndarray) -> list[Detection]:
    """image: uint8[H, H, 3]. Every object in it, from left to right. Raises ValueError for another shape or dtype."""
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.shape[0] != image.shape[1]:
        raise ValueError(f"image is {image.dtype}{list(image.shape)}; the verifier takes square uint8[H, H, 3]")
    scale = shapes.BASE / image.shape[0]
    pixels = image.astype(np.float32)
    chroma = pixels.max(2) - pixels.min(2)
    labels, _ = ndimage.label(chroma > CHROMA)
    found = []
    for part, where in enumerate(ndimage.find_objects(labels), 1):
        # The mask is grown by the soft border, half of which lies below the threshold.
        rows, columns = (slice(max(s.start - 2, 0), s.stop + 2) for s in where)
        core = labels[rows, columns] == part
        if core.sum() * scale**2 < LEAST_AREA:
            continue
        strength = chroma[rows, columns]
        near = ndimage.binary_dilation(core, iterations=2) & ((labels[rows, columns] == 0) | core)
        full = np.percentile(strength[core], 75)
        background = np.median(strength[near & ~core]) if (near & ~core).any() else 0.0
        background = min(float(background), 0.25 * full)
        cover = np.where(near, np.clip((strength - background) / (full - background), 0, 1), 0)
        found.append(_name(cover, pixels[rows, columns], columns.start, rows.start, scale))
    return sorted(found, key=lambda d: d.x)


def _name(cover: np.ndarray, pixels: np.ndarray, left: int, top: int, scale: float) -> Detection:
    """cover: [h, w] in 0..1, the part of each pixel that the object takes; left, top: of that window, in pixels."""
    x = (left + 0.5 + np.arange(cover.shape[1])) * scale
    y = (top + 0.5 + np.arange(cover.shape[0])) * scale
    area = cover.sum()
    cx, cy = float(cover.sum(0) @ x / area), float(cover.sum(1) @ y / area)  # every outline has its centroid at 0
    best = None
    for shape in shapes.SHAPES:
        radius = float(np.sqrt(area * scale**2 / _unit_area(shape)))
        distance = shapes.outline(shape, x[None, :] - cx, y[:, None] - cy, radius) / scale
        for ramp in RAMPS:
            inside = np.clip(0.5 - distance / ramp, 0, 1)
            common = np.minimum(inside, cover).sum()
            overlap = float(common / (inside.sum() + area - common))
            if best is None or overlap > best[0]:
                best = overlap, radius, shape
    overlap, radius, shape = best
    fits = overlap >= LEAST_OVERLAP and radius <= LARGEST
    return Detection(shape if fits else None, _color(pixels[cover > 0.8]), cx, cy, radius, overlap)


def _color(inside: np.ndarray) -> str | None:
    """inside: float[n, 3]. The named colour of the median, if it is near enough and most of the pixels agree."""
    names, table = list(shapes.COLORS), np.array(list(shapes.COLORS.values()), np.float32)
    if not len(inside):
        return None
    distances = np.linalg.norm(np.median(inside, 0) - table, axis=1)
    nearest = int(distances.argmin())
    agree = (((inside[:, None] - table) ** 2).sum(-1).argmin(1) == nearest).mean()
    return names[nearest] if distances[nearest] <= COLOR_RADIUS and agree >= PURITY else None


@cache
def _unit_area(shape: str) -> float:
    axis = (np.arange(400) + 0.5 - 200) / 100.0
    return float((shapes.outline(shape, axis[None, :], axis[:, None], 1.0) < 0).sum()) / 100.0**2


def verify(image: np.ndarray, caption: str) -> Verdict:
    """image: uint8[H, H, 3]; caption: of the grammar of `shapes` (ValueError otherwise)."""
    wanted = shapes.parse(caption)
    found = detect(image)
    seen = ", ".join(map(str, found)) or "nothing"
    if len(found) != len(wanted.things):
        return Verdict(False, f"{len(wanted.things)} objects expected, {len(found)} seen: {seen}")

    def matches(thing: shapes.Thing, d: Detection) -> bool:
        return d.color is not None and all(
            want in (None, have)
            for want, have in ((thing.shape, d.shape), (thing.color, d.color), (thing.size, d.size))
        )

    fitting = [
        order
        for order in permutations(found)
        if all(matches(thing, d) for thing, d in zip(wanted.things, order, strict=True))
    ]
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
