"""Captioned images in records that are mappings of named features, one of them the image."""

import io
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from lcm_jax.data.captioned import CaptionError, find_captions, find_field
from lcm_jax.data.filters import to_numbers
from lcm_jax.data.stored import digest
from lcm_jax.files import whole_file

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
KEPT = 32  # rows in memory: a caption and its image are read one after the other


class Reader(Protocol):
    """Reads the features of row i by name; it travels to worker processes."""

    def __len__(self) -> int: ...

    def __call__(self, i: int, /) -> Mapping[str, Any]: ...

    def name(self, i: int, /) -> str: ...


class RowImages:
    """The images in the feature `image_field` of rows, by number; see `StoredImages`.

    An image is an encoded one, or an array of pixels. names: of the features with captions. identity: a digest of the
    files.
    """

    formats = FORMATS

    def __init__(
        self, read: Reader, image_field: str, names: Sequence[str], identity: str, values: Mapping[str, np.ndarray]
    ):
        self._read, self._identity, self.values = read, identity, values
        self._image_field, self._names = image_field, tuple(names)
        self._row = lru_cache(KEPT)(read)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_row"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._row = lru_cache(KEPT)(self._read)

    def __len__(self) -> int:
        return len(self._read)

    def name(self, number: int) -> str:
        return self._read.name(number)

    def captions(self, number: int) -> list[str]:
        return find_captions(self._row(number), self._names, describe_row(self._row(number)))

    def image(self, number: int) -> BinaryIO | np.ndarray:
        row = self._row(number)
        image = row.get(self._image_field)
        if isinstance(image, bytes):
            return io.BytesIO(image)
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3):
            return image
        raise ValueError(
            f"{describe_row(row)} has no image in {self._image_field!r}, but {type(image).__name__}; set "
            "--config.data.image_field"
        )

    def digest(self, numbers: np.ndarray) -> str:
        return digest(self._identity, numbers.astype("<i8").tobytes())

    def check(self, key: str) -> None:
        """Raise ValueError if the first row that can be read has no image or no caption: so have all others."""
        for number in range(min(len(self), 100)):
            try:
                row = self._read(number)
            except Exception:  # reported, with its reason, when it is read to train on
                continue
            features = ", ".join(repr(name)[:40] for name in list(row)[:16])
            if self._image_field not in row:
                raise ValueError(
                    f"{key}: its records have no {self._image_field!r}, but {features}; set --config.data.image_field"
                )
            try:
                find_captions(row, self._names, f"a record, with {features},")
            except CaptionError as error:
                if all(find_field(row, name) is None for name in self._names):
                    raise ValueError(f"{key}: {error}") from error
            return


def describe_row(row: Mapping[str, Any]) -> str:
    """Return the names of the features of a row, for messages."""
    return f"its record ({', '.join(repr(name)[:40] for name in list(row)[:16])})"


def read_values(
    read: Reader, fields: Sequence[str], identity: str, folder: Path, log: Callable[[str], None]
) -> dict[str, np.ndarray]:
    """Return float64[N] of each field, NaN for rows that have no number in it or cannot be read.

    All rows are read for it, once: folder keeps them under `identity`, a digest of the files.
    """
    if not fields:
        return {}
    path = folder / f"fields-{digest(identity, *fields)[:16]}.npz"
    if path.exists():
        with np.load(path) as arrays:
            return {field: arrays[f"value {field}"] for field in fields}

    def numbers(number: int) -> dict[str, Any]:
        try:
            row = read(number)
        except Exception:  # reported, with its reason, when it is read to train on
            return {}
        return {field: find_field(row, field) for field in fields}

    log(f"reading {', '.join(fields)} of {len(read)} records")
    values = to_numbers([numbers(number) for number in range(len(read))], fields)
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary, temporary.open("wb") as file:
        arrays: dict[str, Any] = {f"value {field}": numbers for field, numbers in values.items()}
        np.savez(file, **arrays)
    return values
