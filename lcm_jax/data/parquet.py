"""Captioned images in Parquet files, as Hugging Face's data sets are published: a row has an image and its caption.

An image is bytes, a struct of bytes and path, or the path of a file in the folder of the Parquet file. A row is read
with the row group that it is in.
"""

import os
import posixpath
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lcm_jax.data import shard_files
from lcm_jax.data.captioned import SourceError, caption_fields
from lcm_jax.data.filters import to_numbers
from lcm_jax.data.prepared import ImageSource
from lcm_jax.data.rows import RowImages
from lcm_jax.data.shard_files import ShardFile
from lcm_jax.data.stored import digest
from lcm_jax.data.substitutes import describe

KEY = "data.shards"
REMEDY = "set --config.data.shards to files such as data/train-*.parquet"
GROUPS = 4  # row groups that stay in memory
LARGE_GROUP = 2**25  # bytes of a row group, from which on reading single rows of it is slow


def import_parquet() -> Any:
    """Return pyarrow.parquet. Raises ValueError that names the extra if it is missing."""
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ValueError(
            "data.source=parquet requires the package pyarrow; run pip install 'lcm_jax[parquet]'"
        ) from error
    return parquet


class ParquetReader:
    """Reads columns of row i of several files as {column: value}; it travels to worker processes.

    groups: int64[G, 3], the file, the number within it and the number of rows of each row group. image_field: the
    column whose structs and paths become the bytes of the images.
    """

    def __init__(self, files: Sequence[str], groups: np.ndarray, columns: Sequence[str], image_field: str):
        self._files, self._groups, self._ends = tuple(files), groups, np.cumsum(groups[:, 2])
        self._columns, self._image_field = list(columns), image_field
        self._group = lru_cache(GROUPS)(self._read_group)

    def __reduce__(self):
        return ParquetReader, (self._files, self._groups, self._columns, self._image_field)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __call__(self, i: int) -> dict[str, Any]:
        group, row = self._place(i)
        table = self._group(group)
        values = {name: table.column(name)[row].as_py() for name in self._columns}
        image = values[self._image_field]
        if isinstance(image, Mapping):
            image = image.get("path") if image.get("bytes") is None else image["bytes"]
        if isinstance(image, str):
            image = read_beside(self._files[self._groups[group, 0]], image)
        return values | {self._image_field: image}

    def name(self, i: int) -> str:
        """Return the place of a row, for messages."""
        group, row = self._place(i)
        file, number, _ = self._groups[group]
        return f"row {row} of row group {number} of {self._files[file]}"

    def _place(self, i: int) -> tuple[int, int]:
        group = int(np.searchsorted(self._ends, i, side="right"))
        return group, int(i - self._ends[group] + self._groups[group, 2])

    def _read_group(self, group: int) -> Any:
        file, number, _ = self._groups[group]
        with shard_files.open_file(self._files[file], KEY) as opened:
            return import_parquet().ParquetFile(opened).read_row_group(int(number), columns=self._columns)


def read_beside(shard: str, path: str) -> bytes:
    """Return the bytes of a file that a row of `shard` names. Raises ValueError if it is not in the shard's folder."""
    name = posixpath.normpath(path.replace("\\", "/"))
    outside = ValueError(f"its path {path[:200]!r} leads out of the folder of {shard}")
    if name.startswith("/") or name.split("/")[0] == ".." or "\0" in name or shard_files.is_url(path):
        raise outside
    if shard_files.is_url(shard):
        return shard_files.read_file(posixpath.join(posixpath.dirname(shard), name), KEY)
    folder = os.path.realpath(os.path.dirname(shard) or ".")
    target = os.path.realpath(os.path.join(folder, name))
    if os.path.commonpath([folder, target]) != folder:
        raise outside
    return Path(target).read_bytes()


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

    def store(self, fields: Sequence[str], folder: Path, log: Callable[[str], None]) -> RowImages:
        names = caption_fields(self.caption_field)
        shards = shard_files.expand(self.shards, KEY, REMEDY)
        files = shard_files.map_threads(lambda name: ShardFile(name, KEY), shards)
        indices = shard_files.map_threads(lambda i: self._index(i, shards[i], names, fields), range(len(shards)))
        groups = np.concatenate([groups for groups, _, _ in indices])
        sizes = np.concatenate([sizes for _, sizes, _ in indices])
        total = int(groups[:, 2].sum())
        if not total:
            raise ValueError(f"{KEY} has no row in {len(files)} files, first {shards[0]!r}; {REMEDY}")
        log(f"{total} rows in {len(files)} files")
        if (largest := int(sizes.max())) > LARGE_GROUP:
            log(
                f"each image is read with the {total / len(groups):.0f} rows of its row group, up to "
                f"{largest / 2**20:.0f} MiB, in random order; encode them once (python -m lcm_jax.cache), or write "
                "smaller row groups"
            )
        columns = dict.fromkeys([self.image_field, *(name.split(".")[0] for name in names)])
        reader = ParquetReader(shards, groups, list(columns), self.image_field)
        identity = digest(*(text for file in files for text in (file.name, str(file.size))))
        values = {field: np.concatenate([each[field] for _, _, each in indices]) for field in fields}
        return RowImages(reader, self.image_field, names, identity, values)

    def _index(
        self, number: int, name: str, captions: Sequence[str], fields: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Return (row groups, see `ParquetReader`; bytes of each; numbers of each field) of a file.

        Raises ValueError if it is not a Parquet file, or has no such columns.
        """
        try:
            with shard_files.open_file(name, KEY) as opened:
                file = import_parquet().ParquetFile(opened)
                columns, metadata = file.schema_arrow.names, file.metadata
                present = dict.fromkeys(field.split(".")[0] for field in fields if field.split(".")[0] in columns)
                rows = file.read(columns=list(present)).to_pylist() if present else [{}] * metadata.num_rows
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
        places = [(number, group, each.num_rows) for group, each in enumerate(groups) if each.num_rows]
        sizes = [each.total_byte_size for each in groups if each.num_rows]
        return np.array(places, np.int64).reshape(-1, 3), np.array(sizes, np.int64), to_numbers(rows, fields)
