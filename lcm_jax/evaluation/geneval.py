"""GenEval (arXiv 2310.11513): images judged against the objects, counts, colors and positions that their prompts name.

The rules are those of the published evaluation (`evaluate_images.py` and `summary_scores.py` of djghosh13/geneval) with
its default options; they follow the order of that evaluation. Boxes are float32[4]: left, top, right, bottom in pixels.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from PIL import Image

from lcm_jax.evaluation.clip_towers import open_encoders
from lcm_jax.evaluation.detector import MIN_SCORE, SOURCE, Detect, Objects, open_detector
from lcm_jax.evaluation.evaluate import Column, Images, Resources
from lcm_jax.evaluation.geneval_files import COLORS, TASKS, Prompt, Requirement, read_detections, read_metadata

COUNTING_SCORE = 0.9  # in place of MIN_SCORE for the task "counting"
MAX_OF_A_CLASS = 16  # objects, the most confident ones
MAX_OVERLAP = 1.0  # of two objects of a class; of those with more, the published default keeps all
MARGIN = 0.1  # of the sum of both sizes, by which an offset is shortened
MIN_COSINE = 0.5  # of a direction, between the shortened offset and the offset
NEAR = 1e-3  # pixels; a shorter offset has no direction
GRAY = "#999"  # outside of an object's mask
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
CLIP = "ViT-L/14"
NOTE = (
    "GenEval is the mean over its six tasks of the share of images that show the objects, counts, colors and positions "
    "that their prompts name; objects are detected by {}."
)
ERRORS = ("missing", "wrong_color", "wrong_position", "too_many")

Classify = Callable[[str, Sequence[int]], Sequence[str]]  # (class, numbers of objects) -> a color for each
Embed = Callable[[list[Any]], np.ndarray]  # of images uint8[h, w, 3] or of texts -> float[N, D]


class Verdict(NamedTuple):
    """The judgment of one image: the kinds of its errors (of ERRORS), in the order found, and a line for each."""

    correct: bool
    errors: tuple[str, ...]
    reasons: tuple[str, ...]


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Return the intersection of two boxes over their union; a box covers its last row and column, which adds 1."""

    def area(left, top, right, bottom) -> float:
        return max(right - left + 1, 0) * max(bottom - top + 1, 0)

    common = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - common
    return float(common / union) if union else 0.0


def select_objects(
    boxes: np.ndarray, scores: np.ndarray, min_score: float, max_overlap: float = MAX_OVERLAP
) -> list[int]:
    """Return the numbers of the objects of one class that count, most confident first.

    boxes: float[N, 4]; scores: float[N]. At most MAX_OF_A_CLASS with a score above `min_score` are kept, and of these
    none whose overlap with a more confident one is `max_overlap` or more, unless that is 1.
    """
    order = np.argsort(scores, kind="stable")[::-1]
    left = [int(i) for i in order if scores[i] > min_score][:MAX_OF_A_CLASS]
    kept: list[int] = []
    while left:
        first, *others = left
        kept.append(first)
        left = [i for i in others if max_overlap == 1 or overlap(boxes[first], boxes[i]) < max_overlap]
    return kept


def relations(a: np.ndarray, b: np.ndarray) -> set[str]:
    """Return the positions of box `a` relative to box `b`, of "left of", "right of", "above", "below".

    Per axis, the offset of the centers is shortened by MARGIN of the sum of both sizes, at most to 0. It counts where
    it exceeds MIN_COSINE of the length of the offset before it was shortened, so that there may be none.
    """
    a, b = (np.asarray(box, np.float32).reshape(2, 2) for box in (a, b))
    offset = a.mean(0) - b.mean(0)
    sizes = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    shortened = np.maximum(np.abs(offset) - MARGIN * sizes, 0) * np.sign(offset)
    if np.all(np.abs(shortened) < NEAR):
        return set()
    x, y = shortened / np.linalg.norm(offset)
    found = {"left of": -x, "right of": x, "above": -y, "below": y}
    return {relation for relation, share in found.items() if share > MIN_COSINE}


def crop_object(image: np.ndarray, box: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Return the box's part of an image uint8[H, W, 3], gray outside of the mask, bool[H, W], if there is one.

    Corners are rounded to whole pixels; what lies outside of the image is black.
    """
    pixels = Image.fromarray(image)
    if mask is not None:
        pixels = Image.composite(pixels, Image.new("RGB", pixels.size, GRAY), Image.fromarray(mask))
    left, top, right, bottom = (float(side) for side in box)
    return np.asarray(pixels.crop((left, top, right, bottom)))  # pyright: ignore[reportArgumentType]


def color_texts(name: str) -> list[str]:
    """Return the texts that name an object of each color, TEMPLATES of COLORS[0] first."""
    return [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]


class ColorClassifier:
    """Zero-shot classifier of colors by CLIP: crops -> the color whose texts are nearest by cosine.

    embed_images, embed_texts: CLIP ViT-L/14 of OpenAI in the published evaluation, with its own preprocessing. The
    embeddings of a color's texts are normed and averaged.
    """

    def __init__(self, embed_images: Embed, embed_texts: Embed):
        self._embed_images, self._embed_texts = embed_images, embed_texts
        self._classes: dict[str, np.ndarray] = {}

    def __call__(self, crops: list[np.ndarray], name: str) -> list[str]:
        """crops: uint8[h, w, 3] each, of objects of the class `name`."""
        if name not in self._classes:
            texts = _normed(self._embed_texts(color_texts(name)))
            self._classes[name] = _normed(texts.reshape(len(COLORS), len(TEMPLATES), -1).mean(1))
        nearest = (_normed(self._embed_images(crops)) @ self._classes[name].T).argmax(1)
        return [COLORS[i] for i in nearest]


def _normed(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def judge(prompt: Prompt, objects: Objects, classify: Classify, max_overlap: float = MAX_OVERLAP) -> Verdict:
    """Judge the detected objects of an image.

    Of each class only the `count` most confident objects are judged for color and position, and every pair of them must
    have the position. Objects beyond those are an error only if the prompt excludes their number.
    """
    min_score = COUNTING_SCORE if prompt.tag == "counting" else MIN_SCORE
    chosen: dict[str, list[int]] = {}
    for name in dict.fromkeys(objects.names):
        own = [i for i, each in enumerate(objects.names) if each == name]
        kept = select_objects(objects.boxes[own], objects.scores[own], min_score, max_overlap)
        chosen[name] = [own[i] for i in kept]
    errors: list[str] = []
    reasons: list[str] = []
    groups: list[list[int] | None] = []  # the objects of each requirement; None if it is not met

    def fail(error: str, reason: str) -> None:
        errors.append(error)
        reasons.append(reason)

    for required in prompt.include:
        before = len(errors)
        found = chosen.get(required.name, [])[: required.count]
        if len(found) < required.count:
            fail("missing", f"{required.count} {required.name} expected, {len(found)} found")
        else:
            if required.color is not None:
                _judge_color(required, classify(required.name, found), fail)
            if required.position is not None and len(errors) == before:
                _judge_position(required, objects.boxes, found, groups, fail)
        groups.append(found if len(errors) == before else None)
    for excluded in prompt.exclude:
        count = len(chosen.get(excluded.name, []))
        if count >= excluded.count:
            fail("too_many", f"fewer than {excluded.count} {excluded.name} expected, {count} found")
    return Verdict(not errors, tuple(errors), tuple(reasons))


def _judge_color(required: Requirement, colors: Sequence[str], fail: Callable[[str, str], None]) -> None:
    if list(colors).count(str(required.color)) < required.count:
        fail("wrong_color", f"{required.count} {required.color} {required.name} expected, found {', '.join(colors)}")


def _judge_position(
    required: Requirement,
    boxes: np.ndarray,
    found: Sequence[int],
    groups: Sequence[Sequence[int] | None],
    fail: Callable[[str, str], None],
) -> None:
    assert required.position is not None
    relation, target = required.position
    group = groups[target]
    if group is None:
        return fail("wrong_position", f"nothing that {required.name} could be {relation}")
    for i in found:
        for j in group:
            if relation not in (others := relations(boxes[i], boxes[j])):
                placed = " and ".join(sorted(others)) or "neither left, right, above nor below"
                return fail("wrong_position", f"{required.name} {relation} its target expected, is {placed}")


def summarize(judged: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the figures of rows {"task", "prompt", "correct", "errors"}, see `GenEval.measure`.

    "overall" is the mean over the tasks of the share of correct images, whatever the number of images of each; "tasks":
    {task: share}; "prompts": the share of prompts with a correct image; "errors": {error: share of images}.
    """
    shares = {task: judged["correct"][judged["task"] == number] for number, task in enumerate(TASKS)}
    tasks = {task: float(np.mean(correct)) for task, correct in shares.items() if len(correct)}
    numbers, place = np.unique(judged["prompt"], return_inverse=True)
    solved = np.bincount(place, judged["correct"], len(numbers)) > 0
    errors = dict(zip(ERRORS, judged["errors"].mean(0).tolist(), strict=True))
    return {"overall": float(np.mean(list(tasks.values()))), "tasks": tasks, "prompts": solved.mean(), "errors": errors}


def open_classifier(resources: Resources) -> ColorClassifier:
    """Return the classifier of colors of the published evaluation. Raises ModelError if its weights are missing."""

    def make() -> ColorClassifier:
        encoders = open_encoders(resources, CLIP)
        return ColorClassifier(encoders.embed_images, encoders.embed_texts)

    return resources.once("geneval_colors", make)


@dataclass(frozen=True, eq=False)
class GenEval:
    """Metric: the share of images that show what their prompts name, as a mean over the six tasks.

    prompts: those that it can judge, by their texts. colors(crops uint8[h, w, 3], class) -> the color of each.
    """

    columns: ClassVar[Mapping[str, Column]] = {
        "geneval": Column("GenEval", ".3f"),
        "geneval_prompts": Column("GenEval prompts", ".1%"),
        "geneval_tasks": Column("", ".0%"),
        "geneval_errors": Column("", ".0%"),
    }
    lower_is_better: ClassVar[bool] = False
    sources: ClassVar[tuple[str, ...] | None] = ("geneval",)
    packages: ClassVar[Mapping[str, str]] = {}
    resamplings: ClassVar[int] = 200
    reads_prompts: ClassVar[bool] = True

    prompts: Mapping[str, tuple[int, Prompt]]
    detect: Detect
    colors: Callable[[list[np.ndarray], str], list[str]]
    max_overlap: float = MAX_OVERLAP
    note: str = NOTE.format(f"{SOURCE}; published figures are by mmdet's weights of this network")

    @classmethod
    def create(cls, resources: Resources) -> Self:
        """Read the prompts and open the detector and the color classifier.

        Options of `resources.settings`: metadata, the path of GenEval's evaluation_metadata.jsonl, is required;
        detections, a file of another detector's objects (see `read_detections`); max_overlap. Raises ValueError for
        options and files that are not supported, ModelError for weights.
        """
        settings = resources.settings
        if not settings.get("metadata"):
            raise ValueError("metrics 'geneval' requires GenEval's evaluation_metadata.jsonl; set settings.metadata")
        max_overlap = settings.get("max_overlap", MAX_OVERLAP)
        if not isinstance(max_overlap, int | float) or not 0 <= max_overlap <= 1:
            raise ValueError(f"settings.max_overlap {max_overlap!r} is not supported; use a number in [0, 1]")
        prompts = index_prompts(read_metadata(Path(settings["metadata"])))
        if not (file := settings.get("detections")):
            return cls(prompts, open_detector(resources.weights), open_classifier(resources), max_overlap)

        def colors(crops: list[np.ndarray], name: str) -> list[str]:
            # Opened when it is used: detections may have all colors themselves.
            return open_classifier(resources)(crops, name)

        return cls(prompts, read_detections(Path(file)), colors, max_overlap, NOTE.format(file))

    def measure(self, images: Images, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """images: uint8[H, W, 3] each. Return {"task": int8[B], number in TASKS, "prompt": int32[B], number in the
        metadata, "correct": bool[B], "errors": bool[B, 4], of ERRORS}.

        Raises ValueError for a prompt that is not in the metadata.
        """
        rows: dict[str, list] = {"task": [], "prompt": [], "correct": [], "errors": []}
        for image, text in zip(images, prompts, strict=True):
            if text not in self.prompts:
                raise ValueError(f"{text!r} is not a prompt of settings.metadata; use the file with these prompts")
            number, prompt = self.prompts[text]
            objects = self.detect(image)
            verdict = judge(prompt, objects, self._classify(image, objects), self.max_overlap)
            rows["task"].append(TASKS.index(prompt.tag))
            rows["prompt"].append(number)
            rows["correct"].append(verdict.correct)
            rows["errors"].append([error in verdict.errors for error in ERRORS])
        dtypes = {"task": np.int8, "prompt": np.int32, "correct": bool, "errors": bool}
        return {name: np.array(values, dtypes[name]) for name, values in rows.items()}

    def _classify(self, image: np.ndarray, objects: Objects) -> Classify:
        def classify(name: str, numbers: Sequence[int]) -> list[str]:
            known = [None if objects.colors is None else objects.colors[i] for i in numbers]
            missing = [i for i, color in zip(numbers, known, strict=True) if color is None]
            masks = [None if objects.masks is None else objects.masks[i] for i in missing]
            crops = [crop_object(image, objects.boxes[i], mask) for i, mask in zip(missing, masks, strict=True)]
            classified = iter(self.colors(crops, name) if crops else ())
            return [next(classified) if color is None else color for color in known]

        return classify

    def result(self, rows: Mapping[str, np.ndarray]) -> dict[str, Any]:
        figures = summarize(rows)
        shares = {
            f"geneval_{group}": {name: round(share, 4) for name, share in figures[group].items()}
            for group in ("tasks", "errors")
        }
        return {
            "geneval": round(figures["overall"], 5),
            "geneval_prompts": round(float(figures["prompts"]), 4),
        } | shares

    def scores(self, rows: Mapping[str, np.ndarray]) -> np.ndarray:
        return rows["correct"].astype(float)


def index_prompts(prompts: Iterable[Prompt]) -> dict[str, tuple[int, Prompt]]:
    """Return {text: (number, prompt)}. Raises ValueError for two prompts of one text with other requirements."""
    found: dict[str, tuple[int, Prompt]] = {}
    for number, prompt in enumerate(prompts):
        first, known = found.setdefault(prompt.text, (number, prompt))
        if known.metadata != prompt.metadata:
            raise ValueError(
                f"the prompt {prompt.text!r} is in lines {first + 1} and {number + 1} of the metadata with different "
                "requirements; remove one"
            )
    return found
