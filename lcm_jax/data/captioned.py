"""Captioned images, whatever their source: the shape that every recipe trains and evaluates on."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from lcm_jax.data.substitutes import Substitutes
from lcm_jax.files import check_unicode, decode


class Records(Protocol):
    """Random access to records, each a dict."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Mapping[str, Any]: ...


class SourceError(ValueError):
    """The files of a source can no longer be read. No other record replaces one: a resumed run would replace others."""


class CaptionError(ValueError):
    """An image has no caption."""


class UnreadableRecord(ValueError):
    """A record that cannot be read, as (its name, the cause): training replaces it, a latent cache leaves it out."""

    def __str__(self) -> str:
        return ": ".join(self.args)


@dataclass(frozen=True)
class CaptionedDataset:
    """Captioned images to train on, images that no update sees, and prompts to evaluate with.

    train, held_out: random access to {"image": uint8[height, width, 3], "caption": str}, and "time_ids": float32[6] if
    the image was cropped (see `time_ids`). prompts(n) -> the same n captions each time, none of them of `train`.
    compositional_prompts(n) -> n captions of combinations that no training image has; none if the source has no such
    captions. manifest: all that determines `train`, by name: digests of files, and settings.
    buckets: int32[N], the number of the size in `bucket_sizes` that each image of `train` has; None if all have one.
    substitutes: what reads the records of `train`; None if all of them can be read.
    """

    train: Records
    held_out: Records
    prompts: Callable[[int], list[str]]
    compositional_prompts: Callable[[int], list[str]]
    manifest: Mapping[str, str]
    buckets: np.ndarray | None = None
    bucket_sizes: tuple[tuple[int, int], ...] = ()
    substitutes: Substitutes | None = None

    @property
    def fingerprint(self) -> str:
        """The digest of `manifest`."""
        return hashlib.sha256(json.dumps(dict(self.manifest), sort_keys=True).encode()).hexdigest()

    @property
    def strict(self) -> Records:
        """The records of `train`, but UnreadableRecord in place of those that others replace."""
        return self.train if self.substitutes is None else Strict(self.train)

    def skipped(self) -> dict[str, int]:
        """Return how many records of `train` could not be read so far, by kind of error."""
        return {} if self.substitutes is None else self.substitutes.counts()


class Strict:
    """Random access to prepared images that raises UnreadableRecord; see `CaptionedDataset.strict`."""

    def __init__(self, records: Any):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        return self._records.read(i)


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


def parse_object(data: bytes, name: str) -> Mapping[str, Any]:
    """Return the JSON object in a file's bytes. Raises ValueError that begins with `name` if there is none."""
    fields = json.loads(decode(data, name))
    if not isinstance(fields, Mapping):
        raise ValueError(f"{name} is a JSON {type(fields).__name__}, not an object; write {{...}}")
    return fields


def find_captions(fields: Mapping[str, Any], names: Sequence[str], where: str) -> list[str]:
    """Return the captions in the fields `names`, texts or lists of texts, without the empty ones.

    where: what the fields belong to, in messages. Raises CaptionError if there is none.
    """
    found = []
    for name in names:
        value = find_field(fields, name)
        texts = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
        for text in texts:
            if isinstance(text, bytes):
                text = decode(text, "the caption")
            if isinstance(text, str) and (text := check_unicode(text, "the caption").strip()):
                found.append(text)
    if not found:
        wanted = " or ".join(map(repr, names))
        raise CaptionError(f"{where} has no text {wanted}; set --config.data.caption_field")
    return found


def find_field(fields: Mapping[str, Any], name: str) -> Any:
    """Return a field by its name, or by the names of nested ones with dots between them; None if there is none."""
    value: Any = fields
    for part in (name,) if name in fields else name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value.tolist() if isinstance(value, np.ndarray) else value


def caption_fields(setting: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names in `data.caption_field`: one, several with commas between them, or a tuple of them.

    Raises ValueError if there is none.
    """
    names = setting.split(",") if isinstance(setting, str) else setting
    names = tuple(name.strip() for name in names if isinstance(name, str))
    if not all(names) or not names:
        raise ValueError(f"data.caption_field {setting!r} is not supported; use a name such as caption, or title,text")
    return names
