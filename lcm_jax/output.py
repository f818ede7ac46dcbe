"""Standard output and error that outlive their reader: a closed pipe or terminal does not end a run."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Outliving:
    """A text stream that goes on into other file descriptors, in order, once it cannot be written to."""

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
            # The descriptor itself is replaced: what the stream still holds goes there too, also when Python ends.
            os.dup2(self._instead.pop(0), self._stream.fileno())
            self.flush()


@contextmanager
def outliving(stderr_instead: bool = True) -> Iterator[None]:
    """Until the end of the block, what standard output and error refuse is printed elsewhere, or else nowhere.

    stderr_instead: standard error is where else, for output that must be seen. Streams without a file descriptor
    (notebooks, tests) are left as they are. Lines appear as they are printed, and characters that the encoding lacks
    as their escapes.
    """
    before = sys.stdout, sys.stderr
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        instead = [*([before[1].fileno()] if stderr_instead else []), nowhere]
        before[0].fileno()
    except (OSError, AttributeError, ValueError):
        os.close(nowhere)
        yield
        return
    try:
        if isinstance(before[0], io.TextIOWrapper):
            before[0].reconfigure(line_buffering=True, errors="backslashreplace")
        sys.stdout, sys.stderr = Outliving(before[0], instead), Outliving(before[1], [nowhere])
        yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = before
        os.close(nowhere)
