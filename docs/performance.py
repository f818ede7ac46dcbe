"""Print the tables of docs/performance.md from the benchmark's JSON files, and draw how time grows.

    python -m lcm_jax.benchmark --suite=sample --batch=1,2,4,8,16 --steps=1,2,4,8 --json=growth.json
    python -m lcm_jax.benchmark --suite=sample --size=32,64,96,128 --json=sizes.json
    python docs/performance.py growth.json sizes.json --plot=docs/performance.png

Time is fitted, with the least relative error, by a + b x for numbers of steps and of images, and by a x^b for pixels,
wherever three or more rows differ in that alone.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lcm_jax.benchmarks.report import COLUMNS, cells

AXES = {  # what grows: its unit in the formula
    "steps": "step",
    "batch": "image",
    "pixels": "pixel",
}
HELD = ("side", "suite", "part", "dtype", "vae", "steps", "batch", "pixels")
COLORS = {"lcm_jax": "tab:blue", "diffusers": "tab:orange"}


@dataclass(frozen=True)
class Growth:
    """Rows that differ in one axis alone.

    x, ms: the values of the axis and the medians, float64[n]. held: the other settings. a, b: of a + b x, or a x^b.
    """

    axis: str
    held: Mapping[str, Any]
    x: np.ndarray
    ms: np.ndarray
    a: float
    b: float

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self.a * x**self.b if self.axis == "pixels" else self.a + self.b * x

    @property
    def formula(self) -> str:
        if self.axis == "pixels":
            return f"time grows with pixels^{self.b:.2f}"
        return f"{self.a:.3g} ms + {self.b:.3g} ms for each {AXES[self.axis]}"

    @property
    def error(self) -> float:
        """The largest relative error of the fit."""
        return float(np.max(np.abs(self.predict(self.x) / self.ms - 1)))

    @property
    def where(self) -> str:
        suite = {"train": self.held["part"], "sample": "sample"}.get(self.held["suite"], self.held["suite"])
        parts = [suite, self.held["side"]]
        parts += [f"{self.held['steps']} steps"] if self.axis != "steps" and self.held["steps"] else []
        parts += [f"batch {self.held['batch']}"] if self.axis != "batch" else []
        parts += [f"{round(self.held['pixels'] ** 0.5)} pixels wide"] if self.axis != "pixels" else []
        return ", ".join(parts + [f"{self.held['vae']} VAE"] * (self.held["vae"] != "own"))


def read(path: str) -> dict[str, Any]:
    """Read a file of the benchmark. Raises SystemExit with a line that names it if it is not one."""
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
        return results | {"rows": [dict(row) for row in results["rows"]]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"error: {path} is not a file of lcm_jax.benchmark ({error}); use one of its --json") from None


def table(results: Mapping[str, Any]) -> str:
    """Return the rows of a file as a table in Markdown, without empty columns, below a line on its origin."""
    rows = [cells(row) if "error" not in row else failed(row) for row in results["rows"]]
    kept = [i for i in range(len(COLUMNS)) if any(row[i] for row in rows)]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        f"{results['model']} on {results['device']}, {results['cores']} cores; {versions}; {results['date']}, commit "
        f"{results['commit'] or 'unknown'}; `{results['command']}`",
        "",
        "| " + " | ".join(COLUMNS[i] for i in kept) + " |",
        "|" + "---|" * len(kept),
        *("| " + " | ".join(row[i].replace("|", "/") for i in kept) + " |" for row in rows),
    ]
    return "\n".join(lines)


def failed(row: Mapping[str, Any]) -> list[str]:
    return [row["case"], row["side"], "failed", row["error"], *[""] * (len(COLUMNS) - 4)]


def find_growth(files: Sequence[Mapping[str, Any]]) -> list[Growth]:
    """Return the fits of all rows, of all files, that differ in one axis alone."""
    rows = [
        {**row, "pixels": row["size"] ** 2, "where": (results["model"], results["device"])}
        for results in files
        for row in results["rows"]
        if "error" not in row and row["suite"] in ("sample", "decode", "train")
    ]
    made = []
    for axis in AXES:
        groups: dict[tuple, dict[float, float]] = {}
        for row in rows:
            key = (row["where"], *(row[name] for name in HELD if name != axis))
            groups.setdefault(key, {})[row[axis]] = row["ms"]
        for key, points in groups.items():
            if len(points) >= 3:
                held = dict(zip([name for name in HELD if name != axis], key[1:], strict=True))
                made.append(fit(axis, held, points))
    return made


def fit(axis: str, held: Mapping[str, Any], points: Mapping[float, float]) -> Growth:
    x, ms = (np.array(values, np.float64) for values in zip(*sorted(points.items()), strict=True))
    if axis == "pixels":
        b, a = np.polyfit(np.log(x), np.log(ms), 1)
        return Growth(axis, held, x, ms, float(np.exp(a)), float(b))
    b, a = np.polyfit(x, ms, 1, w=1 / ms)
    return Growth(axis, held, x, ms, float(a), float(b))


def growth_table(growths: Sequence[Growth]) -> str:
    """Return the fits as a table in Markdown."""
    lines = ["| rows | time | measured | largest error |", "|---|---|---|---|"]
    for each in growths:
        span = f"{AXES[each.axis]}s: {', '.join(f'{value:g}' for value in each.x)}"
        lines.append(f"| {each.where} | {each.formula} | {span} | {each.error:.0%} |")
    return "\n".join(lines)


def plot(growths: Sequence[Growth], path: str) -> None:
    """Draw the points and the fits, a panel for each axis that there is."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axes = [axis for axis in AXES if any(each.axis == axis for each in growths)]
    figure, panels = plt.subplots(1, len(axes), figsize=(4.5 * len(axes), 3.6), squeeze=False)
    for axis, panel in zip(axes, panels[0], strict=True):
        chosen: list[Growth] = [each for each in growths if each.axis == axis]
        for number, each in enumerate(chosen):
            color = COLORS.get(each.held["side"], f"C{number}")
            x = np.geomspace(each.x[0], each.x[-1], 100)
            panel.plot(each.x, each.ms, "o", color=color, markersize=4)
            panel.plot(x, each.predict(x), color=color, linewidth=1)
            panel.annotate(each.where, (each.x[-1], each.ms[-1]), fontsize=5, ha="right", va="bottom")
        panel.set(xscale="log", yscale="log", xlabel=f"{AXES[axis]}s", ylabel="ms" if panel is panels[0][0] else "")
        panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="of lcm_jax.benchmark --json")
    parser.add_argument("--plot", default="", help="PNG to write")
    options = parser.parse_args(arguments)
    files = [read(path) for path in options.files]
    for results in files:
        print(table(results) + "\n")
    growths = find_growth(files)
    if growths:
        print(growth_table(growths))
    if options.plot and not growths:
        raise SystemExit("error: there are no three rows that differ in steps, batch or size alone; time more of them")
    if options.plot:
        plot(growths, options.plot)


if __name__ == "__main__":
    main()
