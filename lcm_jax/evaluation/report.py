"""Reports of evaluations: rows of any metrics as a table for the terminal, as markdown and as JSON.

A row is {"model", "sampler", "steps", columns of the metrics, "images_per_s"}. A report is the content of report.json:
the rows nested as {model: {sampler: {steps: figures}}}, and the conditions they were measured under. A run's report has
those of `MODELS` that the run compares at its top level; any other has its models under "models".
"""

import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

import lcm_jax
from lcm_jax.evaluation.evaluate import Column
from lcm_jax.evaluation.metrics import METRICS
from lcm_jax.files import write_text

Row = Mapping[str, Any]
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
LABELS = ("model", "sampler", "steps")
MODELS = ("teacher", "init", "student")  # in a run's report: what it learns from, begins from, and leaves
SPEED = {"images_per_s": Column("images/s", ".1f")}


def environment() -> dict[str, Any]:
    """Return the device, the versions and the date of figures that are measured now."""
    device = jax.devices()[0]
    return {
        "device": f"{device.device_kind} x {jax.device_count()} ({platform.machine()})",
        "versions": {name: version(name) for name in PACKAGES}
        | {"lcm_jax": lcm_jax.__version__, "python": platform.python_version()},
        "date": time.strftime("%Y-%m-%d"),
    }


def nest(rows: Sequence[Row]) -> dict[str, dict]:
    """Return {model: {sampler: {steps as text: the figures of the row}}}."""
    nested: dict[str, dict] = {}
    for row in rows:
        figures = {column: value for column, value in row.items() if column not in LABELS}
        nested.setdefault(row["model"], {}).setdefault(row["sampler"], {})[str(row["steps"])] = figures
    return nested


def rows_of(report: Mapping[str, Any]) -> list[Row]:
    """Return the rows of a report, the inverse of `nest`."""
    models = report.get("models") or {name: report[name] for name in MODELS if name in report}
    return [
        {"model": model, "sampler": sampler, "steps": int(steps)} | figures
        for model, samplers in models.items()
        for sampler, numbers in samplers.items()
        for steps, figures in numbers.items()
    ]


def cells(row: Row) -> Iterator[tuple[str, str]]:
    """Yield (heading, formatted value) of every column; groups come last."""
    columns = SPEED | {name: column for metric in METRICS.values() for name, column in metric.columns.items()}
    figures = [(columns[name], value) for name, value in row.items() if name not in LABELS]
    yield from ((label, str(row[label])) for label in LABELS if label in row)
    for column, value in figures:
        if not isinstance(value, Mapping):
            yield column.heading, format(value, column.format)
    for column, group in figures:
        if isinstance(group, Mapping):
            yield from ((name.replace("_", " "), format(value, column.format)) for name, value in group.items())


def line(row: Row) -> str:
    """Return a row as one line of text, without groups."""
    labels = " ".join(str(row[label]) for label in LABELS if label in row)
    figures = {name: value for name, value in row.items() if name not in LABELS and not isinstance(value, Mapping)}
    speed = figures.pop("images_per_s")
    return ", ".join([f"{labels}: {speed:.1f} images/s", *(f"{heading} {value}" for heading, value in cells(figures))])


def guidance(report: Mapping[str, Any]) -> str:
    """Return the guidance scale as text, or that of each model if they differ."""
    own = report.get("guidance_scales")
    scales = report["guidance_scale"] if own is None else ", ".join(f"{scale} ({who})" for who, scale in own.items())
    return f"guidance scale {scales}"


def table(report: Mapping[str, Any], groups: bool = True) -> Table:
    """Return the report's rows as a table for the terminal, with or without columns that are groups."""
    rows = rows_of(report)
    if not groups:
        rows = [{name: value for name, value in row.items() if not isinstance(value, Mapping)} for row in rows]
    view = Table(title=f"{report['captions']} held-out captions, {guidance(report)}")
    for heading, _ in cells(rows[0]):
        view.add_column(heading, justify="left" if heading in ("model", "sampler") else "right")
    for row in rows:
        view.add_row(*(text for _, text in cells(row)))
    return view


def composition(report: Mapping[str, Any]) -> str:
    """Return the verifier's score on pairs that no training image has, as a sentence; empty without such figures."""
    if (scores := report.get("composition")) is None:
        return ""
    figures = [
        f"{who} {sampler} {steps} {score:.1%}"
        for who in MODELS
        for sampler, numbers in scores.get(who, {}).items()
        for steps, score in numbers.items()
    ]
    return f"Pairs of color and shape that no training image has, {scores['captions']} captions: {', '.join(figures)}."


def checkpoints(report: Mapping[str, Any]) -> str:
    """Return the best checkpoint of a run and its last by a figure of its previews, as a sentence; empty without it."""
    if (compared := report.get("checkpoints")) is None:
        return ""
    best, last = compared["best"], compared["last"]
    return (
        f"Best {compared['figure']} of the previews: {best['value']:.4g} at step {best['step']} "
        f"({compared['folder']}); last: {last['value']:.4g} at step {last['step']}."
    )


def markdown(report: Mapping[str, Any]) -> str:
    """Return the report as the text of report.md."""
    rows = rows_of(report)
    headings = [heading for heading, _ in cells(rows[0])]
    lines = [headings, ["---"] * len(headings), *([text for _, text in cells(row)] for row in rows)]
    training = report.get("seconds", {}).get("training")
    notes = [metric.note for metric in METRICS.values() if metric.columns.keys() & rows[0].keys()]
    models = list(dict.fromkeys(row["model"] for row in rows))
    paragraphs = [
        f"# {', '.join(models)}" if "models" in report else f"# {' and '.join(reversed(models)).capitalize()}",
        f"{report['captions']} held-out captions, {guidance(report)}, the same noise for all; "
        f"{report['device']}." + (f" Training took {training:.0f} s." if training is not None else ""),
        "\n".join(f"| {' | '.join(texts)} |" for texts in lines),
        composition(report),
        checkpoints(report),
        " ".join(notes),
    ]
    return "\n\n".join(filter(None, paragraphs)) + "\n"


def write(report: Mapping[str, Any], folder: Path) -> None:
    """Write report.md, then report.json, each whole or not at all."""
    for name, text in (("report.md", markdown(report)), ("report.json", json.dumps(report, indent=1) + "\n")):
        write_text(folder / name, text)


def show(report: Mapping[str, Any]) -> None:
    """Print the report's table, without groups if the terminal is narrow, and the scores on untrained pairs."""
    console = Console(width=None if Console().is_terminal else 140)
    needed = console.measure(table(report), options=console.options.update(width=1000)).minimum
    console.print(table(report, groups=needed <= console.width))
    if text := composition(report):
        print(text)
