"""Captioned images in tar shards of the webdataset layout: `key.jpg|jpeg|png|webp` and `key.txt` or `key.json`.

The headers are read once; after that a record is one `pread` of its image and one of its caption. Nothing is ever
extracted, so that no name in an archive can become a path, and records can be read in any order.
"""

import io
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lcm_jax.data import shard_files
from lcm_jax.data.captioned import CaptionError, SourceError, caption_fields, find_captions, find_field, parse_object
from lcm_jax.data.filters import to_numbers
from lcm_jax.data.prepared import ImageSource
from lcm_jax.data.shard_files import ShardFile
from lcm_jax.data.stored import digest
from lcm_jax.files import check_unicode, decode, whole_file

KEY = "data.shards"
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

# Offsets and sizes of a record's members in its shard, in bytes; the size of a member that it lacks is -1.
RECORD = np.dtype(
    [
        ("shard", "<i4"),
        ("image", "<i8"),
        ("image_size", "<i4"),
        ("txt", "<i8"),
        ("txt_size", "<i4"),
        ("json", "<i8"),
        ("json_size", "<i4"),
    ]
)


class Index(NamedTuple):
    """The place of every record. shards: file names; records: RECORD[N], in the order of the shards; values: float64[N]
    of each JSON field that was asked for; sizes: of the shards in bytes."""

    shards: tuple[str, ...]
    records: np.ndarray
    values: dict[str, np.ndarray]
    sizes: tuple[int, ...]


def expand(patterns: str | Sequence[str]) -> list[str]:
    """Return the shards that patterns name, see `shard_files.expand`. Raises ValueError."""
    return shard_files.expand(patterns, KEY, REMEDY)


# ---- the headers ----------------------------------------------------------------------------------------------------


def members(read: Callable[[int, int], bytes], length: int, skipped: Counter) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, size) of the plain files in a tar of `length` bytes; read(start, size) returns its bytes.

    Other members are skipped and counted in `skipped` by reason. An invalid header, or a member that is longer than the
    archive, ends the archive there: the place of the next header is unknown.
    """
    position, longer = 0, {}
    while True:
        block = read(position, BLOCK)
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
                longer |= _extension(kind, read(start, size))
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


def index_shards(
    shards: Sequence[str], cache: Path | None = None, log: Callable[[str], None] = print, fields: Sequence[str] = ()
) -> Index:
    """Read the headers of `shards`. log: is called with a line that counts the records and whatever was skipped.

    cache: a folder that keeps the result under a digest of the shards' names, lengths and times; indexing millions of
    records takes minutes. fields: of the JSON members, whose numbers the index has. Raises ValueError if there is no
    record, or a shard is compressed.
    """
    files = shard_files.map_threads(lambda shard: ShardFile(shard, KEY), shards)
    sizes = tuple(file.size for file in files)
    key = digest("3", *(file.identity for file in files), *fields)[:16]
    stored = None if cache is None else Path(cache) / f"{key}.npz"
    if stored is not None and stored.exists():
        with np.load(stored) as arrays:
            values = {field: arrays[f"value {field}"] for field in fields}
            return Index(tuple(shards), arrays["records"], values, sizes)
    remote = any(map(shard_files.is_url, shards))
    if remote:
        log(f"reading the headers of {len(shards)} shards, {sum(sizes) / 1e9:.1f} GB")
    index = lambda number: _index_shard(number, files[number], fields)  # noqa: E731
    numbers = range(len(files))
    parts = shard_files.map_threads(index, numbers) if remote else [index(number) for number in numbers]
    records = np.concatenate([part for part, _, _ in parts])
    skipped = sum((counts for _, _, counts in parts), Counter())
    summary = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
    if not len(records):
        raise ValueError(
            f"data.shards has no record in {len(shards)} files, first {shards[0]!r} (skipped: {summary or 'nothing'}); "
            f"use shards of records, each a key.{'|'.join(IMAGE_EXTENSIONS)} beside a key.txt or key.json"
        )
    log(f"{len(records)} records in {len(shards)} shards{f'; skipped: {summary}' if summary else ''}")
    values = {field: np.concatenate([numbers[field] for _, numbers, _ in parts]) for field in fields}
    if stored is not None:
        stored.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(stored) as temporary, temporary.open("wb") as file:
            arrays: dict[str, Any] = {f"value {field}": numbers for field, numbers in values.items()}
            np.savez(file, records=records, **arrays)
    return Index(tuple(shards), records, values, sizes)


def _index_shard(
    number: int, file: ShardFile, fields: Sequence[str]
) -> tuple[np.ndarray, dict[str, np.ndarray], Counter]:
    """Return (RECORD[n], numbers of each field, what was skipped) of one shard."""
    skipped: Counter = Counter()
    rows: dict[int, dict[str, Any]] = {}  # JSON objects by their place, read as the headers are

    def listed(read: Callable[[int, int], bytes]) -> Iterator[tuple[str, int, int]]:
        for name, start, size in members(read, file.size, skipped):
            if fields and name.lower().endswith(".json"):
                rows[start] = _numbers(read(start, size), fields)
            yield name, start, size

    with shard_files.open_reader(file) as read:
        _check_uncompressed(file.name, read(0, BLOCK))
        records = _records(number, listed(read), skipped)
    kept = [rows.get(int(record["json"]), {}) if record["json_size"] >= 0 else {} for record in records]
    return records, to_numbers(kept, fields), skipped


def _numbers(data: bytes, fields: Sequence[str]) -> dict[str, Any]:
    try:
        row = parse_object(data, "")
    except (ValueError, RecursionError):  # reported, with its reason, when its caption is read
        return {}
    return {field: find_field(row, field) for field in fields}  # not all of it, for millions of records


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
        if "image" in parts and ("txt" in parts or "json" in parts):
            rows.append((shard, *parts["image"], *parts.get("txt", (0, -1)), *parts.get("json", (0, -1))))
        else:
            skipped["keys without a caption" if "image" in parts else "keys without an image"] += 1
    return np.array(rows, RECORD)


# ---- the records ----------------------------------------------------------------------------------------------------


class TarShards:
    """The images of an index, by number; see `StoredImages`.

    fields: names of captions. One name is that of a field in key.json, if there is no key.txt; of several, `txt` is
    key.txt, and all others are fields.
    """

    formats = ("JPEG", "PNG", "WEBP")

    def __init__(self, index: Index, fields: Sequence[str] = ("caption",)):
        self.index, self.values, self._fields = index, index.values, tuple(fields)

    def __len__(self) -> int:
        return len(self.index.records)

    def name(self, number: int) -> str:
        record = self.index.records[number]
        return f"record {number} ({self.index.shards[record['shard']]}, byte {record['image']})"

    def captions(self, number: int) -> list[str]:
        record, captions = self.index.records[number], []
        plain, several = record["txt_size"] >= 0, len(self._fields) > 1
        if plain and (not several or "txt" in self._fields):
            captions.append(check_unicode(decode(self._bytes(record, "txt"), "the caption"), "the caption").strip())
        fields = [name for name in self._fields if name != "txt" or not several]
        if record["json_size"] >= 0 and fields and (several or not plain):
            try:
                row = parse_object(self._bytes(record, "json"), "the caption")
                captions += find_captions(row, fields, "its JSON")
            except CaptionError:
                if not captions:
                    raise
        if not captions:
            raise CaptionError(f"there is no {' or '.join(self._fields)}; set --config.data.caption_field")
        return captions

    def image(self, number: int) -> io.BytesIO:
        return io.BytesIO(self._bytes(self.index.records[number], "image"))

    def digest(self, numbers: np.ndarray) -> str:
        return digest(*self.index.shards, *map(str, self.index.sizes), self.index.records[numbers].tobytes())

    def _bytes(self, record, part: str) -> bytes:
        shard, size = self.index.shards[record["shard"]], int(record[f"{part}_size"])
        data = shard_files.read_range(shard, int(record[part]), size, KEY)
        if len(data) != size:
            raise SourceError(
                f"shard {shard} has become shorter since it was indexed; run the same command to index it again"
            )
        return data


# ---- the source -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TarSource(ImageSource):
    """The source `tar`: `shards` of captioned images, files or URLs."""

    shards: str | Sequence[str]

    @property
    def failure(self) -> tuple[str, str]:
        return KEY, "fetch the shards again"

    def check(self, batch_size: int) -> None:
        super().check(batch_size)
        expand(self.shards)

    def store(self, fields: Sequence[str], folder: Path, log: Callable[[str], None]) -> TarShards:
        return TarShards(index_shards(expand(self.shards), folder, log, fields), caption_fields(self.caption_field))
