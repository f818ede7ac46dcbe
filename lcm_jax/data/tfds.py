"""Data sets that tensorflow-datasets has prepared as ArrayRecord files, read without TensorFlow."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcm_jax.data.captioned import caption_fields
from lcm_jax.data.prepared import ImageSource
from lcm_jax.data.rows import RowImages, read_values
from lcm_jax.data.stored import digest
from lcm_jax.data.substitutes import describe

KEY = "data.tfds"


class SourceReader:
    """Reads the features of record i; it travels to worker processes."""

    def __init__(self, source: Any, name: str):
        self._source, self._name = source, name

    def __len__(self) -> int:
        return len(self._source)

    def __call__(self, i: int) -> Mapping[str, Any]:
        return self._source[i]

    def name(self, i: int) -> str:
        """Return the place of a record, for messages."""
        return f"record {i} of {self._name}"


@dataclass(frozen=True, kw_only=True)
class TfdsSource(ImageSource):
    """The source `tfds`: the `split` of a data set that was prepared in `tfds_dir` before, by name.

    image_field: its image. Nothing is downloaded.
    """

    tfds: str
    tfds_dir: str = ""
    split: str = "train"
    image_field: str = "image"

    @property
    def failure(self) -> tuple[str, str]:
        return KEY, "prepare the data set again"

    @property
    def settings(self) -> Mapping[str, str]:
        return {"split": self.split, "image_field": self.image_field}

    def check(self, batch_size: int) -> None:
        super().check(batch_size)
        self._open()

    def store(self, fields: Sequence[str], folder: Path, log: Callable[[str], None]) -> RowImages:
        builder, source = self._open()
        info = builder.info
        read = SourceReader(source, info.full_name)
        identity = digest(info.full_name, self.split, str(len(read)))
        values = read_values(read, fields, identity, folder, log)
        names = caption_fields(self.caption_field)
        stored = RowImages(read, self.image_field, names, identity, values)
        stored.check(KEY)
        log(f"{len(read)} records of {info.full_name}")
        return stored

    def _open(self) -> tuple[Any, Any]:
        """Return (builder, random access to records whose image is not decoded). Raises ValueError."""
        if not self.tfds:
            raise ValueError(f"{KEY} is empty; set --config.data.tfds to the name of a data set, such as my_set:1.0.0")
        try:
            from tensorflow_datasets.core.decode import SkipDecoding
            from tensorflow_datasets.core.read_only_builder import builder_from_files
        except ImportError as error:
            raise ValueError(
                f"data.source=tfds requires the package {error.name}; run pip install 'lcm_jax[tfds]'"
            ) from error
        try:
            builder: Any = builder_from_files(self.tfds, data_dir=self.tfds_dir or None)
        except Exception as error:  # of names, versions and files
            where = repr(self.tfds_dir) if self.tfds_dir else "the default folder"
            raise ValueError(
                f"{KEY} {self.tfds!r} is not in {where} ({describe(error)[:200]}); set --config.data.tfds_dir to the "
                "folder of prepared data sets, or prepare it with tensorflow-datasets and file_format=array_record"
            ) from error
        features = builder.info.features or {}
        if self.image_field not in features:
            raise ValueError(
                f"{KEY} {self.tfds!r} has no {self.image_field!r}, but {', '.join(map(repr, sorted(features)))}; set "
                "--config.data.image_field"
            )
        try:
            decoders = {self.image_field: SkipDecoding()}
            return builder, builder.as_data_source(self.split, decoders=decoders)
        except Exception as error:  # of splits and formats
            raise ValueError(
                f"{KEY} {self.tfds!r} has no split {self.split!r} to read ({describe(error)[:200]}); set "
                "--config.data.split, or prepare it again with file_format=array_record"
            ) from error
