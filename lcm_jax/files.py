"""Files and folders that appear whole or not at all, and text in whatever encoding an editor wrote it."""

import atexit
import codecs
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Longer marks first: UTF-32's begins with UTF-16's.
ENCODINGS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class TextError(ValueError):
    """Bytes or characters that are not text."""


def decode(data: bytes, name: str) -> str:
    """Return the text of `data`, UTF-8 or the encoding of its byte order mark, without the mark.

    Raises TextError that begins with `name`.
    """
    encoding = next((encoding for mark, encoding in ENCODINGS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        label = encoding.removesuffix("-sig").upper()
        raise TextError(f"{name} is not {label} ({error.reason} at byte {error.start}); save it as UTF-8") from error
    if "\0" in text:
        raise TextError(f"{name} has NUL characters, as UTF-16 without a byte order mark does; save it as UTF-8")
    return text


def check_unicode(text: str, name: str) -> str:
    """Return `text`. Raises TextError that begins with `name` if it has lone surrogates, which no encoding has."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TextError(
            f"{name} is {text!r}, which is not valid Unicode at character {error.start}; use UTF-8 text"
        ) from error
    return text


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; it replaces `path` when the block ends without an error.

    The folder must exist. Raises OSError; what was there is then untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def temporary_folders(target: Path) -> list[Path]:
    """Return the unfinished folders of `whole_folder`, left by processes that were killed or being written now."""
    return sorted(target.parent.glob(f".{target.name}.part-*"))


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target` to fill; it replaces `target` when the block ends without an error.

    The parent must exist. Raises OSError; what was there is then untouched.
    """
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.part-", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        for path in temporary.rglob("*"):  # safetensors writes files that only their owner can read
            path.chmod(0o755 if path.is_dir() else 0o644)
        if not target.exists():
            os.replace(temporary, target)
            return
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
        os.replace(target, aside)
        try:
            os.replace(temporary, target)
        except OSError:
            os.replace(aside, target)
            raise
        shutil.rmtree(aside)
    finally:
        remove(temporary)


def remove(folder: Path) -> None:
    """Delete a folder, if it exists. Threads of orbax may still write to it for a moment after an error.

    What they write after that is deleted when the process ends. Warns if the folder cannot be deleted.
    """
    if not folder.exists():
        return
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for pause in (0.1, 0.5, 2.0):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(pause)
        if not folder.exists():
            return
    warnings.warn(f"{folder} is left over and could not be deleted; delete it yourself", stacklevel=2)
