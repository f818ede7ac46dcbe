"""Errors that every long run can meet, as one line: memory, disks, Ctrl-C and devices. No reader of it loads jax."""

import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

FULL = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


class RunError(RuntimeError):
    """A run that cannot start or continue; its text is one or two lines for the person who started it."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C; its text says during what, and what is kept."""


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def disk_is_full(error: BaseException) -> bool:
    """Return True if the error or its cause reports a full disk or quota, whichever library raised it."""
    text = f"{error} {error.__cause__}"
    return any(reason in text for reason in FULL)


def memory_shortage(error: BaseException) -> str | None:
    """Return what an error says of memory that cannot be allocated, such as "64.0GiB"; None for any other error.

    The text is the error's first line if it contains no size.
    """
    text = first_line(error)
    if disk_is_full(error) or not (
        isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()
    ):
        return None
    size = re.search(r"(?:allocat\w*|allocating) (\d[\d.]*) ?(bytes|[KMGT]i?B)", text)
    if size is None:
        return text
    return f"{int(size[1]) / 1e9:.2f} GB" if size[2] == "bytes" else f"{size[1]} {size[2]}"


@contextmanager
def phase(doing: str, *, memory: str, kept: str | Callable[[], str]) -> Iterator[None]:
    """Turn what can happen at any moment of a long phase of a run into an error of one line.

    doing: the phase, as in "while encoding images". memory: the remedy if there is too little, in the imperative.
    kept: what of the run is left, and how it continues. An error of an inner phase passes unchanged.
    Raises RunError for memory that cannot be allocated and for a full disk, Interrupted for Ctrl-C.
    """
    left = lambda: kept if isinstance(kept, str) else kept()  # noqa: E731
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted while {doing}; {left()}") from None
    except Exception as error:
        if isinstance(error, RunError):
            raise
        if disk_is_full(error):
            raise RunError(
                f"the disk is full ({first_line(error)}) while {doing}; free some space; {left()}"
            ) from error
        if (shortage := memory_shortage(error)) is not None:
            raise RunError(f"out of memory ({shortage}) while {doing}; {memory}; {left()}") from error
        raise


def _interrupt_again(before: Callable, unraisable) -> None:
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        main = threading.main_thread().ident
        threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT)).start()
    else:
        before(unraisable)


def keep_interrupts() -> None:
    """From now on, a Ctrl-C that arrives in a callback, where Python ignores exceptions, is raised a moment later.

    JAX has a callback in every garbage collection, and there are many while a program is traced.
    """
    if getattr(sys.unraisablehook, "func", None) is not _interrupt_again:
        sys.unraisablehook = partial(_interrupt_again, sys.unraisablehook)


def check_devices() -> None:
    """Raise RunError if JAX_PLATFORMS names devices that this machine or this installation of JAX does not have."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX 0.10 asserts that there is a card before it looks for one
        asked = os.environ.get("JAX_PLATFORMS")
        if not asked:
            raise
        jax.config.update("jax_platforms", None)
        there = ", ".join(sorted({device.platform for device in jax.devices()}))
        reason = f" ({first_line(error).partition(' (set JAX_PLATFORMS')[0]})" if str(error) else ""
        raise RunError(
            f"JAX_PLATFORMS={asked} names devices that JAX does not find{reason}; found: {there}. "
            f"Unset JAX_PLATFORMS, or install lcm_jax[gpu] or lcm_jax[tpu] on a machine that has one"
        ) from error
