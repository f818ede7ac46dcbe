"""Figures of an evaluation: quality against steps and seconds, and the worst and the best images."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from lcm_jax.evaluation.evaluate import Metric
from lcm_jax.files import whole_file

PANEL = (4.2, 3.2)  # inches
TILE = 128  # pixels of an image on the sheet
CAPTION = 30  # pixels below it


def draw_quality(rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, Metric], path: Path) -> None:
    """Write a PNG with two panels for each metric: its figure against the sampling steps and against seconds per image.

    rows: of the report. A bar is the 95% interval of a figure.
    """
    from matplotlib import colormaps  # takes a second
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter, ScalarFormatter

    lines = list(dict.fromkeys((row["model"], row["sampler"]) for row in rows))
    figure = Figure(figsize=(2 * PANEL[0], PANEL[1] * len(metrics)), layout="constrained")
    FigureCanvasAgg(figure)
    colors = colormaps["tab10"].colors  # pyright: ignore[reportAttributeAccessIssue]
    for axes, metric in zip(figure.subplots(len(metrics), 2, squeeze=False), metrics.values(), strict=True):
        name, column = next(iter(metric.columns.items()))
        better = "lower" if metric.lower_is_better else "higher"
        for number, (model, sampler) in enumerate(lines):
            own = [row for row in rows if (row["model"], row["sampler"]) == (model, sampler)]
            own.sort(key=lambda row: row["steps"])
            values = [row[name] for row in own]
            ranges = [row["intervals"].get(name, (value, value)) for row, value in zip(own, values, strict=True)]
            bars = [[max(v - low, 0) for v, (low, _) in zip(values, ranges, strict=True)]]
            bars.append([max(high - v, 0) for v, (_, high) in zip(values, ranges, strict=True)])
            style = {
                "color": colors[number % 10],
                "marker": "o",
                "markersize": 3.5,
                "capsize": 2,
                "label": f"{model} {sampler}",
            }
            axes[0].errorbar([row["steps"] for row in own], values, bars, **style)
            axes[1].errorbar([1 / row["images_per_s"] for row in own], values, bars, **style)
        for each, label in zip(axes, ("steps", "seconds per image"), strict=True):
            each.set_xscale("log")
            each.xaxis.set_major_formatter(ScalarFormatter())
            each.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            each.xaxis.set_minor_formatter(NullFormatter())
            each.set(xlabel=label, ylabel=f"{column.heading} ({better} is better)")
            each.grid(alpha=0.3)
            if column.format.endswith("%"):
                each.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes[0].set_xticks(steps := sorted({row["steps"] for row in rows}), [str(n) for n in steps])
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3), fontsize="small")
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def save_extremes(
    images: Sequence[np.ndarray], scores: np.ndarray, prompts: Sequence[str], order: Sequence[int], path: Path
) -> None:
    """Write a PNG of images with their scores and prompts: the worst in the upper rows, the best in the lower ones.

    images: uint8[H, W, 3] each, of the numbers in `order`, from the worst to the best; scores, prompts: of all images.
    """
    columns = 8
    half = -(-len(images) // 2)
    rows = [list(range(half)), list(range(half, len(images)))]
    lines = [part[i : i + columns] for part in rows for i in range(0, len(part), columns)]
    sheet = Image.new("RGB", (columns * (TILE + 6), len(lines) * (TILE + CAPTION + 6)), "white")
    draw = ImageDraw.Draw(sheet)
    for y, line in enumerate(lines):
        for x, position in enumerate(line):
            left, top = x * (TILE + 6), y * (TILE + CAPTION + 6)
            sheet.paste(Image.fromarray(images[position]).resize((TILE, TILE)), (left, top))
            number = order[position]
            text = textwrap.wrap(f"{scores[number]:.3g}  {prompts[number]}", 21)[:2]
            draw.text((left, top + TILE + 1), "\n".join(text), fill="black", font_size=11)
    with whole_file(path) as temporary:
        sheet.save(temporary, format="PNG")


def extremes(scores: np.ndarray, count: int = 32) -> list[int]:
    """Return the numbers of the worst and the best images, from the worst to the best; ties in their order."""
    order = np.argsort(scores, kind="stable")
    half = min(count, len(order)) // 2
    return [*order[:half].tolist(), *order[len(order) - (min(count, len(order)) - half) :].tolist()]
