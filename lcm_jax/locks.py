"""File locks, which the operating system releases when the process that holds them ends."""

import errno
import fcntl
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Some network file systems are mounted without locks.
UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class Locked(Exception):
    """Another process holds the lock; the message names it."""


@contextmanager
def lock(path: Path, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`, which is created if necessary and not deleted afterwards.

    wait: called with the holder's name if another process holds the lock, before waiting for it. Raises Locked if
    another process holds the lock and `wait` is None.
    """
    with path.open("a+") as file:  # closing it, or the end of the process, releases the lock
        try:
            _acquire(file, path, wait)
            file.truncate(0)
            json.dump({"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%F %T")}, file)
            file.flush()
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            print(f"warning: {path} cannot be locked ({error}); make sure that no other process writes there")
        yield


def check(path: Path) -> None:
    """Raise Locked if another process holds the lock of `path`. Writes nothing."""
    if not path.exists():
        return
    with path.open("r+") as file:  # network file systems lock only files that are open for writing
        try:
            _acquire(file, path, None)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise


def _acquire(file, path: Path, wait: Callable[[str], None] | None) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if wait is None:
            raise Locked(_holder(path)) from None
        wait(_holder(path))
        fcntl.flock(file, fcntl.LOCK_EX)


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):  # the holder has not written its line yet
        return "another process"
