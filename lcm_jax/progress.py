"""Progress of a command that makes images, on standard error. Importing it loads nothing."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(total: int, every_seconds: float = 10.0) -> Iterator[Callable[[int], None]]:
    """Show speed and time left on stderr: a bar on a terminal, else a line every `every_seconds`.

    Yields update(done), done being the number of images so far. The speed excludes the first batch, which compiles.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, first = Console(stderr=True), None
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    # A bar and the names of files share a terminal only if rich prints both.
    redirect = {"redirect_stdout": sys.stdout.isatty(), "disable": not console.is_terminal}
    with Progress(*columns, console=console, **redirect) as bar:
        task, shown = bar.add_task("", total=total), time.monotonic()

        def update(done: int) -> None:
            nonlocal first, shown
            now = time.monotonic()
            if first is None:
                first = now, done
            rate = (done - first[1]) / (now - first[0]) if done > first[1] else None
            speed = "" if rate is None else f"{rate:.2f} images/s"
            bar.update(task, completed=done, description=speed)
            if bar.disable and rate is not None and (now - shown >= every_seconds or done == total):
                shown, left = now, (total - done) / rate
                print(f"{done}/{total} images  {speed}  {left // 60:.0f}:{left % 60:02.0f} left", file=sys.stderr)

        yield update
