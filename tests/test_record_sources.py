"""Parquet, ArrayRecord and tensorflow-datasets: every kind of image and caption, and what is wrong with files."""

import os
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import fsspec
import numpy as np
import pytest
from folders import image, write
from record_files import make_rows, serialize, write_array_record, write_parquet, write_tfds

from lcm_jax.data import parquet
from lcm_jax.data.array_record import ArrayRecordSource
from lcm_jax.data.captioned import CaptionedDataset
from lcm_jax.data.folder import FolderSource
from lcm_jax.data.parquet import ParquetSource
from lcm_jax.data.rows import RowImages
from lcm_jax.data.stored import open_image
from lcm_jax.data.tf_example import parse_example
from lcm_jax.data.tfds import TfdsSource

ROWS = make_rows(12)


def opened(kind: Any, tmp_path: Path, **settings: Any) -> tuple[CaptionedDataset, list[str]]:
    lines: list[str] = []
    source = kind(**{"size": 16, "held_out": 1} | settings)
    source.check(4)
    return source.open(0, tmp_path / "index", lines.append), lines


def records(dataset: CaptionedDataset) -> list[dict[str, Any]]:
    return [part[i] for part in (dataset.train, dataset.held_out) for i in range(len(part))]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> str:
    return write_tfds(tmp_path_factory.mktemp("tfds"), ROWS, ("a photo", "a sketch"))


def test_all_sources_make_the_same_records(prepared, tmp_path):
    """Images of a folder, in another order, as bytes in rows; crops in the middle."""
    folder = write(tmp_path / "set", {f"{i}.png": row["image"] for i, row in enumerate(ROWS)})
    write(folder, {f"{i}.txt": row["caption"] for i, row in enumerate(ROWS)})
    sources = [
        opened(FolderSource, tmp_path, folder=str(folder)),
        opened(ParquetSource, tmp_path, shards=write_parquet(tmp_path / "p" / "0.parquet", ROWS)),
        opened(ArrayRecordSource, tmp_path, shards=write_array_record(tmp_path / "0.array_record", ROWS)),
        opened(TfdsSource, tmp_path, tfds="my_set:1.0.0", tfds_dir=prepared),
    ]
    key = lambda record: (record["caption"], record["image"].tobytes(), record["time_ids"].tolist())  # noqa: E731
    first, *others = (sorted(map(key, records(dataset))) for dataset, _ in sources)
    assert len(first) == 12 and all(each == first for each in others)
    assert [lines for _, lines in sources[1:]] == [
        ["12 rows in 1 files"],
        ["12 records in 1 files"],
        ["12 records of my_set/1.0.0"],
    ]


@pytest.mark.parametrize("kind", ["parquet", "array_record", "tfds"])
def test_filters_and_several_captions(kind, prepared, tmp_path):
    rows = [row | {"more": ["a photo", "a sketch"]} for row in ROWS]
    settings: dict[str, Any] = {"filters": ("score>=0.5",), "caption_field": "caption,more", "repeats": 20}
    if kind == "parquet":
        path = write_parquet(tmp_path / "0.parquet", [row | {"score": str(row["score"])} for row in rows])
        dataset, lines = opened(ParquetSource, tmp_path, shards=path, **settings)
    elif kind == "array_record":
        path = write_array_record(tmp_path / "0.array_record", rows)
        dataset, lines = opened(ArrayRecordSource, tmp_path, shards=path, **settings)
    else:
        settings["caption_field"] = "caption,more.text"
        dataset, lines = opened(TfdsSource, tmp_path, tfds="my_set", tfds_dir=prepared, **settings)
    assert len(dataset.train) == 5 * 20 and len(dataset.held_out) == 1
    assert "data.filters 'score>=0.5' leaves out 6 of 12 records" in lines
    found = [record["caption"] for record in records(dataset)]
    assert found.count("a photo") > 15 and found.count("a sketch") > 15 and len(set(found)) > 5
    assert dataset.manifest["filters"] == '["score>=0.5"]'


# ---- Parquet --------------------------------------------------------------------------------------------------------


def test_images_in_files_beside_a_parquet_file_but_nowhere_else(tmp_path):
    folder = write(tmp_path / "set", {"images/a.png": image(0), "images/b.png": image(1), "../secret.png": image(2)})
    os.symlink(tmp_path / "secret.png", folder / "link.png")
    paths = ["images/a.png", "images\\b.png", str(tmp_path / "secret.png"), "../secret.png", "link.png", "none.png"]
    paths += ["memory://secret.png", "a\0.png"]
    rows: list[dict[str, Any]] = [{"image": path, "caption": f"caption {i}"} for i, path in enumerate(paths)]
    path = write_parquet(folder / "train.parquet", [*rows, {"image": None, "caption": "none"}])
    dataset, lines = opened(ParquetSource, tmp_path, shards=path, held_out=1)
    assert {dataset.train[i]["caption"] for i in range(8)} == {"caption 0", "caption 1"}
    assert dataset.skipped() == {"ValueError": 5, "FileNotFoundError": 1}
    assert sum("leads out of the folder of" in line for line in lines) == 5
    with pytest.raises(ValueError, match="^data.shards: none of 1 records .*has no image in 'image', but NoneType; "):
        dataset.held_out[0]
    structs = [{"image": {"bytes": None, "path": path}, "caption": "x"} for path in paths[:2]]
    dataset, _ = opened(ParquetSource, tmp_path, shards=write_parquet(folder / "structs.parquet", structs))
    assert len(records(dataset)) == 2 and dataset.skipped() == {}


def test_large_row_groups_are_a_warning_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "LARGE_GROUP", 1000)
    _, lines = opened(ParquetSource, tmp_path, shards=write_parquet(tmp_path / "0.parquet", ROWS, 6))
    assert lines[1].startswith(
        "each image is read with the 6 rows of its row group, up to 0 MiB, in random order; encode"
    )


def test_row_groups_are_read_as_they_are_needed(tmp_path, monkeypatch):
    paths = [write_parquet(tmp_path / f"{i}.parquet", ROWS[i : i + 6], 2) for i in (0, 6)]
    dataset, _ = opened(ParquetSource, tmp_path, shards=tuple(paths))
    read, groups = parquet.ParquetReader._read_group, []
    monkeypatch.setattr(
        parquet.ParquetReader, "_read_group", lambda self, group: groups.append(group) or read(self, group)
    )
    train: Any = cloudpickle.loads(cloudpickle.dumps(dataset.train))  # as in a worker process
    assert [train[i]["caption"] for i in range(11)] == [row["caption"] for row in ROWS[:11]]
    assert groups == [0, 1, 2, 3, 4, 5]


def damaged(path: str, at: int = 400) -> str:
    data = bytearray(Path(path).read_bytes())
    data[at : at + 200] = bytes(200)
    Path(path).write_bytes(data)
    return path


def test_a_damaged_row_group_is_skipped(tmp_path):
    path = damaged(write_parquet(tmp_path / "0.parquet", ROWS, 4))
    dataset, lines = opened(ParquetSource, tmp_path, shards=path)
    assert len({record["caption"] for record in records(dataset)}) > 3 and sum(dataset.skipped().values()) >= 1
    assert "of row group 0 of" in lines[1]
    os.unlink(path)
    with pytest.raises(ValueError, match="^shard .*0.parquet cannot be read .*; make it readable and run the same com"):
        cloudpickle.loads(cloudpickle.dumps(dataset.train))[0]  # which has no row group in memory


# ---- ArrayRecord ----------------------------------------------------------------------------------------------------


def test_examples_are_parsed_whatever_is_in_them():
    row = {"image": b"\0\xff", "caption": "ä", "sizes": [1, -2, 2**40], "score": 0.5, "both": ["a", "b"]}
    found = parse_example(serialize(row))
    assert found == row | {"caption": "ä".encode(), "both": [b"a", b"b"]}
    assert parse_example(b"") == {}
    for data in (b"no example at all", serialize(row)[:-3], bytes(range(256))):
        with pytest.raises(ValueError, match="^the record is not a tf.train.Example: "):
            parse_example(data)


def test_records_that_cannot_be_used_are_skipped(tmp_path):
    bad = [b"no example at all", {"image": b"broken", "caption": "x"}, {"image": [1, 2], "caption": "x"}]
    bad += [{"image": ROWS[0]["image"], "title": "x"}, {"caption": "x"}]
    path = write_array_record(tmp_path / "0.array_record", [*ROWS[:6], *bad, ROWS[6]])
    dataset, lines = opened(ArrayRecordSource, tmp_path, shards=path)
    assert {record["caption"] for record in records(dataset)} == {row["caption"] for row in ROWS[:7]}
    assert dataset.skipped() == {"ValueError": 3, "ImageError": 1, "CaptionError": 1}
    text = "\n".join(lines)
    for expected in (
        "is not a tf.train.Example",
        "no image in 'image', but list",
        "but NoneType",
        "has no text 'caption'",
    ):
        assert expected in text


# ---- tensorflow-datasets --------------------------------------------------------------------------------------------


def test_a_part_of_a_split_and_no_tensorflow(prepared, tmp_path):
    dataset, _ = opened(TfdsSource, tmp_path, tfds="my_set", tfds_dir=prepared, split="train[:50%]")
    assert len(dataset.train) == 5 and "tensorflow" not in sys.modules
    whole, _ = opened(TfdsSource, tmp_path, tfds="my_set", tfds_dir=prepared)
    assert {name for name in whole.manifest if whole.manifest[name] != dataset.manifest[name]} == {"files", "split"}


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, settings, message",
    [
        (ParquetSource, {"shards": ""}, "^data.shards is empty; set --config.data.shards to files such as data/train-"),
        (
            ParquetSource,
            {"shards": "DIR/none-*"},
            "^data.shards '.*' matches no file; set --config.data.shards to files",
        ),
        (
            ParquetSource,
            {"shards": "DIR/0.array_record"},
            "0.array_record' is not a whole Parquet file .*; set --config",
        ),
        (
            ParquetSource,
            {"image_field": "img"},
            "has no column 'img', but 'image', 'caption', .*; set --config.data.imag",
        ),
        (
            ParquetSource,
            {"caption_field": "text,caption"},
            "has no column 'text', but 'image'.*; set --config.data.capt",
        ),
        (
            ArrayRecordSource,
            {"shards": "DIR/0.parquet"},
            "0.parquet' is not a whole ArrayRecord file .*; write it again",
        ),
        (
            ArrayRecordSource,
            {"image_field": "img"},
            "^data.shards: its records have no 'img', but .*set --config.data.im",
        ),
        (
            ArrayRecordSource,
            {"caption_field": "text"},
            "^data.shards: a record, with .* has no text 'text'; set --config",
        ),
        (
            ArrayRecordSource,
            {"shards": "memory://0.array_record"},
            "^data.shards 'memory://0.array_record' is not suppor",
        ),
        (TfdsSource, {"tfds": ""}, "^data.tfds is empty; set --config.data.tfds to the name of a data set"),
        (
            TfdsSource,
            {"tfds": "no_such_set"},
            "^data.tfds 'no_such_set' is not in '.*; set --config.data.tfds_dir to the",
        ),
        (TfdsSource, {"tfds": "my_set:3.0.0"}, "^data.tfds 'my_set:3.0.0' is not in '"),
        (
            TfdsSource,
            {"split": "test"},
            "^data.tfds 'my_set' has no split 'test' to read .*; set --config.data.split, or",
        ),
        (
            TfdsSource,
            {"image_field": "img"},
            "^data.tfds 'my_set' has no 'img', but 'caption', 'image', 'more', 'score'; set",
        ),
        (
            TfdsSource,
            {"caption_field": "text"},
            "^data.tfds: a record, with .* has no text 'text'; set --config.data.cap",
        ),
    ],
)
def test_a_mistake_is_one_line(kind, settings, message, prepared, tmp_path):
    paths = {
        ParquetSource: {"shards": write_parquet(tmp_path / "0.parquet", ROWS[:6])},
        ArrayRecordSource: {"shards": write_array_record(tmp_path / "0.array_record", ROWS[:6])},
        TfdsSource: {"tfds": "my_set", "tfds_dir": prepared},
    }
    fsspec.filesystem("memory").pipe("/0.array_record", b"x")
    settings = {name: value.replace("DIR", str(tmp_path)) for name, value in settings.items()}
    with pytest.raises(ValueError, match=message) as caught:
        opened(kind, tmp_path, **paths[kind] | settings)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "kind, module, settings, extra",
    [
        (ParquetSource, "pyarrow.parquet", {"shards": "x"}, "parquet"),
        (TfdsSource, "tensorflow_datasets.core.decode", {"tfds": "x"}, "tfds"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(kind, module, settings, extra, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"requires the package .*; run pip install 'lcm_jax\[{extra}\]'$"):
        kind(size=16, held_out=1, **settings).check(4)


def test_pixels_in_place_of_files(tmp_path):
    """Data sets that store arrays: gray, with alpha, and what is no image."""
    arrays = [np.full(shape, 9, np.uint8) for shape in [(4, 6), (4, 6, 1), (4, 6, 3), (4, 6, 4)]]
    arrays.append(np.zeros((4, 6, 3), np.float32))

    class Pixels:
        name = str
        __len__ = lambda self: 5  # noqa: E731
        __call__ = lambda self, i: {"image": arrays[i], "caption": np.array(["x"], object)}  # noqa: E731

    stored = RowImages(Pixels(), "image", ["caption"], "", {})
    for i in range(4):
        assert open_image(stored, i).size == (6, 4) and stored.captions(i) == ["x"]
    with pytest.raises(ValueError, match="has no image in 'image', but ndarray; set --config.data.image_field"):
        open_image(stored, 4)
