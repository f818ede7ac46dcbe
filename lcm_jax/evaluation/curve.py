"""The figures of a run's previews over its updates, as an image."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lcm_jax.evaluation.evaluate import Column
from lcm_jax.evaluation.metrics import METRICS

PANEL = (4.8, 3.4)  # inches


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
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    groups = group_figures(records)
    figure = Figure(figsize=(PANEL[0] * len(groups), PANEL[1]), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, (metric, names) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
        colors = colormaps["viridis"].resampled(len(names) + 1)  # its last, a light yellow, is left out
        for i, name in enumerate(names):
            points = [(record["step"], record[name]) for record in records if name in record]
            label = f"{_steps(name)} step{'s' * (_steps(name) > 1)}" if "@" in name else None
            axes.plot(*zip(*points, strict=True), color=colors(i), marker="o", markersize=3.5, label=label)
            marked = [point for point in points if best == (name, point[0])]
            if marked:
                x, y = marked[0]
                axes.plot(x, y, color=colors(i), marker="*", markersize=14, linestyle="", label=f"best {name}")
        column = METRICS[metric].columns[metric] if metric in METRICS else Column(metric.replace("_", " "), "")
        if column.format.endswith("%"):
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        lower = f" ({'lower' if METRICS[metric].lower_is_better else 'higher'} is better)" if metric in METRICS else ""
        axes.set(xlabel="updates", ylabel=column.heading + lower)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if any("@" in name for name in names):
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
