"""Captioned images in a folder as people have it: files of any size and mode, at any depth, with captions beside them.

The caption of an image is the first of: its row in a `metadata.jsonl` or `metadata.csv` (`file_name`, and a column
`caption_field` or `text`); `name.txt` beside `name.jpg`; the field `caption_field` of `name.json` beside it;
`caption.txt` in its folder; the setting `caption`. Images are known by their paths within the folder, whose digests
order them: a part of the set resembles all of it however the files are sorted, and is nearly the same one after files
were added.
"""

import hashlib
import json
import os
import posixpath
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from lcm_jax.data import metadata
from lcm_jax.data.captioned import CaptionError, caption_fields, find_captions, parse_object
from lcm_jax.data.filters import to_number, to_numbers
from lcm_jax.data.prepared import ImageSource
from lcm_jax.data.stored import digest
from lcm_jax.files import decode, write_text

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # whatever the extension says
SHARED_CAPTION = "caption.txt"  # of all images in its folder
REMEDY = "set --config.data.folder to a folder of images"

Stamp = tuple[int, int]  # of a file: bytes, time of its last change in ns


class Entry(NamedTuple):
    """An image and its captions: those in the file `caption_file`, or `captions` if that is empty. Paths are within the
    folder. numbers: of its row in metadata, by column, those that were asked for."""

    image: str
    caption_file: str
    captions: tuple[str, ...]
    stamps: tuple[Stamp, ...]  # of both files
    numbers: Mapping[str, float] = {}


class Skipped:
    """Names of the files that are left out of a set, by reason."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        self._names.setdefault(reason, []).append(name)

    def lines(self) -> list[str]:
        """Return a line for each reason: how many, and the first of them."""
        return [f"{reason}: {len(names)}, first {names[0]}" for reason, names in self._names.items()]


# ---- the files ------------------------------------------------------------------------------------------------------


def list_files(root: str, skipped: Skipped) -> dict[str, Stamp]:
    """Return the files below `root` by their paths within it, sorted, without hidden ones.

    root: a real path. Links to files within it count as files; other links are skipped. Raises OSError.
    """
    files: dict[str, Stamp] = {}
    folders = [""]
    while folders:
        folder = folders.pop()
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                path = posixpath.join(folder, entry.name)
                if entry.name.startswith("."):
                    continue
                if entry.is_symlink():
                    target = os.path.realpath(entry.path)
                    if os.path.commonpath([root, target]) != root or not os.path.isfile(target):
                        skipped.add("links that lead out of the folder or to no file", repr(path))
                        continue
                if entry.is_dir():
                    folders.append(path)
                elif entry.is_file():  # no pipe or device
                    status = entry.stat()
                    files[path] = (status.st_size, status.st_mtime_ns)
    return dict(sorted(files.items()))


def select_images(files: Iterable[str], folder: str, skipped: Skipped) -> list[str]:
    """Return the paths of images. folder: the setting. Raises ValueError if there are none."""
    selected = [path for path in files if _extension(path) in IMAGE_EXTENSIONS]
    if not selected:
        found = "; ".join(skipped.lines())
        endings = " ".join(IMAGE_EXTENSIONS)
        raise ValueError(f"data.folder {folder!r} has no image ({endings}{'; ' if found else ''}{found}); {REMEDY}")
    return selected


def _extension(path: str) -> str:
    return posixpath.splitext(path)[1].lower()


def index_folder(
    root: str, folder: str, caption: str, names: Sequence[str], log: Callable[[str], None], fields: Sequence[str] = ()
) -> list[Entry]:
    """Pair the images below `root` with their captions, in the order of their digests; no image is opened.

    folder: the setting, for messages. caption: of images without their own, if it is not empty. names: of the captions
    in JSON and metadata. log: is called with a line that counts the images, and a line for each kind of file that is
    skipped. fields: columns of metadata whose numbers the entries have.
    Raises ValueError if no image has a caption or metadata is broken, and OSError.
    """
    skipped = Skipped()
    files = list_files(root, skipped)
    found = select_images(files, folder, skipped)
    rows = _read_rows(root, files, set(found), names, skipped)
    texts = {posixpath.splitext(path)[0] + _extension(path): path for path in files if _is_caption(path)}
    texts = {name: path for name, path in texts.items() if files[path][0]}  # taggers leave empty files
    entries = []
    for image in found:
        stem, shared = posixpath.splitext(image)[0], posixpath.join(posixpath.dirname(image), SHARED_CAPTION)
        beside = next((texts[name] for name in (f"{stem}.txt", f"{stem}.json", shared) if name in texts), "")
        if image in rows:
            captions, columns = rows[image]
            numbers = {name: to_number(columns[name]) for name in fields if name in columns}
            entries.append(Entry(image, "", captions, (files[image],), numbers))
        elif beside:
            entries.append(Entry(image, beside, (), (files[image], files[beside])))
        elif caption:
            entries.append(Entry(image, "", (caption,), (files[image],)))
        else:
            skipped.add("images without a caption", repr(image))
    stems, folders = {posixpath.splitext(image)[0] for image in found}, {posixpath.dirname(image) for image in found}
    for path in files:
        is_shared = posixpath.basename(path) == SHARED_CAPTION and posixpath.dirname(path) in folders
        if _is_caption(path) and not is_shared and posixpath.splitext(path)[0] not in stems:
            skipped.add("captions without an image", repr(path))
        elif not _is_caption(path) and not _is_metadata(path) and _extension(path) not in IMAGE_EXTENSIONS:
            skipped.add("other files", repr(path))
    if not entries:
        raise ValueError(
            f"data.folder {folder!r} has no image with a caption (skipped {'; '.join(skipped.lines())}); put a "
            "name.txt beside each name.jpg, or set --config.data.caption to one for all"
        )
    log(f"{len(entries)} images with captions in {folder}")
    for line in skipped.lines():
        log(f"skipped {line}")
    return sorted(entries, key=lambda entry: hashlib.sha256(os.fsencode(entry.image)).digest())


def _is_caption(path: str) -> bool:
    return _extension(path) in (".txt", ".json")


def _is_metadata(path: str) -> bool:
    return posixpath.basename(path) in metadata.NAMES


def _read_rows(
    root: str, files: Iterable[str], found: set[str], names: Sequence[str], skipped: Skipped
) -> dict[str, metadata.Row]:
    """Return {image: row} of all metadata files. The first of several rows counts."""
    rows: dict[str, metadata.Row] = {}
    for path in filter(_is_metadata, files):
        for image, row in metadata.read_metadata(Path(root), path, found, names, skipped.add).items():
            if image in rows:
                skipped.add(metadata.REPEATED, f"{image!r} in {path!r}")
            else:
                rows[image] = row
    return rows


# ---- the records ----------------------------------------------------------------------------------------------------


class FolderImages:
    """The images of `entries` below `root`, by number; see `StoredImages`. names: of the captions in JSON."""

    formats = FORMATS

    def __init__(self, root: str, entries: Sequence[Entry], names: Sequence[str], fields: Sequence[str] = ()):
        """fields: of `values`, which an image has in metadata or else in its name.json."""
        self._root, self._entries, self._names = root, entries, tuple(names)
        rows = [entry.numbers or self._row(entry) for entry in entries] if fields else []
        self.values = to_numbers(rows, fields)

    def __len__(self) -> int:
        return len(self._entries)

    def name(self, number: int) -> str:
        return f"image {self._entries[number].image!r}"

    def captions(self, number: int) -> list[str]:
        entry = self._entries[number]
        if not entry.caption_file:
            return list(entry.captions)
        data = Path(self._root, entry.caption_file).read_bytes()
        if _extension(entry.caption_file) == ".json":
            return find_captions(parse_object(data, "the caption"), self._names, f"{entry.caption_file}")
        if not (caption := decode(data, "the caption").strip()):
            raise CaptionError(f"the caption in {entry.caption_file} is empty; write one, or delete the file")
        return [caption]

    def image(self, number: int) -> BinaryIO:
        return open(os.path.join(self._root, self._entries[number].image), "rb")

    def digest(self, numbers: np.ndarray) -> str:
        return digest(json.dumps([self._entries[number] for number in numbers]))

    def _row(self, entry: Entry) -> Mapping[str, Any]:
        path = Path(self._root, posixpath.splitext(entry.image)[0] + ".json")
        try:
            return parse_object(path.read_bytes(), "")
        except (OSError, ValueError, RecursionError):  # reported, with its reason, if its caption is read
            return {}


# ---- the source -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FolderSource(ImageSource):
    """The source `folder`: the images below `folder`, of which the last `held_out` by digest are not trained on.

    caption: of images without their own; if it is empty, these are skipped.
    """

    folder: str
    caption: str = ""

    @property
    def failure(self) -> tuple[str, str]:
        return "data.folder", "repair the files, or set --config.data.folder to others"

    @property
    def settings(self) -> Mapping[str, str]:
        return {"caption": self.caption}

    def check(self, batch_size: int) -> None:
        super().check(batch_size)
        count = self.count_train(len(self._index(self._root(), lambda line: None, ())))
        if count * self.repeats < batch_size:
            raise ValueError(
                f"data.folder {self.folder!r} has {count} images to train on, each data.repeats {self.repeats} times, "
                f"fewer than train.batch_size {batch_size}; lower it, or raise data.repeats"
            )

    def store(self, fields: Sequence[str], folder: Path, log: Callable[[str], None]) -> FolderImages:
        root = self._root()
        if os.path.commonpath([root, os.path.realpath(folder)]) == root:
            raise ValueError(
                f"data.folder {self.folder!r} contains the workdir, whose previews are images; use another --workdir"
            )
        entries = self._index(root, log, fields)
        self.count_train(len(entries))
        self._check_unchanged(entries, folder)
        return FolderImages(root, entries, caption_fields(self.caption_field), fields)

    def _index(self, root: str, log: Callable[[str], None], fields: Sequence[str]) -> list[Entry]:
        return index_folder(root, self.folder, self.caption, caption_fields(self.caption_field), log, fields)

    def _root(self) -> str:
        """Return the real path of the folder. Raises ValueError if it is not one."""
        if not self.folder:
            raise ValueError(f"data.folder is empty; {REMEDY}")
        if not os.path.isdir(self.folder):
            what = "is not a folder" if os.path.exists(self.folder) else "does not exist"
            raise ValueError(f"data.folder {self.folder!r} {what}; {REMEDY}")
        return os.path.realpath(self.folder)

    def _check_unchanged(self, entries: Sequence[Entry], folder: Path) -> None:
        """Raise ValueError if a run that resumes would find other images: batches are chosen by their order."""
        names = "".join(f"{entry.image}\n" for entry in entries)
        now = hashlib.sha256(os.fsencode(names)).hexdigest() + "\n"
        path = folder / "folder.sha256"
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_text(path, now)
        elif path.read_bytes() != now.encode():
            raise ValueError(
                f"data.folder {self.folder!r} has other images than when this run began, {len(entries)} now; restore "
                f"them to resume exactly, delete {path} to go on with these, or use another --workdir"
            )
