"""Small files of captioned images in records, for tests: Parquet, ArrayRecord and prepared data sets."""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from folders import image
from shards import WORDS

from lcm_jax.data.tf_example import example_type


def make_rows(count: int = 24) -> list[dict[str, Any]]:
    """Rows of images of 40 x 24 pixels (width, height)."""
    return [
        {"image": image(i), "caption": f"a {WORDS[i % len(WORDS)]}", "score": i / count, "width": 40, "height": 24}
        for i in range(count)
    ]


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]], row_group_size: int = 5) -> str:
    """Write rows as Hugging Face does, images as structs of bytes and path if they are bytes."""
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = [dict(row) for row in rows]
    for row in rows:
        if isinstance(row.get("image"), bytes):
            row["image"] = {"bytes": row["image"], "path": "image.png"}
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return str(path)


def serialize(row: Mapping[str, Any]) -> bytes:
    """Return a tf.train.Example of a row."""
    message = example_type()()
    for name, value in row.items():
        values = value if isinstance(value, list) else [value]
        values = [each.encode() if isinstance(each, str) else each for each in values]
        kind = {bytes: "bytes_list", float: "float_list", int: "int64_list"}[type(values[0])]
        getattr(message.features.feature[name], kind).value.extend(values)
    return message.SerializeToString()


def write_array_record(path: Path, records: Sequence[bytes | Mapping[str, Any]]) -> str:
    """Write records as they are, rows as examples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record if isinstance(record, bytes) else serialize(record))
    writer.close()
    return str(path)


def write_tfds(folder: Path, rows: Sequence[Mapping[str, Any]], captions: Sequence[str] = ("a photo",)) -> str:
    """Prepare the data set `my_set` below `folder`; each image has more captions in the feature `more.text`."""
    tfds: Any = pytest.importorskip("tensorflow_datasets")
    os.environ["TFDS_DISABLE_PROGRESS_BAR"] = "1"
    tfds.disable_progress_bar()

    class MySet(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                "caption": tfds.features.Text(),
                "more": {"text": tfds.features.Sequence(tfds.features.Text())},
                "score": np.float32,
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, row in enumerate(rows):
                yield (
                    i,
                    {
                        "image": io.BytesIO(row["image"]),
                        "caption": row["caption"],
                        "more": {"text": list(captions)},
                        "score": row["score"],
                    },
                )

    builder = MySet(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return str(folder)
