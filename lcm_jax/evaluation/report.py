"""Reports of evaluations: rows of any metrics as a table for the terminal, as markdown and as JSON.

A row is {"model", "sampler", "steps", columns of the metrics, "intervals", columns of `SPEED`}. A report is the content
of report.json: the rows nested as {model: {sampler: {steps: figures}}}, what its columns mean, and the conditions they
were measured under. A run's report has those of `MODELS` that the run compares at its top level; any other has its
models under "models". A report of images that are there already has their figures at its top level, without rows.
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
from lcm_jax.evaluation.evaluate import Column, Metric
from lcm_jax.evaluation.metrics import METRICS
from lcm_jax.files import write_text

Row = Mapping[str, Any]
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
LABELS = ("model", "sampler", "steps")
MODELS = ("teacher", "init", "student")  # in a run's report: what it learns from, begins from, and leaves
SPEED = {
    "images_per_s": Column("images/s", ".1f"),
    "latency_p50_s": Column("s/batch", ".3g"),
    "latency_p95_s": Column("95th", ".3g"),
    "peak_memory_gb": Column("GB", ".2f"),
    "tflop_per_image": Column("TFLOP/image", ".3g"),
}
INTERVALS = "In brackets, 95% intervals of a bootstrap over the images."
RANGES = "intervals"  # {column: (low, high)} of the other figures of a row


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
    """Return the rows of a report, the inverse of `nest`; of one of images that were there, a row without labels."""
    if "images" in report:
        return [{name: report[name] for name in (*report["columns"], RANGES) if name in report}]
    models = report.get("models") or {name: report[name] for name in MODELS if name in report}
    return [
        {"model": model, "sampler": sampler, "steps": int(steps)} | figures
        for model, samplers in models.items()
        for sampler, numbers in samplers.items()
        for steps, figures in numbers.items()
    ]


def describe(metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """Return the part of a report that tells what its columns are: {"columns": ..., "notes": one for each metric}."""
    columns = {name: list(column) for metric in metrics.values() for name, column in metric.columns.items()}
    return {"columns": columns, "notes": {name: metric.note for name, metric in metrics.items()}}


def columns_of(report: Mapping[str, Any]) -> dict[str, Column]:
    """Return the columns of a report, or of one that is being made: what `describe` returns."""
    known = SPEED | {name: column for metric in METRICS.values() for name, column in metric.columns.items()}
    return known | {name: Column(*each) for name, each in report.get("columns", {}).items()}


def cells(row: Row, columns: Mapping[str, Column], ranges: bool = False) -> Iterator[tuple[str, str]]:
    """Yield (heading, formatted value) of every column; groups come last.

    ranges: with the interval behind every value that has one, but for the parts of groups.
    """
    intervals = row.get(RANGES, {}) if ranges else {}
    figures = {name: value for name, value in row.items() if name not in (*LABELS, RANGES)}
    yield from ((label, str(row[label])) for label in LABELS if label in row)
    for name, value in figures.items():
        if not isinstance(value, Mapping):
            column = columns[name]
            low_high = [format(bound, column.format) for bound in intervals.get(name, ())]
            yield column.heading, format(value, column.format) + (f" [{', '.join(low_high)}]" if low_high else "")
    for name, group in figures.items():
        if isinstance(group, Mapping):
            yield from ((part.replace("_", " "), format(value, columns[name].format)) for part, value in group.items())


def line(row: Row, columns: Mapping[str, Column]) -> str:
    """Return a row as one line of text: its speed and its figures with their intervals, without groups."""
    labels = " ".join(str(row[label]) for label in LABELS if label in row)
    figures = {name: value for name, value in row.items() if name not in (*LABELS, *SPEED)}
    figures = {name: value for name, value in figures.items() if name == RANGES or not isinstance(value, Mapping)}
    speed = [f"{row['images_per_s']:.1f} images/s"] if "images_per_s" in row else []
    values = [f"{heading} {value}" for heading, value in cells(figures, columns, ranges=True)]
    return f"{labels}: " + ", ".join([*speed, *values])


def guidance(report: Mapping[str, Any]) -> str:
    """Return the guidance scale as text, or that of each model if they differ."""
    own = report.get("guidance_scales")
    scales = report["guidance_scale"] if own is None else ", ".join(f"{scale} ({who})" for who, scale in own.items())
    return f"guidance scale {scales}"


def title(report: Mapping[str, Any]) -> str:
    """Return what the rows of a report have in common."""
    if (images := report.get("images")) is not None:
        compared = f" compared with {report['reference']}" if report["reference"] else ""
        return f"{images['count']} images of {images['folder']}{compared}"
    compared = f", compared with {report['reference']}" if "reference" in report else ""
    return f"{report['captions']} held-out captions{compared}, {guidance(report)}"


def table(report: Mapping[str, Any], groups: bool = True) -> Table:
    """Return the report's rows as a table for the terminal, with or without groups; the costs are in report.md."""
    columns, hidden = columns_of(report), SPEED.keys() - {"images_per_s"}
    kept = lambda name, value: name not in hidden and (groups or not isinstance(value, Mapping))  # noqa: E731
    rows = [{name: value for name, value in row.items() if kept(name, value)} for row in rows_of(report)]
    view = Table()
    for heading, _ in cells(rows[0], columns):
        view.add_column(heading, justify="left" if heading in ("model", "sampler") else "right")
    for row in rows:
        view.add_row(*(text for _, text in cells(row, columns)))
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
    columns = columns_of(report)
    headings = [heading for heading, _ in cells(rows[0], columns)]
    lines = [headings, ["---"] * len(headings), *([text for _, text in cells(row, columns, True)] for row in rows)]
    training = report.get("seconds", {}).get("training")
    notes = list(report.get("notes", {}).values()) + ([INTERVALS] if RANGES in rows[0] else [])
    models = list(dict.fromkeys(row["model"] for row in rows if "model" in row))
    heading = ", ".join(models) if "models" in report else " and ".join(reversed(models)).capitalize()
    shared = [title(report), *([] if "images" in report else ["the same noise for all"])]
    paragraphs = [
        f"# {heading or 'Images'}",
        f"{', '.join(shared)}; {report['device']}."
        + (f" Training took {training:.0f} s." if training is not None else ""),
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
    """Print the report: its title, its table, without groups if the terminal is narrow, and its notes."""
    console = Console(width=None if Console().is_terminal else 140)
    needed = console.measure(table(report), options=console.options.update(width=1000)).minimum
    print(title(report))
    console.print(table(report, groups=needed <= console.width))
    for text in (composition(report), *report.get("notes", {}).values()):
        if text:
            print(text)
