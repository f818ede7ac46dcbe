"""Verifier of `shapes`: decides from the pixels alone if an image satisfies its caption.

The grounds of `shapes` are nearly gray and its objects are not, so the chroma of a pixel, relative to that of the
object, is the share of the pixel that the object covers. Connected components are counted, and each is named by its
color and by the outline that, with the component's center and area, overlaps its coverage most. A component that
resembles no color or no outline has no name and satisfies no caption. An object through whose middle the ground is
visible is an outline: its shape is that of what it encloses, and its color may be of either style's palette. The six
tasks and the strictness (exactly the objects named, no more) follow GenEval (arXiv 2310.11513).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import ClassVar, Self, cast

import numpy as np
from scipy import ndimage

from lcm_jax.data import shapes
from lcm_jax.evaluation.evaluate import Column, Images, Resources

MIN_CHROMA = 50  # of 255, between the chroma of grounds (below 25) and of colors (above 100)
MIN_AREA = 12  # pixels of an image of 64 x 64; smaller components are specks
MAX_RADIUS = 16.0  # pixels; a larger component is not an object of the set
SIZE_LIMIT = 10.0  # radius in pixels between small (up to 8.5) and large (from 11.5)
MIN_OVERLAP = 0.78  # intersection over union with the best outline; softly decoded crosses reach 0.79
RAMPS = (1.0, 3.0)  # pixels from full to no coverage across an edge: sharp, or as soft as decoders leave it
MIDDLE = 0.6  # of the largest distance from the border of an object; what is farther from it is the object's middle
MIN_FILLED = 0.85  # mean coverage of the middle of a fill; less than 2% of fills in images of one step have less
COLOR_RADIUS = 60.0  # RGB distance to a named color; two with other names are at least 77 apart
MIN_PURITY = 0.85  # of the pixels inside an object, the share whose nearest named color is the object's


@dataclass(frozen=True)
class Detection:
    """One detected object; shape or color is None if it resembles none.

    x, y: center; radius: as `shapes` defines it; all in pixels of an image of 64 x 64. overlap: intersection over union
    with the best outline, in [0, 1].
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
        return f"{self.size} {self.color or 'unnamed-color'} {self.shape or 'figure'}"


@dataclass(frozen=True)
class Verdict:
    """The verifier's decision on one image, and what it saw."""

    ok: bool
    reason: str


def detect(image: np.ndarray) -> list[Detection]:
    """image: uint8[H, H, 3]. Return its objects, from left to right. Raises ValueError for another shape or dtype."""
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.shape[0] != image.shape[1]:
        raise ValueError(f"image is {image.dtype}{list(image.shape)}; use square uint8[H, H, 3]")
    scale = shapes.BASE / image.shape[0]
    pixels = image.astype(np.float32)
    chroma = pixels.max(2) - pixels.min(2)
    labels, _ = cast(tuple[np.ndarray, int], ndimage.label(chroma > MIN_CHROMA))
    detections = []
    for part, window in enumerate(ndimage.find_objects(labels), 1):
        # Half of the soft border lies below the threshold, so the window and the mask include it.
        rows, columns = (slice(max(s.start - 2, 0), s.stop + 2) for s in window)
        core = labels[rows, columns] == part
        if core.sum() * scale**2 < MIN_AREA:
            continue
        strength = chroma[rows, columns]
        near = ndimage.binary_dilation(core, iterations=2) & ((labels[rows, columns] == 0) | core)
        full = np.percentile(strength[core], 75)
        background = np.median(strength[near & ~core]) if (near & ~core).any() else 0.0
        background = min(float(background), 0.25 * full)
        cover = np.where(near, np.clip((strength - background) / (full - background), 0, 1), 0)
        silhouette, palettes = cover, [shapes.COLORS]
        if _is_outline(core, cover):
            inside = ndimage.binary_erosion(ndimage.binary_fill_holes(core), np.ones((3, 3)))
            silhouette, palettes = np.where(inside, 1, cover), list(shapes.STYLES.values())
        color = _color(pixels[rows, columns][cover > 0.8], palettes)
        detections.append(_name(silhouette, color, columns.start, rows.start, scale))
    return sorted(detections, key=lambda d: d.x)


def _is_outline(core: np.ndarray, cover: np.ndarray) -> bool:
    """Return True if the ground is visible in the middle of an object.

    core: bool[h, w], its component; cover: float[h, w] in [0, 1], the share of each pixel that the object covers.
    """
    depth = np.asarray(ndimage.distance_transform_edt(ndimage.binary_fill_holes(core)))
    return bool(cover[depth >= MIDDLE * depth.max()].mean() < MIN_FILLED)


def _name(cover: np.ndarray, color: str | None, left: int, top: int, scale: float) -> Detection:
    """Name the object in a window of an image.

    cover: float[h, w] in [0, 1], the share of each pixel that the object covers, or encloses if it is an outline; left,
    top: of the window, in pixels; scale: pixels of an image of 64 per pixel of this one.
    """
    x = (left + 0.5 + np.arange(cover.shape[1])) * scale
    y = (top + 0.5 + np.arange(cover.shape[0])) * scale
    area = cover.sum()
    cx, cy = float(cover.sum(0) @ x / area), float(cover.sum(1) @ y / area)  # the centroid of every outline is 0
    best = (-1.0, 0.0, "")  # overlap, radius, shape
    for shape in shapes.SHAPES:
        radius = float(np.sqrt(area * scale**2 / _unit_area(shape)))
        distance = shapes.outline(shape, x[None, :] - cx, y[:, None] - cy, radius) / scale
        for ramp in RAMPS:
            inside = np.clip(0.5 - distance / ramp, 0, 1)
            common = np.minimum(inside, cover).sum()
            overlap = float(common / (inside.sum() + area - common))
            if overlap > best[0]:
                best = overlap, radius, shape
    overlap, radius, shape = best
    fits = overlap >= MIN_OVERLAP and radius <= MAX_RADIUS
    return Detection(shape if fits else None, color, cx, cy, radius, overlap)


def _color(inside: np.ndarray, palettes: Sequence[Mapping[str, tuple[int, int, int]]]) -> str | None:
    """Name the median of an object's pixels, by the palette that has the nearest color.

    inside: float[n, 3]. Returns None if that color is too far or too few pixels agree.
    """
    if not len(inside):
        return None
    median = np.median(inside, 0)
    tables = [np.array(list(palette.values()), np.float32) for palette in palettes]
    distances = [np.linalg.norm(median - table, axis=1) for table in tables]
    chosen = int(np.argmin([each.min() for each in distances]))
    nearest = int(distances[chosen].argmin())
    purity = (((inside[:, None] - tables[chosen]) ** 2).sum(-1).argmin(1) == nearest).mean()
    near = distances[chosen][nearest] <= COLOR_RADIUS and purity >= MIN_PURITY
    return list(palettes[chosen])[nearest] if near else None


@cache
def _unit_area(shape: str) -> float:
    """The area of an outline of radius 1."""
    axis = (np.arange(400) + 0.5 - 200) / 100.0
    return float((shapes.outline(shape, axis[None, :], axis[:, None], 1.0) < 0).sum()) / 100.0**2


def verify(image: np.ndarray, caption: str) -> Verdict:
    """Decide if an image satisfies its caption.

    image: uint8[H, H, 3]; caption: of the grammar of `shapes`. Raises ValueError for another caption, shape or dtype.
    """
    specification = shapes.parse(caption)
    detections = detect(image)
    seen = ", ".join(map(str, detections)) or "nothing"
    if len(detections) != len(specification.things):
        return Verdict(False, f"{len(specification.things)} objects expected, {len(detections)} seen: {seen}")

    def matches(thing: shapes.Thing, d: Detection) -> bool:
        return d.color is not None and all(
            expected in (None, detected)
            for expected, detected in ((thing.shape, d.shape), (thing.color, d.color), (thing.size, d.size))
        )

    matching = [
        order
        for order in permutations(detections)
        if all(matches(thing, d) for thing, d in zip(specification.things, order, strict=True))
    ]
    if not matching:
        return Verdict(False, f"seen: {seen}")
    relation = specification.relation
    if relation is None:
        return Verdict(True, seen)
    for first, second in matching:
        dx, dy = first.x - second.x, first.y - second.y
        along, across = {"left": (-dx, dy), "right": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[relation]
        if along > abs(across):
            return Verdict(True, seen)
    return Verdict(False, f"not {shapes.RELATIONS[relation]}: {seen}")


def judge(images: Images, captions: Sequence[str]) -> dict[str, np.ndarray]:
    """images: uint8[H, H, 3] each. Return {"task": int64[N], in the order of `shapes.TASKS`, "ok": bool[N]}.

    Raises ValueError as `verify` does.
    """
    tasks = [shapes.TASKS.index(shapes.parse(caption).task) for caption in captions]
    accepted = [verify(image, caption).ok for image, caption in zip(images, captions, strict=True)]
    return {"task": np.array(tasks, np.int64), "ok": np.array(accepted, bool)}


def to_score(judged: Mapping[str, np.ndarray]) -> dict:
    """Return {"overall": mean over tasks, "tasks": {task: share of accepted images}} of what `judge` returns.

    Like GenEval's, the overall score is the mean over the tasks, so that it does not depend on the captions of each.
    """
    shares = {task: judged["ok"][judged["task"] == number] for number, task in enumerate(shapes.TASKS)}
    tasks = {task: float(np.mean(accepted)) for task, accepted in shares.items() if len(accepted)}
    return {"overall": float(np.mean(list(tasks.values()))), "tasks": tasks}


def score(images: np.ndarray | Sequence[np.ndarray], captions: Sequence[str]) -> dict:
    """images: uint8[N, H, H, 3]. Return the share of images that satisfy their captions, as `to_score` does."""
    return to_score(judge(images, captions))


@dataclass(frozen=True, eq=False)
class Verifier:
    """Metric: the share of images that satisfy their captions. Its rows are those of `judge`."""

    columns: ClassVar[Mapping[str, Column]] = {"verifier": Column("verifier", ".1%"), "tasks": Column("", ".0%")}
    lower_is_better: ClassVar[bool] = False
    sources: ClassVar[tuple[str, ...] | None] = ("shapes",)
    packages: ClassVar[Mapping[str, str]] = {}
    resamplings: ClassVar[int] = 200
    reads_prompts: ClassVar[bool] = True

    @classmethod
    def create(cls, resources: Resources) -> Self:
        return cls()

    def measure(self, images: Images, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        return judge(images, prompts)

    @property
    def note(self) -> str:
        return "The verifier's score is the share of images that satisfy their captions, as a mean over the tasks."

    def result(self, rows: Mapping[str, np.ndarray]) -> dict:
        score = to_score(rows)
        tasks = {task: round(share, 4) for task, share in score["tasks"].items()}
        return {"verifier": round(score["overall"], 4), "tasks": tasks}

    def scores(self, rows: Mapping[str, np.ndarray]) -> np.ndarray:
        return rows["ok"].astype(float)
