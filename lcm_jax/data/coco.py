"""Captions of COCO as it is published: `annotations/captions_val2014.json` beside a folder of images."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lcm_jax.files import check_unicode, decode


class CocoCaption(NamedTuple):
    """A caption, and the path of its image."""

    caption: str
    image: Path


@dataclass(frozen=True)
class Coco:
    """Captions and images of COCO, in the order of their numbers.

    captions: of all images, those of an image one after another. images: those that the captions' file lists.
    """

    captions: tuple[CocoCaption, ...]
    images: tuple[Path, ...]

    def choose(self, count: int, per_image: str, seed: int) -> list[CocoCaption]:
        """Return `count` captions: per_image "any" draws them at random from all captions, in the order drawn; "first"
        takes the first caption of each image, of the first images.

        Raises ValueError if there are fewer.
        """
        if per_image == "first":
            firsts: dict[Path, CocoCaption] = {}
            for each in self.captions:
                firsts.setdefault(each.image, each)
            candidates = list(firsts.values())
        else:
            order = np.random.default_rng(seed).permutation(len(self.captions))
            candidates = [self.captions[i] for i in order]
        if count > len(candidates):
            raise ValueError(f"report.prompts {count} is more than the {len(candidates)} captions there are; lower it")
        return candidates[:count]


def read_coco(captions: Path, images: Path) -> Coco:
    """Read the captions of a file of COCO. images: the folder of its images, which are not opened.

    Raises ValueError, which names the file and the entry, for another format, and OSError for a file that is missing.
    """
    if not captions.is_file():
        raise ValueError(f"data.captions {captions} is not a file; use captions_val2014.json of COCO's annotations")
    if not images.is_dir():
        raise ValueError(f"data.images {images} is not a folder; use that of COCO's images, such as val2014")
    try:
        content = json.loads(decode(captions.read_bytes(), str(captions)))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{captions} is not JSON ({error}); use COCO's captions") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{captions} is a JSON {type(content).__name__}; use COCO's captions, an object")
    listed = _list(content, "images", captions)
    names = dict(sorted((_number(each, "id", captions), _name(each, captions)) for each in listed))
    found = []
    for each in _list(content, "annotations", captions):
        number, caption = _number(each, "image_id", captions), each.get("caption")
        if number not in names:
            raise ValueError(f"{captions} has a caption of image {number}, which it does not list; use COCO's captions")
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"{captions} has no text in a caption of image {number}; use COCO's captions")
        found.append((number, _number(each, "id", captions), check_unicode(caption, "a caption").strip()))
    return Coco(
        tuple(CocoCaption(caption, images / names[number]) for number, _, caption in sorted(found)),
        tuple(images / name for name in names.values()),
    )


def _list(content: Mapping[str, Any], key: str, path: Path) -> list[Mapping[str, Any]]:
    entries = content.get(key)
    if not isinstance(entries, list) or not entries or not all(isinstance(each, Mapping) for each in entries):
        raise ValueError(f"{path} has no list of objects {key!r}; use COCO's captions")
    return entries


def _number(entry: Mapping[str, Any], key: str, path: Path) -> int:
    value = entry.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{path} has {key} {value!r}, which is not a number; use COCO's captions")
    return value


def _name(entry: Mapping[str, Any], path: Path) -> str:
    """Return a file's name, which stays in its folder."""
    name = entry.get("file_name")
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise ValueError(f"{path} has file_name {name!r}, which is not a file's name; use COCO's captions")
    return name
