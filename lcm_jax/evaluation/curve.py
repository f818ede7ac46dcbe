"""The figures of a run's previews over its updates, as an image."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lcm_jax.evaluation.evaluate import Column
from lcm_jax.evaluation.metrics import METRICS

PANEL, LEGEND = (4.4, 3.4), 1.4  # inches
SPREAD = 10.0  # a larger ratio of values has a logarithmic axis


def group_figures(records: Sequence[Mapping[str, float]]) -> dict[str, list[str]]:
    """Return the figures of `records` by metric: {"frechet": ["frechet@1", "frechet@4"]}, fewest steps first.

    A figure is `metric@steps`, or a name of its own. One of a part, `metric/part@steps`, is left out.
    """
    names = dict.fromkeys(name for record in records for name in record if name != "step" and "/" not in name)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.split("@")[0], []).append(name)
    return {metric: sorted(group, key=_steps) for metric, group in groups.items()}


def _steps(figure: str) -> int:
    steps = figure.partition("@")[2]
    return int(steps) if steps.isdecimal() else 0


def draw_curve(
    records: Sequence[Mapping[str, float]], path: Path, title: str, best: tuple[str, int] | None = None
) -> None:
    """Write a PNG with a panel for each metric and in it a line for each number of sampling steps.

    records: {"step": updates, figure: value}, one or more, in order; see `group_figures`. best: (figure, updates) to
    mark.
    """
    from matplotlib import colormaps  # takes a second
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter, ScalarFormatter

    groups = group_figures(records)
    figure = Figure(figsize=(PANEL[0] * len(groups) + LEGEND, PANEL[1]), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, parse_math=False)
    lines = {}  # by label: every panel has the same colors
    numbers = sorted({_steps(name) for names in groups.values() for name in names})
    colors = colormaps["viridis"].resampled(len(numbers) + 1)  # its last, a light yellow, is left out
    for axes, (metric, names) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
        for name in names:
            points = [(record["step"], record[name]) for record in records if name in record]
            n, color = _steps(name), colors(numbers.index(_steps(name)))
            (line,) = axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=3.5)
            if n:
                lines[f"{n} step{'s' * (n > 1)}"] = line
            for x, y in points:
                if best == (name, x):
                    (star,) = axes.plot(x, y, "*", color=color, markersize=14, markeredgecolor="black", zorder=5)
                    lines[f"best {name}"] = star
        known = METRICS.get(metric)
        column = next(iter(known.columns.values())) if known else Column(metric.replace("_", " "), "")
        better = f" ({'lower' if known.lower_is_better else 'higher'} is better)" if known else ""
        axes.set(xlabel="updates", ylabel=column.heading + better)
        if column.format.endswith("%"):
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        values = [record[name] for record in records for name in names if name in record]
        if known and known.lower_is_better and 0 < SPREAD * min(values) < max(values):  # one step is far above eight
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.grid(alpha=0.3)
    if lines:
        figure.legend(lines.values(), lines.keys(), loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=120)
