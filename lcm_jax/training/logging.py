"""What a run tells: a progress bar for people, `metrics.jsonl` and TensorBoard scalars for programs."""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import (  # protobuf defines them on import
    Event,  # pyright: ignore[reportAttributeAccessIssue]
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboardX.summary import scalar

from lcm_jax.files import write_text


class Recorder:
    """Scalars by step into `workdir/metrics.jsonl` and `workdir/tensorboard/`.

    Opened at step N, it drops the lines after N that a killed run had written ahead of its last checkpoint, so that
    nothing stands in the file twice, and a last line that was cut short. Other lines that are no records are dropped
    and counted by `say`. `seconds`: how long the run had taken by N, as last written, or 0.
    """

    def __init__(self, workdir: Path, step: int, say: Callable[[str], None]):
        self._path, self.seconds = Path(workdir) / "metrics.jsonl", 0.0
        if self._path.exists():
            lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
            records = [_record(line) for line in lines]
            if damaged := records[:-1].count(None):
                say(f"warning: {self._path} has {damaged} damaged lines, which are dropped")
            kept = [(line, r) for line, r in zip(lines, records, strict=True) if r is not None and r["step"] <= step]
            write_text(self._path, "".join(line + "\n" for line, _ in kept))
            self.seconds = max((record.get("seconds", 0.0) for _, record in kept), default=0.0)
        folder = Path(workdir) / "tensorboard"
        folder.mkdir(exist_ok=True)
        # Not SummaryWriter, whose thread dies on a full disk: the run would then wait for it forever.
        self._board = EventsWriter(str(folder / "events"))
        self._add(step + 1, session_log=SessionLog(status=SessionLog.START))  # what follows replaces what is there

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        line = json.dumps({"step": step} | {k: float(f"{v:.6g}") for k, v in scalars.items()})
        with self._path.open("a") as file:
            file.write(line + "\n")
        for name, value in scalars.items():
            self._add(step, summary=scalar(name, value))
        self._board.flush()

    def _add(self, step: int, **content) -> None:
        self._board.write_event(Event(wall_time=time.time(), step=step, **content))

    def close(self) -> None:
        self._board.close()


def _record(line: str) -> dict[str, float] | None:
    """Return the record of a line, or None if it is damaged, as by a process that was killed while it wrote."""
    try:
        record = json.loads(line)
        numbers = all(isinstance(record.get(name, 0), int | float) for name in ("step", "seconds"))
    except (ValueError, AttributeError):
        return None
    return record if numbers and "step" in record else None


class ProgressReport:
    """A live bar on a terminal; on anything else a line at most every few seconds."""

    def __init__(self, total: int, done: int, batch_size: int, title: str, every_seconds: float = 10.0):
        self.console = Console()
        self._batch_size, self._title, self._total = batch_size, title, total
        self._every, self._last_line, self._clock = every_seconds, -math.inf, (time.monotonic(), done)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
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
