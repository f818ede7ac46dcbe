"""One-line errors for failures of any long run: memory, disks, Ctrl-C and devices. Importing it does not load jax."""

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
    """A run that cannot start or resume; its message is one or two lines for the person who started it."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C; its message names the phase that was interrupted and the remedy."""


def first_line(error: BaseException) -> str:
    """Return the first line of the error's message, at most 200 characters, or else its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def disk_is_full(error: BaseException) -> bool:
    """Return True if the error or its cause reports a full disk or quota, whichever library raised it."""
    text = f"{error} {error.__cause__}"
    return any(reason in text for reason in FULL)


def memory_shortage(error: BaseException) -> str | None:
    """Return the size that could not be allocated, such as "64.0GiB", or None if the error has another cause.

    If an out-of-memory error contains no size, its first line is returned.
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
    """Turn a memory shortage, a full disk or Ctrl-C in the block into a one-line error.

    doing: the phase, as in "while encoding images". memory: the remedy for a memory shortage, in the imperative.
    kept: a clause that states what is saved and how to resume. Errors of an inner phase pass unchanged.
    Raises RunError for a memory shortage and a full disk, Interrupted for Ctrl-C.
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
    """Raise a Ctrl-C that arrives in a callback, where Python ignores exceptions, a moment later, from now on.

    JAX runs a callback in every garbage collection, of which tracing a program causes many.
    """
    if getattr(sys.unraisablehook, "func", None) is not _interrupt_again:
        sys.unraisablehook = partial(_interrupt_again, sys.unraisablehook)


def check_devices() -> None:
    """Raise RunError if JAX_PLATFORMS names devices that this machine or this installation of JAX lacks."""
    import jax

    asked = os.environ.get("JAX_PLATFORMS", "")
    try:
        # JAX passes over a GPU that is not there if another platform follows, as in cuda,cpu.
        if jax.devices()[0].platform == "cpu" and asked.partition(",")[0] not in ("", "cpu"):
            raise RuntimeError
    except (RuntimeError, AssertionError) as error:  # JAX 0.10 asserts that there is a GPU before it looks for one
        if not asked:
            raise
        jax.config.update("jax_platforms", None)
        there = ", ".join(sorted({device.platform for device in jax.devices()}))
        reason = f" ({first_line(error).partition(' (set JAX_PLATFORMS')[0]})" if str(error) else ""
        raise RunError(
            f"JAX_PLATFORMS={asked} names devices that JAX does not find{reason}; found: {there}; "
            "unset JAX_PLATFORMS, or install lcm_jax[gpu] or lcm_jax[tpu] on a machine with such a device"
        ) from error
