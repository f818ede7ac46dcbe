"""What is done with the images of every source: filters, buckets, choice of captions, and records that are skipped."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
from folders import image, write
from shards import write_tar

from lcm_jax.data import substitutes
from lcm_jax.data.batches import ImageRecords
from lcm_jax.data.captioned import CaptionedDataset, UnreadableRecord, caption_fields, find_captions
from lcm_jax.data.folder import FolderSource
from lcm_jax.data.loader import batches
from lcm_jax.data.substitutes import Substitutes
from lcm_jax.data.tar_shards import TarSource


def tar(tmp_path: Path, files: dict[str, bytes], seed: int = 0, **settings: Any) -> tuple[CaptionedDataset, list[str]]:
    lines: list[str] = []
    path = write_tar(tmp_path / "a.tar", files)
    source = TarSource(shards=path, **{"size": 16, "held_out": 1} | settings)
    source.check(4)
    return source.open(seed, tmp_path / "index", lines.append), lines


def described(count: int, **fields: Any) -> dict[str, bytes]:
    """Images with a JSON of these fields each; a list has the value of each image, None is a field that it lacks."""
    files = {}
    for i in range(count):
        row = {name: value[i] if isinstance(value, list) else value for name, value in fields.items()}
        row = {"caption": f"caption {i}"} | {name: value for name, value in row.items() if value is not None}
        files |= {f"{i}.png": image(i), f"{i}.json": json.dumps(row).encode()}
    return files


def captions(records: Any) -> list[str]:
    return [records[i]["caption"] for i in range(len(records))]


# ---- filters --------------------------------------------------------------------------------------------------------


def test_filters_leave_out_records_but_none_that_lacks_the_field(tmp_path):
    score = [0.1, 0.9, None, "0.2", "high", 0.3, float("nan"), True]
    rules = ("pwatermark<0.5", "width >= 100", "other!=1")
    dataset, lines = tar(tmp_path, described(8, pwatermark=score, width=[100] * 7 + [99]), filters=rules)
    kept = [0, 2, 3, 4, 5, 6]
    assert captions(dataset.train) + captions(dataset.held_out) == [f"caption {i}" for i in kept]
    assert lines[1:] == [
        "data.filters 'pwatermark<0.5' leaves out 2 of 8 records; 3 have no number in 'pwatermark', and stay",
        "data.filters 'width >= 100' leaves out 0 of 8 records",
        "data.filters 'other!=1' leaves out 0 of 8 records; 8 have no number in 'other', and stay",
    ]
    lines.clear()
    source = TarSource(shards=str(tmp_path / "a.tar"), size=16, held_out=1, filters=rules)
    again = source.open(0, tmp_path / "index", lines.append)
    assert again.fingerprint == dataset.fingerprint and len(lines) == 3, "the index has the fields"
    with pytest.raises(
        ValueError, match="^data.held_out 1 leaves none of the 1 records of data.shards that data.filters"
    ):
        tar(tmp_path, described(8, width=[1] * 7 + [2]), filters=("width>1",))


def test_min_size_is_that_of_the_upright_image(tmp_path):
    """Of JSON where it is there, else of the file's header; an image that cannot be opened is not left out by it."""
    files = described(4, width=[64, 64, None, None], height=[8, 64, None, None])
    files |= {"2.png": image(2, 30, 64), "3.png": b"broken"}
    dataset, lines = tar(tmp_path, files, filters="min_size>=31", held_out=1)
    assert captions(dataset.train) == ["caption 1"] and len(dataset.held_out) == 1
    assert lines[1:] == [
        "reading the sizes of 2 images from their headers",
        "data.filters 'min_size>=31' leaves out 2 of 4 records; 1 have no number in 'min_size', and stay",
    ]
    assert len(list((tmp_path / "index").glob("sizes-*.npy"))) == 1
    lines.clear()
    TarSource(shards=str(tmp_path / "a.tar"), size=16, held_out=1, filters="min_size>=31").open(
        0, tmp_path / "index", lines.append
    )
    assert len(lines) == 1, "headers are read once"


def test_filters_of_a_folder_read_metadata_and_json(tmp_path):
    rows = [{"file_name": f"{i}.png", "text": f"caption {i}", "score": i} for i in range(3)]
    files = {f"{i}.png": image(i) for i in range(4)}
    folder = write(tmp_path / "set", files | {"metadata.jsonl": rows, "3.json": {"caption": "caption 3", "score": "9"}})
    source = FolderSource(folder=str(folder), size=16, held_out=1, filters=("score>=2",))
    dataset = source.open(0, tmp_path / "index", lambda line: None)
    assert sorted(captions(dataset.train) + captions(dataset.held_out)) == ["caption 2", "caption 3"]


@pytest.mark.parametrize("rule", ["width", "width=5", ">5", "width>many", "width>nan", "a b>1", 3, "width>5>6"])
def test_a_rule_that_is_none_is_an_error_with_an_example(rule, tmp_path):
    with pytest.raises(ValueError, match=r"^data.filters .* is not supported; use a field, .* such as 'width>=512'"):
        TarSource(shards="none", size=16, held_out=1, filters=(rule,)).check(4)


# ---- buckets --------------------------------------------------------------------------------------------------------


def test_batches_of_buckets_have_their_shapes_and_sizes(tmp_path):
    """Images of three shapes; one of each cannot be read, and another of its shape is in its place."""
    shapes = [(40, 24), (24, 40), (30, 30)]  # (width, height)
    files = described(31)
    files |= {f"{i}.png": image(i, *shapes[i % 3]) for i in range(31)}
    files |= {f"{i}.png": b"broken" for i in range(3)}
    files["0.json"] = json.dumps({"caption": "caption 0", "width": 41, "height": 24}).encode()
    buckets = ((16, 16), (16, 24), (24, 16), (8, 80))
    dataset, lines = tar(tmp_path, files, buckets=buckets, crop="random", flip=True, repeats=2)
    assert lines[-1] == "images by bucket (height x width): 16 x 16: 11, 16 x 24: 10, 24 x 16: 9, 8 x 80: 0"
    assert dataset.buckets is not None and len(dataset.buckets) == len(dataset.train) == 60
    assert dataset.held_out[0]["image"].shape == (16, 16, 3)
    tokenize = lambda captions: np.array([[int(each.split()[1])] for each in captions])  # noqa: E731
    more: Any = {"buckets": dataset.buckets, "bucket_sizes": dataset.bucket_sizes, "substitutes": dataset.substitutes}
    seen = set()
    for batch in islice(batches(ImageRecords(dataset.train, tokenize), 4, seed=0, **more), 40):
        height, width = batch["image"].shape[1:3]
        seen.add((height, width))
        assert (batch["time_ids"][:, 4:] == (height, width)).all()
        expected = {(24, 16): (40, 24), (16, 24): (24, 40), (16, 16): (30, 30)}[height, width]
        assert (batch["time_ids"][:, :2] == expected).all(), "those in place of broken ones too"
    assert seen == {(16, 16), (16, 24), (24, 16)}
    assert dataset.skipped() == {"ImageError": 3}
    square = tar(tmp_path, files)[0]
    differs = {name for name, value in dataset.manifest.items() if square.manifest[name] != value}
    assert differs == {"size", "buckets", "crop", "flip", "repeats"}


# ---- captions -------------------------------------------------------------------------------------------------------


def test_of_several_captions_each_record_has_one_at_random(tmp_path):
    files = described(9, title=[f"title {i}" for i in range(9)], alt=[["one", "", "two"]] * 8 + [None])
    files["0.txt"] = b"text"
    dataset, _ = tar(tmp_path, files, caption_field="title, alt", repeats=40)
    found = [dataset.train[i]["caption"] for i in range(0, len(dataset.train), 8)]
    assert set(found) == {"title 0", "one", "two"} and 5 < found.count("two") < 25
    assert captions(tar(tmp_path, files, caption_field=("title", "alt"), repeats=40)[0].train) == captions(
        dataset.train
    )
    assert captions(tar(tmp_path, files, 1, caption_field="title,alt", repeats=40)[0].train) != captions(dataset.train)
    assert captions(dataset.held_out) == ["title 8"], "what it lacks is no candidate"
    dataset, _ = tar(tmp_path, files, caption_field="txt,title", repeats=20)
    assert set(captions(dataset.train)[::8]) == {"text", "title 0"}, "txt is the text beside the image"
    assert captions(tar(tmp_path, files)[0].train)[0] == "text", "which comes first, if one field is named"


def test_captions_of_metadata_are_chosen_too(tmp_path):
    rows = [{"file_name": f"{name}.png", "short": "cat", "long": ["a cat", "one cat"]} for name in "ab"]
    folder = write(tmp_path / "set", {"a.png": image(0), "b.png": image(1), "metadata.jsonl": rows})
    source = FolderSource(folder=str(folder), size=16, held_out=1, caption_field="short,long", repeats=30)
    dataset = source.open(0, tmp_path / "index", lambda line: None)
    assert set(captions(dataset.train)) == {"cat", "a cat", "one cat"}


@pytest.mark.parametrize("setting", ["", "a,", (), ("a", ""), (3,)])
def test_names_of_captions_that_are_none_are_an_error(setting):
    with pytest.raises(ValueError, match="^data.caption_field .* is not supported; use a name such as caption"):
        caption_fields(setting)


def test_captions_of_nested_fields():
    row = {"a.b": "dotted", "a": {"b": "hidden", "c": [{"d": 1}]}, "e": {"f": ["x", b"y", 3, " "]}}
    assert find_captions(row, ["a.b", "e.f"], "it") == ["dotted", "x", "y"]
    with pytest.raises(ValueError, match="^it has no text 'a.c.d' or 'e.g'; set --config.data.caption_field$"):
        find_captions(row, ["a.c.d", "e.g"], "it")


# ---- what cannot be read --------------------------------------------------------------------------------------------


def test_too_many_unreadable_records_are_an_error_with_causes_and_examples(tmp_path, monkeypatch):
    monkeypatch.setattr(substitutes, "MIN_READ", 60)
    files = described(20)
    files |= {"3.png": b"broken", "5.json": b"{}", "7.png": b"broken"}
    del files["9.json"]
    files["9.txt"] = b"\xff"
    dataset, lines = tar(tmp_path, files, max_skipped=0.1)
    reader = batches(dataset.train, 4, seed=0, substitutes=dataset.substitutes)
    with pytest.raises(
        ValueError,
        match=r"^data.shards: [12]\d\.\d% of 6\d records could not be read, more than data.max_skipped 10.0% \(2 "
        r"ImageError, 1 (CaptionError|TextError), 1 (CaptionError|TextError)\); record .*; record .*; record .*; "
        "fetch the shards again, or raise data.max_skipped$",
    ) as caught:
        for _ in range(20):
            next(reader)
    assert "\n" not in str(caught.value)
    assert sum("cannot be read" in line for line in lines) == 4 and sum(dataset.skipped().values()) == 4
    dataset, lines = tar(tmp_path, files, max_skipped=0.3)
    assert len(list(islice(batches(dataset.train, 4, seed=0, substitutes=dataset.substitutes), 25))) == 25
    assert dataset.strict[4]["caption"] == "caption 4" and len(dataset.strict) == 19
    with pytest.raises(UnreadableRecord, match="^record 5 .*a.tar, byte .*: CaptionError$") as unreadable:
        dataset.strict[5]
    assert "has no text 'caption'" in str(unreadable.value.__cause__)


def test_a_copy_elsewhere_leaves_counting_to_the_original():
    lines: list[str] = []

    def read(number: int) -> int:
        if number == 2:
            raise OSError("gone")
        return number

    ours = Substitutes(5, str, lines.append, ("data.shards", "repair them"))
    copy = cloudpickle.loads(cloudpickle.dumps(ours))
    value, failures = copy.read(2, read)
    assert value != 2 and failures == ((2, "OSError: gone"),) and ours.counts() == {} and not lines
    ours.count(5, [failures, failures])
    assert ours.counts() == {"OSError": 1} and len(lines) == 1
    assert copy.read(2, read) == (value, failures), "each time, so that none is lost with the batch it was in"
