"""Captioned images in Parquet files, as Hugging Face's data sets are published: a row has an image and its caption.

An image is bytes, a struct of bytes and path, or the path of a file in the folder of the Parquet file. A row is read
with the row group that it is in.
"""

import io
import os
import posixpath
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lcm_jax.data import shard_files
from lcm_jax.data.captioned import SourceError, caption_fields, find_captions
from lcm_jax.data.filters import to_numbers
from lcm_jax.data.prepared import ImageSource
from lcm_jax.data.shard_files import ShardFile
from lcm_jax.data.stored import digest
from lcm_jax.data.substitutes import describe

KEY = "data.shards"
REMEDY = "set --config.data.shards to files such as data/train-*.parquet"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
GROUPS = 4  # row groups that stay in memory
LARGE_GROUP = 2**25  # bytes of a row group, from which on reading single rows of it is slow

ROW = np.dtype([("file", "<i4"), ("group", "<i4"), ("row", "<i4")])


def import_parquet() -> Any:
    """Return pyarrow.parquet. Raises ValueError that names the extra if it is missing."""
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ValueError(
            "data.source=parquet requires the package pyarrow; run pip install 'lcm_jax[parquet]'"
        ) from error
    return parquet


class ParquetImages:
    """The images in rows of Parquet files, by number; see `StoredImages`.

    rows: ROW[N], the place of each. names: of the columns with captions.
    """

    formats = FORMATS

    def __init__(
        self,
        files: Sequence[ShardFile],
        rows: np.ndarray,
        image_field: str,
        names: Sequence[str],
        values: Mapping[str, np.ndarray],
    ):
        self._files, self._rows, self.values = tuple(files), rows, values
        self._image_field, self._names = image_field, tuple(names)
        self._group = lru_cache(GROUPS)(self._read_group)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_group"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._group = lru_cache(GROUPS)(self._read_group)

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, number: int) -> str:
        place = self._rows[number]
        return f"row {place['row']} of row group {place['group']} of {self._files[place['file']].name}"

    def captions(self, number: int) -> list[str]:
        columns = dict.fromkeys(name.split(".")[0] for name in self._names)
        row = {name: self._value(number, name) for name in columns}
        return find_captions(row, self._names, "its row")

    def image(self, number: int) -> BinaryIO:
        image = self._value(number, self._image_field)
        if isinstance(image, Mapping):
            image = image.get("path") if image.get("bytes") is None else image["bytes"]
        if isinstance(image, bytes):
            return io.BytesIO(image)
        if isinstance(image, str):
            return self._file(self._files[self._rows[number]["file"]].name, image)
        raise ValueError(f"its {self._image_field!r} has neither bytes nor a path")

    def digest(self, numbers: np.ndarray) -> str:
        files = (text for file in self._files for text in (file.name, str(file.size)))
        return digest(*files, self._rows[numbers].tobytes())

    def _value(self, number: int, column: str) -> Any:
        place = self._rows[number]
        return self._group(int(place["file"]), int(place["group"])).column(column)[int(place["row"])].as_py()

    def _read_group(self, file: int, group: int) -> Any:
        name = self._files[file].name
        columns = dict.fromkeys([self._image_field, *(name.split(".")[0] for name in self._names)])
        with shard_files.open_file(name, KEY) as opened:
            return import_parquet().ParquetFile(opened).read_row_group(group, columns=list(columns))

    @staticmethod
    def _file(shard: str, path: str) -> BinaryIO:
        """Open a file that a row names, if it is in the folder of its Parquet file."""
        name = posixpath.normpath(path.replace("\\", "/"))
        outside = ValueError(f"its path {path[:200]!r} leads out of the folder of {shard}")
        if name.startswith("/") or name.split("/")[0] == ".." or "\0" in name or shard_files.is_url(path):
            raise outside
        if shard_files.is_url(shard):
            return io.BytesIO(shard_files.read_file(posixpath.join(posixpath.dirname(shard), name), KEY))
        folder = os.path.realpath(os.path.dirname(shard) or ".")
        target = os.path.realpath(os.path.join(folder, name))
        if os.path.commonpath([folder, target]) != folder:
            raise outside
        return open(target, "rb")


@dataclass(frozen=True, kw_only=True)
class ParquetSource(ImageSource):
    """The source `parquet`: `shards`, files or URLs whose rows have an image in `image_field`."""

    shards: str | Sequence[str]
    image_field: str = "image"

    @property
    def failure(self) -> tuple[str, str]:
        return KEY, "fetch the files again"

    @property
    def settings(self) -> Mapping[str, str]:
        return {"image_field": self.image_field}

    def check(self, batch_size: int) -> None:
        super().check(batch_size)
        import_parquet()
        shard_files.expand(self.shards, KEY, REMEDY)

    def store(self, fields: Sequence[str], folder: Path, log: Callable[[str], None]) -> ParquetImages:
        names = caption_fields(self.caption_field)
        shards = shard_files.expand(self.shards, KEY, REMEDY)
        files = shard_files.map_threads(lambda name: ShardFile(name, KEY), shards)
        indices = shard_files.map_threads(lambda i: self._index(i, files[i].name, names, fields), range(len(files)))
        rows = np.concatenate([rows for rows, _, _ in indices])
        if not len(rows):
            raise ValueError(f"{KEY} has no row in {len(files)} files, first {shards[0]!r}; {REMEDY}")
        sizes = np.concatenate([sizes for _, sizes, _ in indices])
        log(f"{len(rows)} rows in {len(files)} files")
        if (largest := int(sizes.max(initial=0))) > LARGE_GROUP:
            log(
                f"each image is read with the {len(rows) / len(sizes):.0f} rows of its row group, up to "
                f"{largest / 2**20:.0f} MiB, in random order; encode them once (python -m lcm_jax.cache), or write "
                "smaller row groups"
            )
        values = {field: np.concatenate([each[field] for _, _, each in indices]) for field in fields}
        return ParquetImages(files, rows, self.image_field, names, values)

    def _index(
        self, number: int, name: str, captions: Sequence[str], fields: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Return (ROW[n], bytes of each row group, numbers of each field) of a file. Raises ValueError."""
        try:
            with shard_files.open_file(name, KEY) as opened:
                file = import_parquet().ParquetFile(opened)
                columns, metadata = file.schema_arrow.names, file.metadata
                present = dict.fromkeys(field.split(".")[0] for field in fields if field.split(".")[0] in columns)
                table = file.read(columns=list(present)).to_pylist() if present else []
        except SourceError:
            raise
        except Exception as error:  # pyarrow raises many kinds
            raise ValueError(f"{KEY} {name!r} is not a whole Parquet file ({describe(error)}); {REMEDY}") from error
        for key, wanted in [("image_field", self.image_field), *(("caption_field", each) for each in captions)]:
            if wanted.split(".")[0] not in columns:
                raise ValueError(
                    f"{KEY} {name!r} has no column {wanted!r}, but {', '.join(map(repr, columns[:16]))}; set "
                    f"--config.data.{key}"
                )
        groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
        rows = [(number, group, row) for group, each in enumerate(groups) for row in range(each.num_rows)]
        rows = np.array(rows, ROW)
        sizes = np.array([group.total_byte_size for group in groups], np.int64)
        return rows, sizes, to_numbers(table or [{}] * len(rows), fields)
