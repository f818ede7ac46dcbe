"""Captioned images, whatever their source: the shape that every recipe trains and evaluates on."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from lcm_jax.files import check_unicode, decode


class Records(Protocol):
    """Random access to records, each a dict."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Mapping[str, Any]: ...


class UnreadableRecord(ValueError):
    """A record that cannot be read, as (its name, the cause): training replaces it, a latent cache leaves it out."""

    def __str__(self) -> str:
        return ": ".join(self.args)


@dataclass(frozen=True)
class CaptionedDataset:
    """Captioned images to train on, images that no update sees, and prompts to evaluate with.

    train, held_out: random access to {"image": uint8[size, size, 3], "caption": str}, and "time_ids": float32[6] if
    the image was cropped (see `time_ids`). prompts(n) -> the same n captions each time, none of them of `train`.
    compositional_prompts(n) -> n captions of combinations that no training image has; none if the source has no such
    captions. fingerprint: text that changes whenever `train` does.
    """

    train: Records
    held_out: Records
    prompts: Callable[[int], list[str]]
    compositional_prompts: Callable[[int], list[str]]
    fingerprint: str


class Source(Protocol):
    """A kind of captioned images: a frozen dataclass whose fields are the keys of `config.data` that it reads."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def check(self, batch_size: int) -> None:
        """Raise ValueError if these settings name no data, by key and remedy. Writes nothing, reads no record."""
        ...

    def open(self, seed: int, folder: Path, log: Callable[[str], None]) -> CaptionedDataset:
        """Open the data. seed: of random crops. folder: for an index, kept between runs. Raises ValueError."""
        ...


def time_ids(record: Mapping[str, Any]) -> np.ndarray:
    """Return SDXL's sizes of a record, float32[6]: (height, width) of the original image, (top, left) of the crop,
    (height, width) of the crop. A record without "time_ids" is a whole image."""
    if "time_ids" in record:
        return record["time_ids"]
    size = record["image"].shape[:2]
    return np.array((*size, 0, 0, *size), np.float32)


def parse_caption(data: bytes, field: str | None) -> str:
    """Return the caption in a file's bytes: all of the text, or if `field` is not None, that field of the JSON object.

    Raises ValueError that says why there is none.
    """
    text = decode(data, "the caption")
    if field is None:
        return text.strip()
    fields = json.loads(text)
    if not isinstance(fields, Mapping) or not isinstance(fields.get(field), str):
        raise ValueError(f"its JSON has no text {field!r}; set --config.data.caption_field")
    return check_unicode(fields[field], "the caption").strip()
