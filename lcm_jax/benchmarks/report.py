"""The results of the benchmark as text."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from lcm_jax.benchmarks import cases

COLUMNS = (
    *("case", "side", "first run, s", "ms (range)", "images/s", "TFLOP/s", "of peak", "GB/s", "of copy", "peak GB"),
    *("x time (range)", "difference"),
)


def is_cached(row: Mapping[str, Any]) -> bool:
    """Return True if the compilation cache saved more than a second of the first run."""
    return row.get("saved_s", 0) > 1


def summary(row: Mapping[str, Any]) -> str:
    """Return a short description of a row."""
    if "error" in row:
        return f"failed: {row['error']}"
    images = f", {row['images_per_s']:.2f} images/s" if "images_per_s" in row else ""
    note = f" ({row['note']})" if "note" in row else ""
    return f"first run {row['first_s']:.1f} s{' (cached)' * is_cached(row)}, then {row['ms']:.1f} ms{images}{note}"


def cells(row: Mapping[str, Any]) -> list[str]:
    """Return the cells of a row that has not failed, for COLUMNS."""
    get = lambda name, form: format(row[name], form) if name in row else ""  # noqa: E731
    small = row["ms_max"] < 10
    milliseconds = [format(row[name], ".2f" if small else ".1f") for name in ("ms", "ms_min", "ms_max")]
    return [
        row["case"],
        f"{row['side']} ({row['mode']})",
        get("first_s", ".1f") + "*" * is_cached(row),
        "{} ({} to {})".format(*milliseconds),
        get("images_per_s", ".2f"),
        get("tflops", ".3g"),
        get("share_of_peak", ".1%"),
        get("gb_per_s", ".3g"),
        get("share_of_copy", ".1%"),
        get("peak_gb", ".2f"),
        f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})" if "ratio" in row else "",
        get("difference", ".1g"),
    ]


def show(results: Mapping[str, Any]) -> None:
    """Print the results as a table."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    where = ", ".join(str(part) for part in (results["device"], f"{results['cores']} cores", versions) if part)
    table = Table(title=f"{results['model']}; {where}; {results['date']}, commit {results['commit'] or 'unknown'}")
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if number < 2 else "right")
    for row in results["rows"]:
        if "error" in row:
            table.add_row(row["case"], row["side"], "failed", row["error"])
        else:
            table.add_row(*cells(row))
    console = Console(width=None if Console().is_terminal else 200)
    console.print(table)
    for row in results["rows"]:
        if "cores" in row:
            console.print(
                f"{row['case']}: {row['bytes_per_image'] / 1e3:.0f} kB and {row['cpu_ms']:.2f} ms of a core per image; "
                f"{row['cores']:.2f} cores feed an accelerator that needs {cases.IMAGES_PER_S} images/s",
                highlight=False,
            )
        if "note" in row:
            console.print(f"{row['case']}, {row['side']}: {row['note']}", highlight=False)
    console.print(
        "* loaded from the compilation cache   x time: the peer's time / ours, turn by turn   GB/s: of the weights "
        "that a run reads at least\nof peak, of copy: shares of what a large matrix product and a large copy reach in "
        "this run   difference: of the outputs of both sides, relative",
        highlight=False,
    )
