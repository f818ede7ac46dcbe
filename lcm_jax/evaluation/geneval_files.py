"""GenEval's files: the prompts with what they require, the folder of images by prompt, and another detector's objects.

The folder is the one that GenEval's own evaluation reads: `00000/metadata.jsonl` has the first line of the file of
prompts, and `00000/samples/0000.png` is the first image of that prompt.
"""

import hashlib
import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from lcm_jax.evaluation.detector import NAMES, Detect, Objects
from lcm_jax.files import TextError, check_unicode, decode, write_text

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
IMAGES_PER_PROMPT = 4
MAX_COUNT = 100  # of objects that a prompt can require
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 60


class Requirement(NamedTuple):
    """Objects that an image must show, or in `exclude`, must not: `count` of one class, or more.

    position: (relation, number of the earlier requirement that is its target).
    """

    name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


class Prompt(NamedTuple):
    """A prompt of the metadata. metadata: its JSON object, as it is in the file."""

    text: str
    tag: str
    include: tuple[Requirement, ...]
    exclude: tuple[Requirement, ...]
    metadata: Mapping[str, Any]


def read_metadata(path: Path) -> tuple[Prompt, ...]:
    """Read GenEval's evaluation_metadata.jsonl, or the metadata.jsonl of all prompts in a folder of its images.

    Raises ValueError that names the file, the line and the remedy.
    """
    files = sorted(path.glob("*/metadata.jsonl")) if path.is_dir() else [path]
    prompts = tuple(_read_prompt(fields, where) for file in files for fields, where in _objects(file))
    if not prompts:
        raise ValueError(f"{path} has no prompts; use GenEval's evaluation_metadata.jsonl")
    return prompts


def find_prompt(image: Path) -> str | None:
    """Return the prompt of an image in GenEval's folder, or None for an image elsewhere. Raises ValueError likewise."""
    file = image.parent.parent / "metadata.jsonl"
    return read_metadata(file)[0].text if image.parent.name == "samples" and file.is_file() else None


def _objects(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yield the JSON object of each line that is not empty, and where it is, for messages."""
    try:
        text = decode(path.read_bytes(), str(path))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); use an existing file") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is not valid JSON ({error}); use one object for each line") from None
            yield _check(fields, dict, where, "an object {...}"), where


def _check(value: Any, kind: type | tuple[type, ...], where: str, expected: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{where} is {SHORT.repr(value)}, which is not supported; use {expected}")
    return value


def _choose(value: Any, choices: Sequence[str], where: str, kind: str) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{where} is {SHORT.repr(value)}, which is not supported; use {kind}")
    return value


def _check_keys(fields: Mapping[str, Any], required: Sequence[str], optional: Sequence[str], where: str) -> None:
    missing = [key for key in required if key not in fields]
    unknown = sorted(fields.keys() - {*required, *optional})
    if missing or unknown:
        problem = f"has no {missing[0]!r}" if missing else f"has the unknown key {SHORT.repr(unknown[0])}"
        raise ValueError(f"{where} {problem}; its keys are {', '.join((*required, *optional))}")


def _read_prompt(fields: Mapping[str, Any], where: str) -> Prompt:
    _check_keys(fields, ("tag", "include", "prompt"), ("exclude",), where)
    text = _check(fields["prompt"], str, f"{where}: prompt", "a text")
    try:
        check_unicode(text, f"{where}: prompt")
    except TextError as error:
        raise ValueError(str(error)) from None
    tag = _choose(fields["tag"], TASKS, f"{where}: tag", f"one of {', '.join(TASKS)}")
    include = [
        _read_requirement(each, i, f"{where}: include[{i}]", ("color", "position"))
        for i, each in enumerate(_check(fields["include"], list, f"{where}: include", "a list"))
    ]
    exclude = [
        _read_requirement(each, i, f"{where}: exclude[{i}]", ())
        for i, each in enumerate(_check(fields.get("exclude", []), list, f"{where}: exclude", "a list"))
    ]
    return Prompt(text, tag, tuple(include), tuple(exclude), fields)


def _read_requirement(value: Any, number: int, where: str, optional: Sequence[str]) -> Requirement:
    _check(value, dict, where, "an object {...}")
    _check_keys(value, ("class", "count"), optional, where)
    name = _choose(value["class"], NAMES, f"{where}.class", "one of GenEval's 80 classes, such as 'tv remote'")
    count = _check(value["count"], int, f"{where}.count", f"an integer in 1..{MAX_COUNT}")
    if not 1 <= count <= MAX_COUNT:
        raise ValueError(
            f"{where}.count is {SHORT.repr(count)}, which is not supported; use an integer in 1..{MAX_COUNT}"
        )
    color = value.get("color")
    if color is not None:
        _choose(color, COLORS, f"{where}.color", f"one of {', '.join(COLORS)}")
    position = value.get("position")
    if position is None:
        return Requirement(name, count, color)
    expected = f'a relation ({", ".join(RELATIONS)}) and the number of an earlier object, as ["left of", 0]'
    fits = isinstance(position, list) and len(position) == 2 and position[0] in RELATIONS and type(position[1]) is int
    if not fits or not 0 <= position[1] < number:
        raise ValueError(f"{where}.position is {SHORT.repr(position)}, which is not supported; use {expected}")
    return Requirement(name, count, color, (position[0], position[1]))


# ---- the folder of images -------------------------------------------------------------------------------------------


def list_images(prompts: Sequence[Prompt], images_per_prompt: int = IMAGES_PER_PROMPT) -> list[tuple[str, int]]:
    """Return (prompt, number) of all images in order: the images of a prompt follow each other."""
    return [
        (prompt.text, i * images_per_prompt + j) for i, prompt in enumerate(prompts) for j in range(images_per_prompt)
    ]


def image_path(folder: Path, number: int, images_per_prompt: int = IMAGES_PER_PROMPT) -> Path:
    """Return the path of image `number` of `list_images`."""
    prompt, sample = divmod(number, images_per_prompt)
    return folder / f"{prompt:05d}" / "samples" / f"{sample:04d}.png"


def make_folders(folder: Path, prompts: Sequence[Prompt]) -> None:
    """Make the folder of each prompt with its metadata.jsonl, unless it is there.

    Raises ValueError if a folder has another prompt, as those of another metadata file.
    """
    for i, prompt in enumerate(prompts):
        own = folder / f"{i:05d}"
        (own / "samples").mkdir(parents=True, exist_ok=True)
        file = own / "metadata.jsonl"
        line = json.dumps(prompt.metadata) + "\n"
        if not file.is_file():
            write_text(file, line)
        elif file.read_text(encoding="utf-8", errors="replace").strip() != line.strip():
            raise ValueError(f"{file} belongs to another prompt than {prompt.text!r}; use another folder")


# ---- detections -----------------------------------------------------------------------------------------------------


def read_detections(path: Path) -> Detect:
    """Return a detector that looks up the objects of an image in a file of JSON lines, one for each image:

    {"image": "00000/samples/0000.png", "objects": [{"class": "bench", "score": 0.97, "box": [10, 20, 200, 180]}]}

    image: path relative to the folder of the file. box: left, top, right, bottom in pixels, with left < right and
    top < bottom. An object may have a "color", one of COLORS; the others are classified by the box's part of the image.
    Images are recognized by their pixels. Raises ValueError that names the file and the line; the detector raises it
    for an image that the file does not have.
    """
    known: dict[bytes, tuple[Objects, str]] = {}
    for fields, where in _objects(path):
        _check_keys(fields, ("image", "objects"), (), where)
        name = _check(fields["image"], str, f"{where}: image", "a path")
        values = _check(fields["objects"], list, f"{where}: objects", "a list")
        objects = _read_objects([_read_object(each, f"{where}: objects[{i}]") for i, each in enumerate(values)])
        try:
            with Image.open(path.parent / name) as image:
                digest = _digest(np.asarray(image.convert("RGB")))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"{where}: image {name!r} cannot be read ({error}); use a path relative to {path.parent}"
            ) from None
        first, other = known.setdefault(digest, (objects, where))
        if not all(np.array_equal(a, b) for a, b in zip(first[:3], objects[:3], strict=True)):
            raise ValueError(f"{where}: image {name!r} has the pixels of {other} and other objects; remove one of them")
    if not known:
        raise ValueError(f"{path} has no detections; use one JSON object for each image")

    def detect(image: np.ndarray) -> Objects:
        found = known.get(_digest(image))
        if found is None:
            raise ValueError(f"{path} has no detections of one of the images; use detections of exactly these images")
        return found[0]

    return detect


def _digest(image: np.ndarray) -> bytes:
    return hashlib.sha256(np.array(image.shape, np.int64).tobytes() + np.ascontiguousarray(image).tobytes()).digest()


def _read_object(value: Any, where: str) -> tuple[list[float], float, str, str | None]:
    _check(value, dict, where, "an object {...}")
    _check_keys(value, ("class", "score", "box"), ("color",), where)
    name = _choose(value["class"], NAMES, f"{where}.class", "one of GenEval's 80 classes, such as 'tv remote'")
    score = _check(value["score"], (int, float), f"{where}.score", "a number in [0, 1]")
    if not 0 <= score <= 1:
        raise ValueError(f"{where}.score is {SHORT.repr(score)}, which is not supported; use a number in [0, 1]")
    box = value["box"]
    numbers = isinstance(box, list) and len(box) == 4 and all(type(each) in (int, float) for each in box)
    if not numbers or not all(-1e6 < each < 1e6 for each in box) or box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError(
            f"{where}.box is {SHORT.repr(box)}, which is not supported; use [left, top, right, bottom] in pixels"
        )
    color = value.get("color")
    if color is not None:
        _choose(color, COLORS, f"{where}.color", f"one of {', '.join(COLORS)}")
    return box, float(score), name, color


def _read_objects(objects: Sequence[tuple[list[float], float, str, str | None]]) -> Objects:
    boxes = np.array([each[0] for each in objects], np.float32).reshape(-1, 4)
    scores = np.array([each[1] for each in objects], np.float32)
    return Objects(boxes, scores, tuple(each[2] for each in objects), None, tuple(each[3] for each in objects))
