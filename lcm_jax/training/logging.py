"""What a run tells: a progress bar for people, `metrics.jsonl` and TensorBoard scalars for programs."""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter


class Recorder:
    """Scalars by step into `workdir/metrics.jsonl` and `workdir/tensorboard/`.

    Opened at step N, it drops the lines after N that a killed run had written ahead of its last checkpoint, so that
    nothing stands in the file twice. `seconds`: how long the run had taken by N, as last written, or 0.
    """

    def __init__(self, workdir: Path, step: int):
        self._path, self.seconds = Path(workdir) / "metrics.jsonl", 0.0
        if self._path.exists():
            kept = [line for line in self._path.read_text().splitlines() if _step_of(line) <= step]
            temporary = self._path.with_suffix(".part")
            temporary.write_text("".join(line + "\n" for line in kept))
            os.replace(temporary, self._path)
            self.seconds = max((json.loads(line).get("seconds", 0.0) for line in kept), default=0.0)
        self._board = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        line = json.dumps({"step": step} | {k: float(f"{v:.6g}") for k, v in scalars.items()})
        with self._path.open("a") as file:
            file.write(line + "\n")
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._board.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut short by a kill: drop it


class ProgressReport:
    """A live bar on a terminal; on anything else a line at most every few seconds."""

    def __init__(self, total: int, done: int, batch_size: int, title: str, every_seconds: float = 10.0):
        self.console = Console()
        self._batch_size, self._title, self._total = batch_size, title, total
        self._every, self._last_line, self._clock = every_seconds, -math.inf, (time.monotonic(), done)
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"),
            console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task(title, total=total, completed=done, figures="")
        self._bar.start()

    def update(self, step: int, scalars: Mapping[str, float]) -> None:
        """step: updates done. scalars: `loss` and `steps_per_second` at least."""
        rate = scalars["steps_per_second"]
        figures = f"loss {scalars['loss']:.4g}  {rate:.2f} steps/s  {rate * self._batch_size:.0f} pictures/s"
        self._bar.update(self._task, completed=step, figures=figures)
        now = time.monotonic()
        if self._bar.disable and (now - self._last_line >= self._every or step == self._total):
            self._last_line = now
            left = (self._total - step) / rate
            self.say(f"{self._title} {step}/{self._total}  {figures}  {left // 60:.0f}:{left % 60:02.0f} left")

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        self._bar.stop()
