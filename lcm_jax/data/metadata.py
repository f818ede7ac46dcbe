"""Captions in a `metadata.jsonl` or `metadata.csv` of Hugging Face's image folders: a row with a file name each."""

import csv
import io
import json
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

from lcm_jax.files import check_unicode, decode

NAMES = ("metadata.jsonl", "metadata.csv")
DEFAULT_FIELD = "text"  # of the captions, as Hugging Face's training scripts name it
REPEATED = "rows of metadata with a file_name that an earlier row has"
Skip = Callable[[str, str], None]  # (reason, name of what is skipped)


class Row(NamedTuple):
    """A row of metadata: captions, and all of its columns."""

    captions: tuple[str, ...]
    columns: Mapping[str, Any]


def read_metadata(root: Path, path: str, images: Set[str], fields: Sequence[str], skip: Skip) -> dict[str, Row]:
    """Return {image: row} of a metadata file.

    root: the folder of all images. path: of the file, within `root`. images: paths within `root`; only these are looked
    up, so that no name in the file is ever opened. fields: the columns of captions, or `DEFAULT_FIELD` in a row without
    them. skip: is called for each row that is broken, repeats a file name, or has no image.
    Raises ValueError if all rows are broken or there are none, OSError if the file cannot be read.
    """
    text = decode((root / path).read_bytes(), f"metadata file {path!r}")
    rows: dict[str, Row] = {}
    broken: list[str] = []
    count = 0
    for line, row in _json_rows(text) if path.endswith(".jsonl") else _csv_rows(text):
        count += 1
        place = f"line {line} of {path!r}"
        try:
            if isinstance(row, ValueError):
                raise row
            name, captions = _file_name(row), _captions(row, fields)
        except ValueError as error:
            broken.append(f"{place} ({error})")
            continue
        shown = f"{name[:200]!r} in {place}"
        image = posixpath.normpath(posixpath.join(posixpath.dirname(path), name))
        if image.startswith(("/", "../")):
            skip("rows of metadata with a file outside the folder", shown)
        elif image not in images:
            skip("rows of metadata without an image", shown)
        elif image in rows:
            skip(REPEATED, shown)
        else:
            rows[image] = Row(captions, row)
    if len(broken) == count:
        first = f"all of its {count} rows are broken, first {broken[0]}" if broken else "it has no row"
        raise ValueError(f"metadata file {path!r}: {first}; repair the file, or move it out of data.folder")
    for each in broken:
        skip("broken rows of metadata", each)
    return rows


def _json_rows(text: str) -> Iterator[tuple[int, Any]]:
    """Yield (line number, JSON value, or the ValueError of a line that is none)."""
    for line, content in enumerate(text.split("\n"), 1):  # splitlines would split at characters that JSON allows
        if content.strip():
            try:
                yield line, json.loads(content)
            except (ValueError, RecursionError) as error:
                reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                yield line, ValueError(f"not JSON: {reason}")


def _csv_rows(text: str) -> Iterator[tuple[int, Any]]:
    """Yield (line number, row as a dict, or the ValueError of a broken one). The first line is the header."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield reader.line_num, ValueError(f"not CSV: {error}")
            continue
        if row is None:
            return
        if header is None:
            header = row
        elif row:
            if len(row) == len(header):
                yield reader.line_num, dict(zip(header, row, strict=True))
            else:
                reason = f"{len(row)} columns, but the header has {len(header)}; quote captions that contain commas"
                yield reader.line_num, ValueError(reason)


def _file_name(row: Any) -> str:
    name = row.get("file_name") if isinstance(row, Mapping) else None
    if not isinstance(name, str) or not name:
        raise ValueError(f"no file_name, but {_columns(row)}")
    return name.replace("\\", "/")  # as Windows writes it


def _captions(row: Mapping[str, Any], fields: Sequence[str]) -> tuple[str, ...]:
    values = [row[name] for name in ([name for name in fields if name in row] or [DEFAULT_FIELD]) if name in row]
    texts = [text for value in values for text in (value if isinstance(value, list) else [value])]
    if not texts or not all(isinstance(text, str) for text in texts):
        wanted = " or ".join(map(repr, [*fields, DEFAULT_FIELD]))
        raise ValueError(f"no text {wanted}, but {_columns(row)}; set --config.data.caption_field")
    captions = [check_unicode(text, "the caption").strip() for text in texts]
    if not any(captions):
        raise ValueError("the caption is empty; write one, or remove the row")
    return tuple(filter(None, captions))


def _columns(row: Any) -> str:
    if not isinstance(row, Mapping):
        return f"a JSON {type(row).__name__}"
    names = ", ".join(repr(name)[:40] for name in list(row)[:8])
    return f"the columns {names}" if names else "no column"
