"""Files of records, on this machine or behind a URL such as gs://bucket/data.tar: patterns of names, and ranged reads.

URLs are read with fsspec, whose packages for clouds are optional.
"""

import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, BinaryIO, TypeVar

import fsspec

from lcm_jax.data.captioned import SourceError
from lcm_jax.data.stored import digest
from lcm_jax.data.substitutes import describe

T = TypeVar("T")
REQUIRED = {  # scheme -> the package that reads it, and the extra that installs it
    "gs": ("gcsfs", "gcs"),
    "gcs": ("gcsfs", "gcs"),
    "s3": ("s3fs", "s3"),
    "s3a": ("s3fs", "s3"),
    "http": ("aiohttp", "http"),
    "https": ("aiohttp", "http"),
}
BLOCK = 2**23  # bytes that an index of a remote file reads at once
THREADS = 16  # requests at a time


def is_url(name: str) -> bool:
    """Return True for scheme://path."""
    return re.match(r"[a-z][a-z0-9+.-]*://", name) is not None


@cache
def _file_system(scheme: str, key: str) -> Any:
    """Return fsspec's file system. Raises ValueError that names the extra if its package is missing."""
    try:
        return fsspec.filesystem(scheme)
    except ImportError as error:
        package, extra = REQUIRED.get(scheme, (str(error), ""))
        remedy = f"run pip install 'lcm_jax[{extra}]'" if extra else "install it"
        raise ValueError(f"{key}: {scheme}:// requires the package {package}; {remedy}") from error
    except ValueError as error:  # no such scheme
        raise ValueError(f"{key}: {scheme}:// is not supported; use gs, s3, hf, https or a path") from error


def _split(name: str, key: str) -> tuple[Any, str]:
    """Return (file system, path in it) of a URL."""
    file_system = _file_system(name.split("://", 1)[0], key)
    return file_system, file_system._strip_protocol(name)


def map_threads(function: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
    """Return function(item) of each, computed by several threads."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, items))


def expand(patterns: str | Sequence[str], key: str, remedy: str) -> list[str]:
    """Return the files that patterns name: `{00000..00015}` counts, padded with zeros like its first number; `*`, `?`
    and `[..]` match files, in order of name.

    key, remedy: of the setting, for messages. Raises ValueError if a pattern matches nothing, names a file that is
    missing, or cannot be looked up.
    """
    shards: list[str] = []
    if not patterns:
        raise ValueError(f"{key} is empty; {remedy}")
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        files = [file for name in _count(pattern) for file in _match(name, key, remedy)]
        remote = [name for name in files if is_url(name)]
        there = dict(zip(remote, map_threads(lambda name: _exists(name, key, remedy), remote), strict=True))
        if missing := [file for file in files if not (there[file] if file in there else os.path.isfile(file))]:
            raise ValueError(
                f"{key} {pattern!r}: {len(missing)} of {len(files)} files are missing, first {missing[0]!r}; {remedy}"
            )
        if not files:
            raise ValueError(f"{key} {pattern!r} matches no file; {remedy}")
        shards += files
    return shards


def _count(pattern: str) -> Iterator[str]:
    span = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if span is None:
        yield pattern
        return
    for number in range(int(span[1]), int(span[2]) + 1):
        yield from _count(f"{pattern[: span.start()]}{number:0{len(span[1])}d}{pattern[span.end() :]}")


def _match(name: str, key: str, remedy: str) -> list[str]:
    if not glob.has_magic(name):
        return [name]
    if not is_url(name):
        return sorted(glob.glob(name))
    file_system, path = _split(name, key)
    with _reported(name, key, remedy):
        return sorted(file_system.unstrip_protocol(found) for found in file_system.glob(path))


def _exists(name: str, key: str, remedy: str) -> bool:
    file_system, path = _split(name, key)
    with _reported(name, key, remedy):
        try:
            return file_system.info(path)["type"] == "file"
        except FileNotFoundError:
            return False


@contextmanager
def _reported(name: str, key: str, remedy: str) -> Iterator[None]:
    """Turn whatever fsspec raises in the block into a ValueError that names the file."""
    try:
        yield
    except Exception as error:  # its file systems raise many kinds
        raise ValueError(
            f"{key} {name!r} cannot be looked up ({describe(error)}); {remedy}, or check the network and credentials"
        ) from error


class ShardFile:
    """A file of records: its length, and reads of any part of it, by several threads."""

    def __init__(self, name: str, key: str):
        """name: a path or URL. key: of the setting, for messages. Raises SourceError if it cannot be read."""
        self.name, self._key = name, key
        self._remote = _split(name, key) if is_url(name) else None
        try:
            if self._remote is None:
                status = os.stat(name)
                self.size, identity = status.st_size, [os.path.abspath(name), status.st_mtime_ns]
            else:
                file_system, path = self._remote
                self.size, identity = int(file_system.info(path)["size"]), [name, file_system.ukey(path)]
        except Exception as error:  # fsspec's file systems raise many kinds
            raise _unreadable(name, error) from error
        self.identity = digest(*map(str, [*identity, self.size]))  # changes with the file

    def read(self, start: int, size: int) -> bytes:
        """Return `size` bytes from `start`, fewer at the end of the file. Raises SourceError."""
        return read_range(self.name, start, size, self._key)


class BlockReader:
    """Reads of a remote file from its beginning to its end, in large blocks."""

    def __init__(self, file: ShardFile):
        self._file, self._start, self._block = file, 0, b""

    def __call__(self, start: int, size: int) -> bytes:
        """Return `size` bytes from `start`, fewer at the end of the file. Raises SourceError."""
        offset = start - self._start
        if not 0 <= offset <= offset + size <= len(self._block):
            self._start, offset = start, 0
            self._block = self._file.read(start, max(size, BLOCK))
        return self._block[offset : offset + size]


@contextmanager
def open_reader(file: ShardFile) -> Iterator[Callable[[int, int], bytes]]:
    """Yield read(start, size) for reading most of a file in order. Raises SourceError if it cannot be opened."""
    if is_url(file.name):
        yield BlockReader(file)
        return
    try:
        opened = os.open(file.name, os.O_RDONLY)
    except OSError as error:
        raise _unreadable(file.name, error) from error
    try:
        yield lambda start, size: os.pread(opened, size, start)
    finally:
        os.close(opened)


def read_range(name: str, start: int, size: int, key: str) -> bytes:
    """Return `size` bytes of a file from `start`, fewer at its end.

    Raises SourceError if it cannot be read; no record replaces what a network has failed to bring.
    """
    try:
        if not is_url(name):
            file = os.open(name, os.O_RDONLY)
            try:
                return os.pread(file, size, start)
            finally:
                os.close(file)
        file_system, path = _split(name, key)
        return file_system.cat_file(path, start=start, end=start + size)
    except Exception as error:
        raise _unreadable(name, error) from error


def read_file(name: str, key: str) -> bytes:
    """Return all bytes behind a URL. Raises OSError if there is no such file."""
    file_system, path = _split(name, key)
    return file_system.cat_file(path)


@contextmanager
def open_file(name: str, key: str) -> Iterator[BinaryIO]:
    """Yield a file of a path or URL, to be read at any place. Raises SourceError if it cannot be opened."""
    try:
        if is_url(name):
            file_system, path = _split(name, key)
            opened = file_system.open(path, "rb")
        else:
            opened = open(name, "rb")
    except Exception as error:
        raise _unreadable(name, error) from error
    with opened:
        yield opened


def _unreadable(name: str, error: Exception) -> SourceError:
    return SourceError(
        f"shard {name} cannot be read ({describe(error)}); make it readable and run the same command to resume"
    )
