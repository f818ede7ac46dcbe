"""Captioned pictures in tar shards as webdataset lays them out: `key.jpg|jpeg|png|webp` and `key.txt` or `key.json`.

The headers are read once; after that a record is one `pread` of its picture and one of its caption. Nothing is ever
extracted, so that no name in an archive can reach a path, and any record can be had at any time, in any order.
"""

import glob
import hashlib
import io
import json
import math
import os
import re
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from lcm_jax.data import images, text

PICTURES = ("jpg", "jpeg", "png", "webp")
BLOCK = 512  # bytes; everything in a tar begins at a multiple of it
LONGEST_MEMBER = 2**28  # bytes of a picture or a caption; a longer one is no picture of a training set
LONGEST_NAME = 2**20  # bytes of an extended header
MOST_PIXELS = 2**26  # of a picture before it is shrunk: a small file can unpack to more than the memory holds
TRIES = 1000  # records in place of an unreadable one before the set counts as unreadable
COMPRESSED = {  # by a pattern of a file's first bytes, which a name in a tar does not begin with: how it is unpacked
    rb"\x1f\x8b": "gunzip",
    rb"BZh[1-9]1AY&SY": "bunzip2",
    rb"\xfd7zXZ\x00": "unxz",
    rb"\x28\xb5\x2f\xfd": "unzstd",
}

# Kinds of members: those that speak of the member after them, and those without content whatever their size says.
EXTENSIONS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
EMPTY = (tarfile.DIRTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)

# The place of a record's two members, in bytes of its shard; `plain` is a caption of plain text, not JSON.
RECORD = np.dtype(
    [
        ("shard", "<i4"),
        ("picture", "<i8"),
        ("picture_size", "<i4"),
        ("caption", "<i8"),
        ("caption_size", "<i4"),
        ("plain", "?"),
    ]
)


class ShardError(ValueError):
    """A shard that can no longer be read. No record stands in for one of it: after a resume it would be another."""


class Index(NamedTuple):
    """Where every record lies. shards: file names; records: RECORD[N], in the order of the shards."""

    shards: tuple[str, ...]
    records: np.ndarray


def expand(patterns: str | Sequence[str]) -> list[str]:
    """`{00000..00015}` counts, with the zeros of its first number; `*`, `?` and `[..]` match files, in order of name.

    Raises ValueError where a pattern matches nothing or a file that it names is missing.
    """
    found: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        named = list(_count(pattern))
        files = [file for name in named for file in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])]
        if missing := [file for file in files if not os.path.isfile(file)]:
            raise ValueError(
                f"data.shards {pattern!r}: {len(missing)} of {len(files)} files are missing, first {missing[0]!r}; "
                "give the path of the shards, such as data/{00000..00015}.tar or data/*.tar"
            )
        if not files:
            raise ValueError(
                f"data.shards {pattern!r} matches no file; give the path of the shards, such as "
                "data/{00000..00015}.tar or data/*.tar"
            )
        found += files
    if not found:
        raise ValueError("data.shards is empty; give the path of the shards, such as data/{00000..00015}.tar")
    return found


def _count(pattern: str) -> Iterator[str]:
    span = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if span is None:
        yield pattern
        return
    for number in range(int(span[1]), int(span[2]) + 1):
        yield from _count(f"{pattern[: span.start()]}{number:0{len(span[1])}d}{pattern[span.end() :]}")


# ---- the headers ----------------------------------------------------------------------------------------------------


def members(file: int, length: int, skipped: Counter) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of the plain files in the tar open as `file`, `length` bytes long.

    Every other member is skipped and counted in `skipped` by its reason. A header that cannot be right, or a member
    that is longer than the archive, ends the archive there: what follows has no known place.
    """
    position, longer = 0, {}
    while True:
        block = os.pread(file, BLOCK, position)
        if len(block) < BLOCK:
            skipped["archives cut short"] += 1  # a whole one ends with blocks of zeros
            return
        if not block.strip(b"\0"):
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            size = int(longer.get("size", header.size))
        except (tarfile.HeaderError, ValueError):
            skipped["archives with a damaged header, the rest of them"] += 1
            return
        start, kind = position + BLOCK, header.type
        holds = 0 if kind in EMPTY else size
        if holds < 0 or start + holds > length:
            skipped["archives with a member beyond their end, the rest of them"] += 1
            return
        position = start + -(-holds // BLOCK) * BLOCK
        if kind in EXTENSIONS:
            if size > LONGEST_NAME:
                skipped["archives with an endless name, the rest of them"] += 1
                return
            if kind != tarfile.XGLTYPE:  # what is said of all members names none of them
                longer |= _extension(kind, os.pread(file, size, start))
            continue
        name, longer = str(longer.get("path", header.name)), {}
        if kind not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            if kind != tarfile.DIRTYPE:
                skipped["links, devices and other members that are no files"] += 1
        elif name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or "\0" in name:
            skipped["names that leave the archive"] += 1
        elif size > LONGEST_MEMBER:
            skipped[f"members of more than {LONGEST_MEMBER >> 20} MiB"] += 1
        else:
            yield name, start, size


def _extension(kind: bytes, data: bytes) -> dict[str, str]:
    """What a GNU or pax header says of the member after it."""
    text = data.decode("utf-8", "surrogateescape")
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": text.rstrip("\0")}
    if kind == tarfile.GNUTYPE_LONGLINK:
        return {}
    found = {}
    while match := re.match(rb"(\d{1,7}) ([^=]+)=", data):  # "<length of the line> key=value\n"
        line, data = data[: int(match[1])], data[int(match[1]) :]
        if len(line) <= match.end() or match[2] not in (b"path", b"size"):
            if not int(match[1]):
                break
            continue
        found[match[2].decode()] = line[match.end() : -1].decode("utf-8", "surrogateescape")
    return found


def index_shards(shards: Sequence[str], cache: Path | None = None, say: Callable[[str], None] = print) -> Index:
    """Reads the headers of `shards`; `say` gets a line on whatever was skipped.

    cache: a folder that keeps the result under a digest of the shards' names, lengths and times; a set of millions
    takes minutes to index. Raises ValueError where no record is left, or a shard is compressed.
    """
    about = [(os.path.abspath(shard), os.stat(shard)) for shard in shards]
    identity = [(path, status.st_size, status.st_mtime_ns) for path, status in about]
    key = hashlib.sha256(json.dumps(["1", identity]).encode()).hexdigest()[:16]
    kept = None if cache is None else Path(cache) / f"{key}.npy"
    if kept is not None and kept.exists():
        return Index(tuple(shards), np.load(kept))
    skipped: Counter = Counter()
    parts = []
    for number, shard in enumerate(shards):
        file = os.open(shard, os.O_RDONLY)
        try:
            _check_uncompressed(shard, os.pread(file, BLOCK, 0))
            parts.append(_records(number, members(file, os.fstat(file).st_size, skipped), skipped))
        finally:
            os.close(file)
    records = np.concatenate(parts)
    told = ", ".join(f"{count} {what}" for what, count in sorted(skipped.items()))
    if not len(records):
        raise ValueError(
            f"data.shards has no record in {len(shards)} files, first {shards[0]!r} (skipped: {told or 'nothing'}); "
            f"a record is a key.{'|'.join(PICTURES)} beside a key.txt or key.json"
        )
    say(f"{len(records)} records in {len(shards)} shards{f'; skipped: {told}' if told else ''}")
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_suffix(f".part-{os.getpid()}")
        with temporary.open("wb") as file:
            np.save(file, records)
        os.replace(temporary, kept)
    return Index(tuple(shards), records)


def _check_uncompressed(shard: str, head: bytes) -> None:
    for beginning, unpack in COMPRESSED.items():
        if re.match(beginning, head):
            raise ValueError(
                f"data.shards: {shard!r} is compressed, so that its records have no place to be read from; unpack it "
                f"with `{unpack} {shard}` and name the .tar file"
            )


def _records(shard: int, found: Iterator[tuple[str, int, int]], skipped: Counter) -> np.ndarray:
    """Members of one shard -> RECORD[n]: those that share a key, the name up to the first dot of its last part."""
    keyed: dict[str, dict[str, tuple[int, int]]] = {}
    for name, start, size in found:
        match = re.fullmatch(r"((?:.*/)?[^./][^./]*)\.([^/]+)", name, re.DOTALL)
        ending = match[2].lower() if match else ""
        part = "picture" if ending in PICTURES else ending if ending in ("txt", "json") else None
        if part is None:
            skipped["members that are neither a picture nor a caption"] += 1
        elif part in keyed.setdefault(match[1], {}):
            skipped["members whose key had one already"] += 1
        else:
            keyed[match[1]][part] = (start, size)
    rows = []
    for parts in keyed.values():
        caption = parts.get("txt", parts.get("json"))
        if caption is None or "picture" not in parts:
            skipped["keys without a caption" if "picture" in parts else "keys without a picture"] += 1
        else:
            rows.append((shard, *parts["picture"], *caption, "txt" in parts))
    return np.array(rows, RECORD)


# ---- the records ----------------------------------------------------------------------------------------------------


class TarShards:
    """Random access to {"image": uint8[size,size,3], "caption": str, "time_ids": float32[6]}.

    As the published scripts do it, the shorter side is resized to `size` with Pillow's bilinear filter, which averages
    where it shrinks, and a random square is cropped: the one that (seed, record) choose, in every epoch. time_ids are
    what SDXL is told: (height, width) of the picture as stored, (top, left) of the crop, (size, size).

    A record that cannot be read is counted, told to `say` and replaced by another, always the same one, so that the
    order stays a function of the number of the record. Raises ValueError where none can be read.
    """

    def __init__(self, index: Index, size: int, seed: int = 0, caption_field: str = "caption", say=print):
        self.index, self.size, self.seed, self.caption_field = index, size, seed, caption_field
        self.unreadable: dict[int, str] = {}  # why, by number
        self._causes: Counter = Counter()  # of these, by the kind of error
        self._say, self._lock = say, threading.Lock()

    def __len__(self) -> int:
        return len(self.index.records)

    def __getitem__(self, i: int) -> dict:
        return self._readable(i, self._read)

    def caption(self, i: int) -> str:
        """The caption of record i alone; its picture is not read."""
        return self._readable(i, self._caption)

    def part(self, first: int, last: int) -> "TarShards":
        """Records first..last-1 as a set of their own, none of which stands in for one of another part."""
        if not 0 <= first < last <= len(self):
            raise ValueError(f"there are {len(self)} records, none of {first} to {last - 1}; lower data.held_out")
        index = Index(self.index.shards, self.index.records[first:last])
        return TarShards(index, self.size, self.seed, self.caption_field, self._say)

    @property
    def identity(self) -> str:
        """A digest of all that decides the records: places, shards' names and lengths, size, seed."""
        shards = [(shard, os.path.getsize(shard)) for shard in self.index.shards]
        pixels = "upright, on white"  # another word for another way to make them, so that caches are made anew
        about = json.dumps([shards, self.size, self.seed, self.caption_field, pixels])
        return hashlib.sha256(about.encode() + self.index.records.tobytes()).hexdigest()

    def _readable(self, i: int, read: Callable):
        total = len(self)
        if not 0 <= i < total:
            raise IndexError(f"record {i} of {total}")
        # Far apart, so that one damaged shard does not repeat the record behind it; coprime, so that all have a turn.
        stride = next(s for s in range(int(0.618 * total), 2 * total + 2) if math.gcd(s, total) == 1)
        for attempt in range(min(total, TRIES)):
            number = (i + attempt * stride) % total
            if number in self.unreadable:
                continue
            try:
                return read(number)
            except ShardError:
                raise
            except Exception as error:  # Pillow's decoders raise many kinds; every one of them is reported
                self._report(number, f"{type(error).__name__}: {error}".splitlines()[0])
        number, reason = next(iter(self.unreadable.items()))
        raise ValueError(
            f"data.shards: none of {min(total, TRIES)} records can be read, first {self._name(number)} ({reason}); "
            "fetch the shards again"
        )

    def _report(self, number: int, reason: str) -> None:
        with self._lock:
            if number in self.unreadable:
                return
            self.unreadable[number] = reason
            self._causes[reason.split(":")[0]] += 1
            count, causes = len(self.unreadable), ", ".join(f"{n} {kind}" for kind, n in self._causes.most_common())
        if count <= 10 or count % 100 == 0:
            self._say(
                f"{self._name(number)} cannot be read ({reason}); skipped, as are {count} of {len(self)} so far "
                f"({causes})"
            )

    def _name(self, number: int) -> str:
        record = self.index.records[number]
        return f"record {number} ({self.index.shards[record['shard']]}, byte {record['picture']})"

    def _bytes(self, record, part: str) -> bytes:
        shard, size = self.index.shards[record["shard"]], int(record[f"{part}_size"])
        try:
            file = os.open(shard, os.O_RDONLY)
            try:
                data = os.pread(file, size, int(record[part]))
            finally:
                os.close(file)
        except OSError as error:
            raise ShardError(f"shard {shard} cannot be read ({error}); start again when it can") from error
        if len(data) != size:
            raise ShardError(f"shard {shard} has become shorter since it was indexed; start again to index it anew")
        return data

    def _caption(self, number: int) -> str:
        record = self.index.records[number]
        content = text.decode(self._bytes(record, "caption"), "the caption")
        if record["plain"]:
            return content.strip()
        fields = json.loads(content)
        if not isinstance(fields, Mapping) or not isinstance(fields.get(self.caption_field), str):
            raise ValueError(f"its JSON has no text {self.caption_field!r}; data.caption_field names another")
        return text.check_unicode(fields[self.caption_field], "the caption").strip()

    def _read(self, number: int) -> dict:
        caption = self._caption(number)
        data = self._bytes(self.index.records[number], "picture")
        stored = images.open_upright(io.BytesIO(data), ("JPEG", "PNG", "WEBP"), MOST_PIXELS)
        picture = images.to_rgb(stored)
        width, height = picture.size
        short = min(width, height)
        resized = (self.size * width // short, self.size * height // short)
        if max(resized) > MOST_PIXELS // self.size:
            raise images.ImageError(f"{width} x {height} pixels are too long a strip")
        picture = picture.resize(resized, Image.Resampling.BILINEAR)
        rng = np.random.default_rng([self.seed, number])
        top, left = (int(rng.integers(side - self.size + 1)) for side in resized[::-1])
        picture = picture.crop((left, top, left + self.size, top + self.size))
        sizes = np.array([height, width, top, left, self.size, self.size], np.float32)
        return {"image": np.asarray(picture), "caption": caption, "time_ids": sizes}


class Tokenized:
    """A source's records with token_ids in place of captions, as a step takes them that encodes its own pictures."""

    def __init__(self, source, tokenize: Callable[[list[str]], np.ndarray]):
        self.source, self.tokenize = source, tokenize

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        record = self.source[i]
        token_ids = np.asarray(self.tokenize([record["caption"]])[0], np.int32)
        return {"image": record["image"], "token_ids": token_ids, "time_ids": record["time_ids"]}
