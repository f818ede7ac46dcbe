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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from lcm_jax.data import images, metadata
from lcm_jax.data.captioned import CaptionedDataset, parse_caption
from lcm_jax.data.substitutes import Substitutes
from lcm_jax.files import write_text

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # whatever the extension says
SHARED_CAPTION = "caption.txt"  # of all images in its folder
REMEDY = "set --config.data.folder to a folder of images"

Stamp = tuple[int, int]  # of a file: bytes, time of its last change in ns


class Entry(NamedTuple):
    """An image and its caption: the file `caption_file`, or `caption` if that is empty. Paths are within the folder."""

    image: str
    caption_file: str
    caption: str
    stamps: tuple[Stamp, ...]  # of both files


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


def index_folder(root: str, folder: str, caption: str, field: str, log: Callable[[str], None]) -> list[Entry]:
    """Pair the images below `root` with their captions, in the order of their digests; no image is opened.

    folder: the setting, for messages. caption: of images without their own, if it is not empty. field: of JSON and
    metadata. log: is called with a line that counts the images, and a line for each kind of file that is skipped.
    Raises ValueError if no image has a caption or metadata is broken, and OSError.
    """
    skipped = Skipped()
    files = list_files(root, skipped)
    found = select_images(files, folder, skipped)
    rows = _read_rows(root, files, set(found), field, skipped)
    texts = {posixpath.splitext(path)[0] + _extension(path): path for path in files if _is_caption(path)}
    texts = {name: path for name, path in texts.items() if files[path][0]}  # taggers leave empty files
    entries = []
    for image in found:
        stem, shared = posixpath.splitext(image)[0], posixpath.join(posixpath.dirname(image), SHARED_CAPTION)
        beside = next((texts[name] for name in (f"{stem}.txt", f"{stem}.json", shared) if name in texts), "")
        if image in rows:
            entries.append(Entry(image, "", rows[image], (files[image],)))
        elif beside:
            entries.append(Entry(image, beside, "", (files[image], files[beside])))
        elif caption:
            entries.append(Entry(image, "", caption, (files[image],)))
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


def _read_rows(root: str, files: Iterable[str], found: set[str], field: str, skipped: Skipped) -> dict[str, str]:
    """Return {image: caption} of all metadata files. The first of several captions counts."""
    rows: dict[str, str] = {}
    for path in filter(_is_metadata, files):
        for image, caption in metadata.read_metadata(Path(root), path, found, field, skipped.add).items():
            if image in rows:
                skipped.add(metadata.REPEATED, f"{image!r} in {path!r}")
            else:
                rows[image] = caption
    return rows


# ---- the records ----------------------------------------------------------------------------------------------------


class FolderImages:
    """Random access to {"image": uint8[size, size, 3], "caption": str, "time_ids": float32[6]}.

    The set has every entry `repeats` times in turn. The shorter side of an upright image is resized to `size`, and a
    square of it cropped: in the middle, or if `random_crop` at random; if `flip`, half of the images are mirrored
    before. Random choices of a record depend on (seed, entry, repeat) alone, so that resumed runs and caches are exact.
    time_ids are SDXL's sizes: see `crop_square`.

    An image or a caption that cannot be read is reported to `log` and replaced by another, see `Substitutes`.
    """

    def __init__(
        self,
        root: str,
        entries: Sequence[Entry],
        size: int,
        field: str,
        log: Callable[[str], None],
        *,
        repeats: int = 1,
        random_crop: bool = False,
        flip: bool = False,
        seed: int = 0,
    ):
        self._root, self._entries, self._size, self._field = root, entries, size, field
        self._repeats, self._random_crop, self._flip, self._seed = repeats, random_crop, flip, seed
        name = lambda number: f"image {entries[number].image!r}"  # noqa: E731
        failure = ("data.folder", "repair the files, or set --config.data.folder to others")
        self.substitutes = Substitutes(len(entries), name, log, failure)

    def __len__(self) -> int:
        return len(self._entries) * self._repeats

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        repeat, number = divmod(i, len(self._entries))
        return self.substitutes.read(number, lambda number: self._read(number, repeat))

    def caption(self, i: int) -> str:
        """Return the caption of record i without reading its image."""
        return self.substitutes.read(i % len(self._entries), self._caption)

    @property
    def fingerprint(self) -> str:
        """Digest of everything that determines the records: files with lengths and times, captions and settings."""
        settings = [self._size, self._field, self._repeats, self._random_crop, self._flip, self._seed]
        pixels = "upright, on white"  # change it with the way pixels are made, so that caches are encoded again
        return hashlib.sha256(json.dumps([self._entries, settings, pixels]).encode()).hexdigest()

    def _caption(self, number: int) -> str:
        entry = self._entries[number]
        if not entry.caption_file:
            return entry.caption
        plain = _extension(entry.caption_file) == ".txt"
        data = Path(self._root, entry.caption_file).read_bytes()
        if not (caption := parse_caption(data, None if plain else self._field)):
            raise ValueError(f"the caption in {entry.caption_file} is empty; write one, or delete the file")
        return caption

    def _read(self, number: int, repeat: int) -> dict:
        caption = self._caption(number)
        with open(os.path.join(self._root, self._entries[number].image), "rb") as file:
            image = images.to_rgb(images.open_upright(file, FORMATS, images.MAX_PIXELS))
        rng = np.random.default_rng([self._seed, number, repeat])
        if self._flip and rng.integers(2):
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels, sizes = images.crop_square(image, self._size, rng if self._random_crop else None)
        return {"image": pixels, "caption": caption, "time_ids": sizes}


# ---- the source -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FolderSource:
    """The source `folder`: the images below `folder`, of which the last `held_out` by digest are not trained on.

    size: of the images in pixels. caption: of images without their own; if it is empty, these are skipped.
    caption_field: of JSON and metadata. repeats: times that the training part has each image. crop: "center" or
    "random". flip: mirror half of the images. Held-out images are cropped in the middle and not mirrored.
    """

    folder: str
    size: int
    held_out: int
    caption: str = ""
    caption_field: str = "caption"
    repeats: int = 1
    crop: str = "center"
    flip: bool = False

    def check(self, batch_size: int) -> None:
        entries = index_folder(self._root(), self.folder, self.caption, self.caption_field, lambda line: None)
        count = self._count_train(len(entries))
        if count * self.repeats < batch_size:
            raise ValueError(
                f"data.folder {self.folder!r} has {count} images to train on, each data.repeats {self.repeats} times, "
                f"fewer than train.batch_size {batch_size}; lower it, or raise data.repeats"
            )

    def open(self, seed: int, folder: Path, log: Callable[[str], None]) -> CaptionedDataset:
        root = self._root()
        if os.path.commonpath([root, os.path.realpath(folder)]) == root:
            raise ValueError(
                f"data.folder {self.folder!r} contains the workdir, whose previews are images; use another --workdir"
            )
        entries = index_folder(root, self.folder, self.caption, self.caption_field, log)
        count = self._count_train(len(entries))
        self._check_unchanged(entries, folder)
        train = FolderImages(
            root,
            entries[:count],
            self.size,
            self.caption_field,
            log,
            repeats=self.repeats,
            random_crop=self.crop == "random",
            flip=self.flip,
            seed=seed,
        )
        held_out = FolderImages(root, entries[count:], self.size, self.caption_field, log)
        return CaptionedDataset(
            train=train,
            held_out=held_out,
            prompts=lambda n: [held_out[i]["caption"] for i in range(n)],  # of the images that are shown beside them
            compositional_prompts=lambda n: [],
            fingerprint=train.fingerprint,
        )

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

    def _count_train(self, count: int) -> int:
        """Return how many of `count` images are trained on. Raises ValueError if none are left."""
        if count <= self.held_out:
            raise ValueError(
                f"data.held_out {self.held_out} leaves none of the {count} images of data.folder to train on; lower it"
            )
        return count - self.held_out
