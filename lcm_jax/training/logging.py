"""The records of a run: a progress bar, `metrics.jsonl` and TensorBoard scalars."""

import json
import math
import secrets
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
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

from lcm_jax.errors import RunError
from lcm_jax.files import write_text

FILE = "metrics.jsonl"
PREVIEW = "preview_seconds"  # in the records of previews alone
SLOW_DATA = 0.1  # share of the time spent waiting for data from which it is shown
BEST = "best_step"  # in those of a run that keeps its best checkpoint: the step of that


class Recorder:
    """Writer of scalars to `workdir/metrics.jsonl` and `workdir/tensorboard/`.

    Opened at step N, it drops the lines after N, which a killed run wrote after its last checkpoint, and an incomplete
    last line, so that no step is recorded twice; at step 0, of which there is no checkpoint, all lines. Other damaged
    lines are dropped and logged. `seconds`: the duration of the run up to N, or 0. `previewed`: True if the preview of
    step N is recorded. config: of the run; its `log.wandb` names a project of Weights & Biases, to which the scalars go
    as well. write: False in a process for which another one writes. Raises RunError if wandb is not installed.
    """

    def __init__(self, workdir: Path, step: int, log: Callable[[str], None], config=None, write: bool = True):
        self._path, self.seconds, self.previewed, self._write = Path(workdir) / FILE, 0.0, False, write
        self._wandb = None
        if not write:
            return
        if config is not None and config.log.get("wandb"):
            self._wandb = start_wandb(config, workdir, step)
        if self._path.exists():
            lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
            records = [_record(line) for line in lines]
            if damaged := records[:-1].count(None):
                log(f"warning: {self._path} has {damaged} damaged lines, which are dropped")
            paired = zip(lines, records, strict=True) if step else ()
            kept = [(line, record) for line, record in paired if record is not None and record["step"] <= step]
            write_text(self._path, "".join(line + "\n" for line, _ in kept))
            self.seconds = max((record.get("seconds", 0.0) for _, record in kept), default=0.0)
            self.previewed = any(record["step"] == step and PREVIEW in record for _, record in kept)
        folder = Path(workdir) / "tensorboard"
        folder.mkdir(exist_ok=True)
        # The thread of SummaryWriter dies on a full disk, and the run would wait for it forever.
        self._board = EventsWriter(str(folder / "events"))
        self._add(
            step + 1, session_log=SessionLog(status=SessionLog.START)
        )  # marks later steps of an earlier process as replaced

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        if not self._write:
            return
        line = json.dumps({"step": step} | {k: float(f"{v:.6g}") for k, v in scalars.items()})
        with self._path.open("a") as file:
            file.write(line + "\n")
        for name, value in scalars.items():
            # tensorboardX's own function would replace the @ of frechet@4.
            self._add(step, summary=Summary(value=[Summary.Value(tag=name, simple_value=value)]))
        self._board.flush()
        if self._wandb is not None:
            self._wandb.log(dict(scalars), step=step)

    def _add(self, step: int, **content) -> None:
        self._board.write_event(Event(wall_time=time.time(), step=step, **content))

    def close(self) -> None:
        if self._write:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def start_wandb(config, workdir: Path, step: int):
    """Begin the run of Weights & Biases that belongs to `workdir`; at a step above 0 resume it, by its id in wandb.txt.

    Raises RunError if the package is not installed.
    """
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise RunError(
            f"log.wandb is {config.log.wandb!r}, and wandb is not installed; pip install 'lcm_jax[wandb]', or set "
            "it to ''"
        ) from None
    path = Path(workdir).resolve()
    identifier = path / "wandb.txt"
    resume = step > 0 and identifier.is_file()
    if not resume:
        write_text(identifier, secrets.token_hex(8) + "\n")
    return wandb.init(
        project=config.log.wandb,
        id=identifier.read_text().strip(),
        name=path.name,
        dir=str(path),
        config=config.to_dict(),
        resume="allow" if resume else None,
    )


def read_previews(workdir: Path) -> list[dict[str, float]]:
    """Return the records of a run's previews, in the order of their steps; none if nothing is recorded."""
    path = Path(workdir) / FILE
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    records = [record for line in lines if (record := _record(line)) is not None and PREVIEW in record]
    return sorted(records, key=lambda record: record["step"])


def _record(line: str) -> dict[str, float] | None:
    """Return the record of a line, or None if it is damaged."""
    try:
        record = json.loads(line)
        numbers = all(isinstance(value, int | float) for value in record.values())
    except (ValueError, AttributeError):
        return None
    return record if numbers and "step" in record else None


class ProgressReport:
    """A progress bar on a terminal; elsewhere a line at most every `every_seconds`."""

    def __init__(self, total: int, done: int, title: str, every_seconds: float = 10.0):
        self.console = Console()
        self._title, self._total = title, total
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
        self._preview = ""
        self._task = self._bar.add_task(title, total=total, completed=done, figures="")
        self._bar.start()

    def show_preview(self, step: int, figures: Mapping[str, float]) -> None:
        """Show figures of the preview of `step` in front of the loss, which is no guide to the quality of samples."""
        self._preview = "".join(f"{name} {value:.4g} at {step}  " for name, value in figures.items())

    def update(self, step: int, scalars: Mapping[str, float]) -> None:
        """Show step, the updates done, the preview's figure, and of scalars loss, speed and waiting for data."""
        rate, waiting = scalars["steps_per_second"], scalars["data_seconds"] * scalars["steps_per_second"]
        speed = f"{rate:.2f} steps/s  {scalars['images_per_second']:.0f} images/s"
        if "mfu" in scalars:
            speed += f"  MFU {scalars['mfu']:.0%}"
        if waiting >= SLOW_DATA:
            speed += f"  {waiting:.0%} waiting for data"
        figures = f"{self._preview}loss {scalars['loss']:.4g}  {speed}"
        self._bar.update(self._task, completed=step, figures=figures)
        now = time.monotonic()
        if self._bar.disable and (now - self._last_line >= self._every or step == self._total):
            self._last_line = now
            left = (self._total - step) / rate
            self.log(f"{self._title} {step}/{self._total}  {figures}  {left // 60:.0f}:{left % 60:02.0f} left")

    def log(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        self._bar.stop()
