"""Tar shards: pixels and captions of records, skipped members and their counts, and hostile archives."""

import io
import json
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lcm_jax.data.batches import ImageRecords
from lcm_jax.data.captioned import SourceError
from lcm_jax.data.loader import batches
from lcm_jax.data.prepared import Preparation, PreparedImages
from lcm_jax.data.tar_shards import TarShards, TarSource, expand, index_shards


def image(seed: int, width: int = 24, height: int = 16, kind: str = "PNG", mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


def member(name: str, data: bytes = b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def write(path: Path, members, form=tarfile.GNU_FORMAT, end: bytes = b"\0" * 1024) -> str:
    """A tar of headers and data, whatever they claim."""
    parts = [info.tobuf(form) + data + b"\0" * (-len(data) % 512) for info, data in members]
    path.write_bytes(b"".join(parts) + end)
    return str(path)


def pair(key: str, seed: int, caption: str | None = None) -> list:
    return [member(f"{key}.png", image(seed)), member(f"{key}.txt", (caption or f"caption {seed}").encode())]


def read(path: str | list[str], size: int = 8, seed: int = 0, field: str = "caption") -> tuple[Any, list[str]]:
    """(records of random squares, lines of the log)"""
    lines: list[str] = []
    stored = TarShards(index_shards([path] if isinstance(path, str) else path, log=lines.append), [field])
    preparation = Preparation(((size, size),), seed, random_crop=True)
    failure = ("data.shards", "fetch the shards again")
    return PreparedImages(stored, np.arange(len(stored)), preparation, lines.append, failure), lines


def test_records_of_every_kind(tmp_path):
    long = "folder/" + "x" * 150
    shard = write(
        tmp_path / "a.tar",
        [
            member("folder", type=tarfile.DIRTYPE),
            member("0.png", image(0)),
            member("0.txt", b" a red circle\n"),
            member("1.2.jpg", image(1, kind="JPEG")),
            member("1.json", b'{"caption": "by json"}'),  # 1 and 2.jpg
            member("2.WebP", image(2, kind="WEBP")),
            member("2.json", json.dumps({"caption": "ä"}).encode()),
            member("3.txt", b"grey"),
            member("3.jpeg", image(3, kind="JPEG", mode="L")),  # the caption first
            member(f"{long}.png", image(4, mode="RGBA")),
            member(f"{long}.txt", b"long"),
            member("5.png", image(5)),
            member("5.json", b'{"caption": "json"}'),
            member("5.txt", b"plain"),
            member("6.png", image(6)),
            member("7.txt", b"no image"),
        ],
    )
    source, lines = read(shard)
    assert [source.caption(i) for i in range(len(source))] == ["a red circle", "ä", "grey", "long", "plain"]
    for record in (source[i] for i in range(len(source))):
        assert record["image"].shape == (8, 8, 3) and record["image"].dtype == np.uint8
        assert record["time_ids"][:2].tolist() == [16, 24], "(height, width), and it is not square"
    assert lines == [
        "5 records in 1 shards; skipped: 1 keys without a caption, 2 keys without an image, "
        "1 members that are neither an image nor a caption"
    ]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_offsets_are_those_of_tarfile(form, tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=form, pax_headers={"comment": "of all members"}) as archive:
        for i in range(3):
            for info, data in pair("ü" * 40 + f"/{'n' * 60}{i}", i):
                archive.addfile(info, io.BytesIO(data))
    source, lines = read(str(path))
    with tarfile.open(path) as archive:
        expected = [(m.offset_data, m.size) for m in archive if m.name.endswith(".png")]
    index = index_shards([str(path)], log=lambda line: None)
    assert [(r["image"], r["image_size"]) for r in index.records] == expected
    assert [source.caption(i) for i in range(3)] == ["caption 0", "caption 1", "caption 2"]
    assert lines == ["3 records in 1 shards"]


def test_the_shorter_side_is_resized_and_a_square_cropped_where_time_ids_say(tmp_path):
    source, _ = read(write(tmp_path / "a.tar", [item for i in range(20) for item in pair(f"{i}", i)]))
    corners = set()
    for i in range(20):
        record = source[i]
        whole = Image.open(io.BytesIO(image(i))).resize((12, 8), Image.Resampling.BILINEAR)
        height, width, top, left, *target = record["time_ids"].astype(int).tolist()
        assert (height, width, top, target) == (16, 24, 0, [8, 8])
        np.testing.assert_array_equal(record["image"], np.asarray(whole)[top : top + 8, left : left + 8])
        np.testing.assert_array_equal(record["image"], source[i]["image"])
        corners.add(left)
    assert corners == set(range(5)), "random, both ends included"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_corrupt_records_are_skipped_counted_and_reported(tmp_path):
    bomb = Image.new("1", (12_000, 12_000))
    file = io.BytesIO()
    bomb.save(file, "PNG")
    members = [item for i in range(6) for item in pair(f"{i}", i)]
    members += [member("bomb.png", file.getvalue()), member("bomb.txt", b"much")]
    members += [member("cut.jpg", image(7, 64, 64, "JPEG")[:600]), member("cut.txt", b"cut")]
    members += [member("gif.png", image(8, kind="GIF")), member("gif.txt", b"another format")]
    members += [member("field.png", image(9)), member("field.json", b'{"text": "another field"}')]
    members += [member("latin.png", image(10)), member("latin.txt", "é".encode("latin-1"))]
    source, lines = read(write(tmp_path / "a.tar", members))
    assert len(source) == 11
    found = [source[i] for i in range(11)]
    good = {record["caption"] for record in found[:6]}
    assert {record["caption"] for record in found} == good, "others of the set stand in"
    assert len({record["caption"] for record in found[6:]}) > 1, "and not always the same one"
    again, _ = read(str(tmp_path / "a.tar"))
    for i in reversed(range(11)):  # in whatever order they are asked for
        np.testing.assert_array_equal(again[i]["image"], found[i]["image"])
    assert source.substitutes.unreadable.keys() == {6, 7, 8, 9, 10}
    reasons = lines[1:]
    assert len(reasons) == 5 and "5 of 11 so far (3 ImageError, 1 CaptionError, 1 TextError)" in reasons[-1]
    expected = ["pixels", "Truncated", "format is unknown", "caption_field", "not UTF-8"]
    for line, reason in zip(reasons, expected, strict=True):
        assert reason in line, line


def test_images_are_upright_and_composited_on_white(tmp_path):
    """A phone's JPEG has its rows as the sensor read them; a PNG with alpha may have any color where it is clear."""
    file = io.BytesIO()
    half = np.zeros((8, 16, 3), np.uint8)
    half[:, :8] = 255  # white on the left as stored; on top once turned
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(half).save(file, "JPEG", exif=exif, quality=95)
    clear = io.BytesIO()
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(clear, "PNG")
    members = [member("0.jpg", file.getvalue()), member("0.txt", b"turned")]
    members += [member("1.png", clear.getvalue()), member("1.txt", b"clear")]
    source, _ = read(write(tmp_path / "a.tar", members))
    assert source[0]["time_ids"][:2].tolist() == [16, 8]
    top = 8 - int(source[0]["time_ids"][2])  # rows of the crop that are white
    assert source[0]["image"].shape == (8, 8, 3)
    assert (source[0]["image"][: max(top - 1, 0)] > 200).all() and (source[0]["image"][top + 1 :] < 55).all()
    assert (source[1]["image"] == 255).all()


def test_captions_in_other_encodings(tmp_path):
    """What Windows editors write; anything else is counted, and a caption that no encoding has."""
    texts = ["ä in UTF-8".encode("utf-8-sig"), "ä in UTF-16".encode("utf-16"), b"\xfe\xff" + "ä".encode("utf-16-be")]
    members = []
    for i, text in enumerate([*texts, "no mark".encode("utf-16-le")]):
        members += [member(f"{i}.png", image(i)), member(f"{i}.txt", text)]
    members += [member("4.png", image(4)), member("4.json", '{"caption": "ä"}'.encode("utf-16"))]
    members += [member("5.png", image(5)), member("5.json", b'{"caption": "\\ud800"}')]
    source, lines = read(write(tmp_path / "a.tar", members))
    assert [source.caption(i) for i in (0, 1, 2, 4)] == ["ä in UTF-8", "ä in UTF-16", "ä", "ä"]
    for i in (3, 5):
        source.caption(i)
    assert "NUL" in lines[1] and "not valid Unicode" in lines[2] and "(2 TextError)" in lines[2]


@pytest.mark.parametrize("ending, unpack", [("gz", "gunzip"), ("bz2", "bunzip2"), ("xz", "unxz")])
def test_a_compressed_shard_is_an_error_with_the_command_that_unpacks_it(ending, unpack, tmp_path):
    path = tmp_path / f"a.tar.{ending}"
    with tarfile.open(path, f"w:{ending}") as archive:
        for info, data in pair("a", 1):
            archive.addfile(info, io.BytesIO(data))
    with pytest.raises(ValueError, match=rf"a.tar.{ending}' is compressed.*`{unpack} .*a.tar.{ending}`"):
        read(str(path))


def test_a_set_without_a_readable_record_is_an_error(tmp_path):
    members = [item for i in range(5) for item in (member(f"{i}.png", b"no image"), member(f"{i}.txt", b"text"))]
    source, _ = read(write(tmp_path / "a.tar", members))
    with pytest.raises(ValueError, match=r"none of 5 records can be read; record \d .*a.tar, byte .*fetch"):
        source[3]


def test_hostile_headers(tmp_path):
    """Links, devices and names that leave the archive are no records; nothing is written, and the rest is read."""
    secret = tmp_path / "secret"
    secret.write_text("not yours")
    hostile = [
        member("link.txt", type=tarfile.SYMTYPE, linkname=str(secret)),
        member("link.png", image(0)),
        member("hard.txt", type=tarfile.LNKTYPE, linkname=str(secret), size=10**9),  # has no content, whatever it says
        member("hard.png", image(0)),
        member("device.txt", type=tarfile.CHRTYPE),
        member("pipe.txt", type=tarfile.FIFOTYPE),
        *pair("/absolute", 1),
        *pair("../above", 2),
        *pair("a/../../b", 3),
        *pair("a\\..\\b", 4),
        member("././@LongLink", b"x" * 120 + b"\0", type=tarfile.GNUTYPE_LONGLINK),
    ]
    before = sorted(tmp_path.rglob("*"))
    source, lines = read(write(tmp_path / "a.tar", [*hostile, *pair("good", 9)]))
    assert len(source) == 1 and source.caption(0) == "caption 9"
    assert "4 links, devices and other members that are not files" in lines[0]
    assert "8 names that leave the archive" in lines[0] and "2 keys without a caption" in lines[0]
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "a.tar"])


def _negative() -> bytes:
    header = bytearray(member("n.png", image(0))[0].tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 11 + b"\x00"  # -256 in base 256
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        (_negative(), "beyond their end"),
        (member("big.png", size=10**7)[0].tobuf(tarfile.GNU_FORMAT), "beyond their end"),
        (member("e", size=2**21, type=tarfile.XHDTYPE)[0].tobuf() + b"\0" * 2**21, "endless name"),
        (b"garbage" * 512, "damaged header"),
        (image(3, 40, 40)[:100], "cut short"),
        (b"", "cut short"),
    ],
)
def test_an_archive_ends_where_it_stops_making_sense(tail, reason, tmp_path):
    whole = [item for i in range(2) for item in pair(f"{i}", i)]
    write(tmp_path / "a.tar", whole, end=tail)
    source, lines = read([str(tmp_path / "a.tar"), write(tmp_path / "b.tar", pair("b", 5))])
    assert [source.caption(i) for i in range(3)] == ["caption 0", "caption 1", "caption 5"], "the next shard is whole"
    assert reason in lines[0] and "1 archives" in lines[0]


def test_a_pax_header_may_claim_anything(tmp_path):
    for size in ("-1", "99999999999", "many"):
        info, data = pair("a", 1)[0]
        claim = f"size={size}\n"
        line = f"{len(claim) + 3} {claim}".encode()
        write(tmp_path / "a.tar", [*pair("0", 0), member("x", line, type=tarfile.XHDTYPE), (info, data)])
        source, lines = read(str(tmp_path / "a.tar"))
        assert len(source) == 1 and "the rest of them" in lines[0]


def test_a_shard_that_changes_under_a_run_is_an_error_not_another_record(tmp_path):
    shard = Path(write(tmp_path / "a.tar", [item for i in range(3) for item in pair(f"{i}", i)]))
    source, _ = read(str(shard))
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(SourceError, match="shorter since it was indexed"):
        source[2]
    shard.unlink()
    with pytest.raises(SourceError, match="cannot be read.*No such file"):
        source[0]


def test_patterns(tmp_path):
    for i in (8, 9, 10):
        write(tmp_path / f"{i:03d}.tar", pair("a", i))
    names = [str(tmp_path / f"{i:03d}.tar") for i in (8, 9, 10)]
    assert expand(str(tmp_path / "{008..010}.tar")) == expand(str(tmp_path / "*.tar")) == names
    assert expand((names[2], str(tmp_path / "{008..009}.t*"))) == [names[2], *names[:2]]
    for pattern, message in [
        ("{008..012}.tar", "2 of 5 files are missing, first .*011.tar"),
        ("*.tgz", "matches no file"),
        ("none.tar", "1 of 1 files are missing"),
        ("{2..1}.tar", "matches no file"),
    ]:
        with pytest.raises(ValueError, match=message):
            expand(str(tmp_path / pattern))
    with pytest.raises(ValueError, match="data.shards is empty"):
        expand(())


def test_a_set_without_a_record_is_an_error_that_counts_what_was_skipped(tmp_path):
    with pytest.raises(ValueError, match="no record in 1 files.*2 members that are neither.*each a key.jpg"):
        read(write(tmp_path / "a.tar", [member("a.cls", b"1"), member("b.cls", b"2")]))


def test_the_index_is_kept_and_notices_another_shard(tmp_path):
    shard, lines = write(tmp_path / "a.tar", pair("a", 1)), []
    first = index_shards([shard], tmp_path / "index", lines.append)
    again = index_shards([shard], tmp_path / "index", lines.append)
    np.testing.assert_array_equal(first.records, again.records)
    assert len(lines) == 1, "the headers were read once"
    write(tmp_path / "a.tar", [*pair("a", 1), *pair("b", 2)])
    assert len(index_shards([shard], tmp_path / "index", lines.append).records) == 2


def test_what_is_held_out_is_a_set_of_its_own(tmp_path):
    members = [item for i in range(9) for item in pair(f"{i}", i)]
    members[14] = member("7.png", b"no image")
    shard = write(tmp_path / "a.tar", members)
    dataset = TarSource(shards=shard, size=8, held_out=3).open(0, tmp_path / "index", lambda line: None)
    train, held_out = dataset.train, dataset.held_out
    assert {train[i]["caption"] for i in range(6)} == {f"caption {i}" for i in range(6)}
    assert {held_out[i]["caption"] for i in range(3)} == {"caption 6", "caption 8"}


@pytest.mark.parametrize("first", [1, 5, 9])
def test_a_resumed_reader_continues_exactly_with_a_corrupt_record(first, tmp_path):
    members = [item for i in range(11) for item in pair(f"{i}", i)]
    members[6] = member("3.png", b"no image")
    shards = [write(tmp_path / "0.tar", members[:8]), write(tmp_path / "1.tar", members[8:])]
    tokenize = lambda captions: np.array([[int(c.split()[1])] for c in captions])  # noqa: E731
    read_from = lambda step: batches(ImageRecords(read(shards)[0], tokenize), 4, seed=1, first=step, threads=3)  # noqa: E731
    whole = list(islice(read_from(0), first + 4))
    for expected, found in zip(whole[first:], read_from(first), strict=False):
        assert found["image"].shape == (4, 8, 8, 3) and found["token_ids"].dtype == np.int32
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)
