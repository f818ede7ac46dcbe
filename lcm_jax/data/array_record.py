"""Captioned images in ArrayRecord files, whose records are tf.train.Example with an image and a caption."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from array_record.python.array_record_data_source import ArrayRecordDataSource

from lcm_jax.data import shard_files
from lcm_jax.data.captioned import caption_fields
from lcm_jax.data.prepared import ImageSource
from lcm_jax.data.rows import RowImages, read_values
from lcm_jax.data.shard_files import ShardFile
from lcm_jax.data.stored import digest
from lcm_jax.data.substitutes import describe
from lcm_jax.data.tf_example import parse_example

KEY = "data.shards"
REMEDY = "set --config.data.shards to files such as data/*.array_record"


class ExampleReader:
    """Reads the features of record i; it travels to worker processes."""

    def __init__(self, files: Sequence[str]):
        self._records = ArrayRecordDataSource(list(files))

    def __len__(self) -> int:
        return len(self._records)

    def __call__(self, i: int) -> Mapping[str, Any]:
        return parse_example(self._records[i])

    def name(self, i: int) -> str:
        """Return the place of a record, for messages."""
        return f"record {i} of {KEY}"


@dataclass(frozen=True, kw_only=True)
class ArrayRecordSource(ImageSource):
    """The source `array_record`: `shards`, files whose records have the feature `image_field`, an encoded image."""

    shards: str | Sequence[str]
    image_field: str = "image"

    @property
    def failure(self) -> tuple[str, str]:
        return KEY, "write the files again"

    @property
    def settings(self) -> Mapping[str, str]:
        return {"image_field": self.image_field}

    def check(self, batch_size: int) -> None:
        super().check(batch_size)
        self._files()

    def store(self, fields: Sequence[str], folder: Path, log: Callable[[str], None]) -> RowImages:
        files = [ShardFile(name, KEY) for name in self._files()]
        for file in files:
            try:
                len(ExampleReader([file.name]))
            except Exception as error:  # array_record raises RuntimeError and ValueError
                raise ValueError(
                    f"{KEY} {file.name!r} is not a whole ArrayRecord file ({describe(error)}); write it again"
                ) from error
        read = ExampleReader([file.name for file in files])
        identity = digest(*(text for file in files for text in (file.name, str(file.size))))
        values = read_values(read, fields, digest(*(file.identity for file in files)), folder, log)
        names = caption_fields(self.caption_field)
        stored = RowImages(read, self.image_field, names, identity, values)
        stored.check(KEY)
        log(f"{len(read)} records in {len(files)} files")
        return stored

    def _files(self) -> list[str]:
        files = shard_files.expand(self.shards, KEY, REMEDY)
        if urls := [name for name in files if shard_files.is_url(name)]:
            raise ValueError(
                f"{KEY} {urls[0]!r} is not supported for data.source=array_record, which reads files; copy it to this "
                "machine, or mount its bucket"
            )
        return files
