"""Captioned images in tar shards of the webdataset layout: `key.jpg|jpeg|png|webp` and `key.txt` or `key.json`.

The headers are read once; after that a record is one `pread` of its image and one of its caption. Nothing is ever
extracted, so that no name in an archive can become a path, and records can be read in any order.
"""

import glob
import hashlib
import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lcm_jax.data import images
from lcm_jax.data.captioned import CaptionedDataset, parse_caption
from lcm_jax.data.substitutes import Substitutes
from lcm_jax.files import whole_file

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
REMEDY = "set --config.data.shards to the shards, such as data/{00000..00015}.tar or data/*.tar"
BLOCK = 512  # bytes; everything in a tar begins at a multiple of it
MAX_MEMBER_BYTES = 2**28  # an image or a caption; images of training sets are smaller
MAX_NAME_BYTES = 2**20  # an extended header
COMPRESSED = {  # pattern of a file's first bytes, with which no name in a tar begins -> the command that unpacks it
    rb"\x1f\x8b": "gunzip",
    rb"BZh[1-9]1AY&SY": "bunzip2",
    rb"\xfd7zXZ\x00": "unxz",
    rb"\x28\xb5\x2f\xfd": "unzstd",
}

# Kinds of members: those that describe the member after them, and those without content whatever their size field is.
EXTENSIONS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
EMPTY = (tarfile.DIRTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)

# Offsets and sizes of a record's two members in its shard, in bytes; `plain`: the caption is plain text, not JSON.
RECORD = np.dtype(
    [
        ("shard", "<i4"),
        ("image", "<i8"),
        ("image_size", "<i4"),
        ("caption", "<i8"),
        ("caption_size", "<i4"),
        ("plain", "?"),
    ]
)


class ShardError(ValueError):
    """A shard that can no longer be read. No other record replaces its records: a resumed run would replace others."""


class Index(NamedTuple):
    """The place of every record. shards: file names; records: RECORD[N], in the order of the shards."""

    shards: tuple[str, ...]
    records: np.ndarray


def expand(patterns: str | Sequence[str]) -> list[str]:
    """Return the files that patterns name: `{00000..00015}` counts, padded with zeros like its first number; `*`, `?`
    and `[..]` match files, in order of name.

    Raises ValueError if a pattern matches nothing or names a file that is missing.
    """
    shards: list[str] = []
    if not patterns:
        raise ValueError(f"data.shards is empty; {REMEDY}")
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        named = list(_count(pattern))
        files = [file for name in named for file in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])]
        if missing := [file for file in files if not os.path.isfile(file)]:
            raise ValueError(
                f"data.shards {pattern!r}: {len(missing)} of {len(files)} files are missing, first {missing[0]!r}; "
                f"{REMEDY}"
            )
        if not files:
            raise ValueError(f"data.shards {pattern!r} matches no file; {REMEDY}")
        shards += files
    return shards


def _count(pattern: str) -> Iterator[str]:
    span = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if span is None:
        yield pattern
        return
    for number in range(int(span[1]), int(span[2]) + 1):
        yield from _count(f"{pattern[: span.start()]}{number:0{len(span[1])}d}{pattern[span.end() :]}")


# ---- the headers ----------------------------------------------------------------------------------------------------


def members(file: int, length: int, skipped: Counter) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, size) of the plain files in the tar open as `file`, `length` bytes long.

    Other members are skipped and counted in `skipped` by reason. An invalid header, or a member that is longer than the
    archive, ends the archive there: the place of the next header is unknown.
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
        stored = 0 if kind in EMPTY else size
        if stored < 0 or start + stored > length:
            skipped["archives with a member beyond their end, the rest of them"] += 1
            return
        position = start + -(-stored // BLOCK) * BLOCK
        if kind in EXTENSIONS:
            if size > MAX_NAME_BYTES:
                skipped["archives with an endless name, the rest of them"] += 1
                return
            if kind != tarfile.XGLTYPE:  # a global header names no member
                longer |= _extension(kind, os.pread(file, size, start))
            continue
        name, longer = str(longer.get("path", header.name)), {}
        if kind not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            if kind != tarfile.DIRTYPE:
                skipped["links, devices and other members that are not files"] += 1
        elif name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or "\0" in name:
            skipped["names that leave the archive"] += 1
        elif size > MAX_MEMBER_BYTES:
            skipped[f"members of more than {MAX_MEMBER_BYTES >> 20} MiB"] += 1
        else:
            yield name, start, size


def _extension(kind: bytes, data: bytes) -> dict[str, str]:
    """Return the fields "path" and "size" that a GNU or pax header has for the member after it."""
    text = data.decode("utf-8", "surrogateescape")
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": text.rstrip("\0")}
    if kind == tarfile.GNUTYPE_LONGLINK:
        return {}
    fields = {}
    while match := re.match(rb"(\d{1,7}) ([^=]+)=", data):  # "<length of the line> key=value\n"
        line, data = data[: int(match[1])], data[int(match[1]) :]
        if len(line) <= match.end() or match[2] not in (b"path", b"size"):
            if not int(match[1]):
                break
            continue
        fields[match[2].decode()] = line[match.end() : -1].decode("utf-8", "surrogateescape")
    return fields


def index_shards(shards: Sequence[str], cache: Path | None = None, log: Callable[[str], None] = print) -> Index:
    """Read the headers of `shards`. log: is called with a line that counts the records and whatever was skipped.

    cache: a folder that keeps the result under a digest of the shards' names, lengths and times; indexing millions of
    records takes minutes. Raises ValueError if there is no record, or a shard is compressed.
    """
    status = [(os.path.abspath(shard), os.stat(shard)) for shard in shards]
    fingerprint = [(path, each.st_size, each.st_mtime_ns) for path, each in status]
    key = hashlib.sha256(json.dumps(["2", fingerprint]).encode()).hexdigest()[:16]
    stored = None if cache is None else Path(cache) / f"{key}.npy"
    if stored is not None and stored.exists():
        return Index(tuple(shards), np.load(stored))
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
    summary = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
    if not len(records):
        raise ValueError(
            f"data.shards has no record in {len(shards)} files, first {shards[0]!r} (skipped: {summary or 'nothing'}); "
            f"use shards of records, each a key.{'|'.join(IMAGE_EXTENSIONS)} beside a key.txt or key.json"
        )
    log(f"{len(records)} records in {len(shards)} shards{f'; skipped: {summary}' if summary else ''}")
    if stored is not None:
        stored.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(stored) as temporary, temporary.open("wb") as file:
            np.save(file, records)
    return Index(tuple(shards), records)


def _check_uncompressed(shard: str, head: bytes) -> None:
    for beginning, unpack in COMPRESSED.items():
        if re.match(beginning, head):
            raise ValueError(
                f"data.shards {shard!r} is compressed, which does not allow reading single records; unpack it with "
                f"`{unpack} {shard}` and use the .tar file"
            )


def _records(shard: int, files: Iterator[tuple[str, int, int]], skipped: Counter) -> np.ndarray:
    """Pair the members of one shard -> RECORD[n]. Their key is the name up to the first dot of its last part."""
    keyed: dict[str, dict[str, tuple[int, int]]] = {}
    for name, start, size in files:
        match = re.fullmatch(r"((?:.*/)?[^./][^./]*)\.([^/]+)", name, re.DOTALL)
        key, ending = (match[1], match[2].lower()) if match else ("", "")
        part = "image" if ending in IMAGE_EXTENSIONS else ending if ending in ("txt", "json") else None
        if part is None:
            skipped["members that are neither an image nor a caption"] += 1
        elif part in keyed.setdefault(key, {}):
            skipped["members whose key had one already"] += 1
        else:
            keyed[key][part] = (start, size)
    rows = []
    for parts in keyed.values():
        caption = parts.get("txt", parts.get("json"))
        if caption is None or "image" not in parts:
            skipped["keys without a caption" if "image" in parts else "keys without an image"] += 1
        else:
            rows.append((shard, *parts["image"], *caption, "txt" in parts))
    return np.array(rows, RECORD)


# ---- the records ----------------------------------------------------------------------------------------------------


class TarShards:
    """Random access to {"image": uint8[size, size, 3], "caption": str, "time_ids": float32[6]}.

    As in the published scripts, the shorter side is resized to `size` with Pillow's bilinear filter, which averages
    when it shrinks, and a random square is cropped, which (seed, record) determine in every epoch. time_ids are SDXL's
    sizes: (height, width) of the upright image as stored, (top, left) of the crop, (size, size).

    A record that cannot be read is counted, reported to `log` and replaced by another, always the same one, so that
    record i stays a function of i. Raises ValueError if none can be read, and ShardError.
    """

    def __init__(self, index: Index, size: int, seed: int = 0, caption_field: str = "caption", log=print):
        self.index, self.size, self.seed, self.caption_field = index, size, seed, caption_field
        failure = ("data.shards", "fetch the shards again")
        self.substitutes = Substitutes(len(index.records), self._name, log, failure, (ShardError,))
        self._log = log

    def __len__(self) -> int:
        return len(self.index.records)

    def __getitem__(self, i: int) -> dict:
        return self.substitutes.read(i, self._read)

    def caption(self, i: int) -> str:
        """Return the caption of record i without reading its image."""
        return self.substitutes.read(i, self._caption)

    def part(self, first: int, last: int) -> "TarShards":
        """Return records first..last-1 as a set of their own: unreadable ones are replaced by records of this part."""
        if not 0 <= first < last <= len(self):
            raise ValueError(f"records {first} to {last - 1} are not among the {len(self)} of this set")
        index = Index(self.index.shards, self.index.records[first:last])
        return TarShards(index, self.size, self.seed, self.caption_field, self._log)

    @property
    def fingerprint(self) -> str:
        """Digest of everything that determines the records: their places, the shards' names and lengths, size, seed."""
        shards = [(shard, os.path.getsize(shard)) for shard in self.index.shards]
        pixels = "upright, on white"  # change it with the way pixels are made, so that caches are encoded again
        settings = json.dumps([shards, self.size, self.seed, self.caption_field, pixels])
        return hashlib.sha256(settings.encode() + self.index.records.tobytes()).hexdigest()

    def _name(self, number: int) -> str:
        record = self.index.records[number]
        return f"record {number} ({self.index.shards[record['shard']]}, byte {record['image']})"

    def _bytes(self, record, part: str) -> bytes:
        shard, size = self.index.shards[record["shard"]], int(record[f"{part}_size"])
        try:
            file = os.open(shard, os.O_RDONLY)
            try:
                data = os.pread(file, size, int(record[part]))
            finally:
                os.close(file)
        except OSError as error:
            raise ShardError(
                f"shard {shard} cannot be read ({error}); make it readable and run the same command to resume"
            ) from error
        if len(data) != size:
            raise ShardError(
                f"shard {shard} has become shorter since it was indexed; run the same command to index it again"
            )
        return data

    def _caption(self, number: int) -> str:
        record = self.index.records[number]
        return parse_caption(self._bytes(record, "caption"), None if record["plain"] else self.caption_field)

    def _read(self, number: int) -> dict:
        caption = self._caption(number)
        data = self._bytes(self.index.records[number], "image")
        image = images.to_rgb(images.open_upright(io.BytesIO(data), ("JPEG", "PNG", "WEBP"), images.MAX_PIXELS))
        rng = np.random.default_rng([self.seed, number])
        pixels, sizes = images.crop_square(image, self.size, rng)
        return {"image": pixels, "caption": caption, "time_ids": sizes}


# ---- the source -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TarSource:
    """The source `tar`: `shards` of captioned images, of which the last `held_out` records are not trained on.

    size: of the images in pixels. caption_field: of a key.json, if there is no key.txt.
    """

    shards: str | Sequence[str]
    caption_field: str
    size: int
    held_out: int

    def check(self, batch_size: int) -> None:
        expand(self.shards)

    def open(self, seed: int, folder: Path, log: Callable[[str], None]) -> CaptionedDataset:
        index = index_shards(expand(self.shards), folder, log)
        every = TarShards(index, self.size, seed, self.caption_field, log)
        count = len(every) - self.held_out
        if count < 1:
            raise ValueError(
                f"data.held_out {self.held_out} leaves none of the {len(every)} records of data.shards to train on; "
                "lower it"
            )
        train, held_out = every.part(0, count), every.part(count, len(every))
        return CaptionedDataset(
            train=train,
            held_out=held_out,
            prompts=lambda n: [held_out[i]["caption"] for i in range(n)],  # of the images that are shown beside them
            compositional_prompts=lambda n: [],
            fingerprint=train.fingerprint,
        )
