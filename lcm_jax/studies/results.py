"""The results of a study: rows of all its runs as a table in markdown, as JSON, and as a figure."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lcm_jax.evaluation import report
from lcm_jax.evaluation.diversity import Diversity
from lcm_jax.evaluation.metrics import METRICS
from lcm_jax.files import write_text
from lcm_jax.studies.grid import Run, format_value
from lcm_jax.training.workdir import read_object

KNOWN = {**METRICS, "diversity": Diversity}
COLUMNS = {name: column for metric in KNOWN.values() for name, column in metric.columns.items()}
OWN = ("skipping_step", "guidance_scale", "sampler", "steps")  # what a row has beside the keys of the grid
PANEL, LEGEND = (4.4, 3.4), 1.6  # inches
SPREAD = 10.0  # a larger ratio of values has a logarithmic axis
NUM_TRAIN_TIMESTEPS = 1000  # unless a scheduler has others


def leading_column(metric: str) -> str:
    """Return the column of a metric by which models are compared."""
    return next(iter(KNOWN[metric].columns))


def read_report(folder: Path) -> dict[str, Any]:
    """Return report.json of a complete run. Raises RunError if it is damaged."""
    return read_object(folder / "report.json", "delete it, and the same command makes it again")


def describe_run(run: Run, config, folder: Path) -> dict[str, Any]:
    """Return {"run", a value of every key of the grid, "skipping_step" if the run has one} of a complete run."""
    steps = config.objective.get("num_ddim_steps")
    scheduler = folder / "export" / "scheduler" / "scheduler_config.json"
    length = NUM_TRAIN_TIMESTEPS
    if scheduler.is_file():
        length = read_object(scheduler, "convert the run again").get("num_train_timesteps", length)
    skipping = {} if steps is None else {"skipping_step": length // steps}
    return {"run": run.name} | dict(run.settings) | skipping


def run_rows(run: Run, config, folder: Path) -> list[dict[str, Any]]:
    """Return a row for each figure of the student in the report of a complete run."""
    described, stored = describe_run(run, config, folder), read_report(folder)
    rows = [row for row in report.rows_of(stored) if row["model"] == "student"]
    own = {"guidance_scale": stored["guidance_scale"]}
    return [described | own | {name: value for name, value in row.items() if name != "model"} for row in rows]


def teacher_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of the models that a run's report compares with the student."""
    stored = read_report(folder)
    own = {"guidance_scale": stored["guidance_scale"]}
    return [{"run": row["model"]} | own | dict(row) for row in report.rows_of(stored) if row["model"] != "student"]


# ---- the table ------------------------------------------------------------------------------------------------------


def markdown(title: str, rows: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> str:
    """Return the rows as a table of markdown with 95% intervals, below a title and above notes."""
    labels = ["run", *(name for name in OWN if any(name in row for row in rows))]
    figures = [name for name in COLUMNS if any(isinstance(row.get(name), int | float) for row in rows)]
    headings = [label.replace("_", " ") for label in labels]
    lines = [[*headings, *(COLUMNS[name].heading for name in figures)]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        texts = [format_value(row[name]) if name in row else "" for name in labels]
        lines.append([*texts, *(_figure(row, name) for name in figures)])
    table = "\n".join(f"| {' | '.join(each)} |" for each in lines)
    return "\n\n".join([f"# {title}", table, *notes, report.INTERVALS]) + "\n"


def _figure(row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        return ""
    bounds = [format(bound, COLUMNS[name].format) for bound in row.get(report.RANGES, {}).get(name, ())]
    return format(row[name], COLUMNS[name].format) + (f" [{', '.join(bounds)}]" if bounds else "")


# ---- the figure -----------------------------------------------------------------------------------------------------


def draw(rows: Sequence[Mapping[str, Any]], figure, title: str, path: Path) -> None:
    """Write a PNG with a panel for each metric, and in it a line for each value of `figure.lines`, with intervals.

    figure: x and lines name what a row has; metrics; steps: of the sampler, a row of panels for each unless the lines
    are the steps. Values of x that are not all numbers are put side by side.
    """
    from matplotlib import colormaps  # takes a second
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [row for row in rows if row["steps"] in figure.steps and figure.x in row]
    by_steps = [None] if figure.lines == "steps" else [n for n in figure.steps if any(r["steps"] == n for r in shown)]
    page = Figure(
        figsize=(PANEL[0] * len(figure.metrics) + LEGEND, PANEL[1] * max(len(by_steps), 1)), layout="constrained"
    )
    FigureCanvasAgg(page)
    page.suptitle(title, parse_math=False)
    lines = list(dict.fromkeys(row.get(figure.lines) for row in shown))
    colors = colormaps["viridis"].resampled(len(lines) + 1)  # its last, a light yellow, is left out
    positions = list(dict.fromkeys(row[figure.x] for row in shown))
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in positions)
    handles = {}
    grid = page.subplots(max(len(by_steps), 1), len(figure.metrics), squeeze=False)
    for steps, panels in zip(by_steps, grid, strict=False):
        for axes, metric in zip(panels, figure.metrics, strict=True):
            for number, value in enumerate(lines):
                chosen = [r for r in shown if r.get(figure.lines) == value and steps in (None, r["steps"])]
                if chosen:
                    at = [row[figure.x] if numeric else positions.index(row[figure.x]) for row in chosen]
                    name = f"{value} step{'s' * (value != 1)}" if figure.lines == "steps" else str(value)
                    handles[name] = _line(axes, at, chosen, metric, colors(number), numeric)
            _label(axes, figure.x, metric, "" if steps is None else f"{steps} step{'s' * (steps != 1)}")
            _place(axes, positions, numeric)
    if handles:
        page.legend(handles.values(), handles.keys(), loc="outside right center", fontsize="small")
    page.savefig(path, dpi=100)


def _line(axes, at: Sequence[float], rows: Sequence[Mapping[str, Any]], metric: str, color, joined: bool):
    order, column = np.argsort(at), leading_column(metric)
    values = np.array([rows[i][column] for i in order], float)
    bounds = [rows[i].get(report.RANGES, {}).get(column, (rows[i][column],) * 2) for i in order]
    errors = np.abs(np.array(bounds, float).T - values)
    style = {"color": color, "marker": "o", "markersize": 3.5, "capsize": 2, "linestyle": "-" if joined else "none"}
    return axes.errorbar(np.array(at)[order], values, yerr=errors, elinewidth=0.8, **style)


def _label(axes, x: str, metric: str, title: str) -> None:
    from matplotlib.ticker import PercentFormatter

    column = COLUMNS[leading_column(metric)]
    # More diversity is not better by itself: noise has the most.
    better = "" if metric == "diversity" else f" ({'lower' if KNOWN[metric].lower_is_better else 'higher'} is better)"
    axes.set(xlabel=x.rpartition(".")[2].replace("_", " "), ylabel=column.heading + better, title=title)
    if column.format.endswith("%"):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.3)


def _place(axes, positions: Sequence[Any], numeric: bool) -> None:
    if not numeric:
        axes.set_xticks(range(len(positions)), [format_value(value) for value in positions], rotation=30, ha="right")
        return
    if 0 < SPREAD * min(positions) < max(positions):
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(sorted(positions), [format_value(value) for value in sorted(positions)])


def write(study, title: str, rows: Sequence[Mapping[str, Any]], conditions: Mapping, folder: Path) -> None:
    """Write figure.png, report.md and report.json of the rows so far, each whole or not at all."""
    complete, all_runs = conditions["runs"]
    note = (
        f"{complete} of {all_runs} runs of base {conditions['base']}, {conditions['updates']} updates of "
        f"{conditions['batch_size']} images each; {conditions['training_seconds']:.0f} s of training in all on "
        f"{conditions['device']}. {conditions['captions']} held-out captions, the same noise for all."
    )
    draw([row for row in rows if "model" not in row], study.figure, title, folder / "figure.png")
    write_text(folder / "report.md", markdown(title, rows, [note]))
    write_text(folder / "report.json", json.dumps({"rows": list(rows)} | dict(conditions), indent=1) + "\n")
