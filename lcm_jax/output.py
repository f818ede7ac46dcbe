"""Standard output and error that survive a closed pipe or terminal, so that it does not end a run."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Outliving:
    """A text stream that continues in other file descriptors, in order, when it cannot be written to."""

    def __init__(self, stream, instead: list[int]):
        self._stream, self._instead = stream, instead

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, act, *arguments) -> None:
        try:
            act(*arguments)
        except OSError:  # a closed pipe, a terminal that is gone, a full disk behind a redirection
            if not self._instead:
                return
            # Replacing the descriptor itself redirects the stream's buffer too, also when Python exits.
            os.dup2(self._instead.pop(0), self._stream.fileno())
            self.flush()


@contextmanager
def outliving(stderr_instead: bool = True) -> Iterator[None]:
    """Redirect standard output and error within the block if they cannot be written to.

    stderr_instead: redirect standard output to standard error, for output that must be seen, before discarding it.
    Streams without a file descriptor (notebooks, tests) are left unchanged. Output is line-buffered, and characters
    that the encoding lacks are printed as escapes.
    """
    before = sys.stdout, sys.stderr
    devnull = os.open(os.devnull, os.O_WRONLY)
    try:
        instead = [*([before[1].fileno()] if stderr_instead else []), devnull]
        before[0].fileno()
    except (OSError, AttributeError, ValueError):
        os.close(devnull)
        yield
        return
    try:
        if isinstance(before[0], io.TextIOWrapper):
            before[0].reconfigure(line_buffering=True, errors="backslashreplace")
        sys.stdout, sys.stderr = Outliving(before[0], instead), Outliving(before[1], [devnull])
        yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = before
        os.close(devnull)
