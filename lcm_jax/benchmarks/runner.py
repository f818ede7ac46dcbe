"""Run the cases of the benchmark in one process per side, and print the results as a table."""

import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lcm_jax import files
from lcm_jax.benchmarks import cases
from lcm_jax.benchmarks.cases import Case

SIDES = {"lcm_jax": "lcm_jax.benchmarks.ours", "diffusers": "lcm_jax.benchmarks.diffusers_peer"}
SHARED_MEMORY = "0.45"  # share of a GPU for JAX if the peer's process uses the rest


class SideError(RuntimeError):
    """A side could not run its case; the message is the reason."""


class Side:
    """The process of one side and one case."""

    def __init__(self, module: str, case: Case, environment: Mapping[str, str]):
        self._errors = tempfile.TemporaryFile("w+", errors="replace")
        process = subprocess.Popen(
            [sys.executable, "-m", module, case.to_json()],
            env=os.environ | environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        assert process.stdin is not None and process.stdout is not None
        self._process, self._requests, self._answers = process, process.stdin, process.stdout
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._answers:
            self._lines.put(line)
        self._lines.put("")

    def receive(self, deadline: float) -> dict[str, Any]:
        """Return the next message. Raises SideError if the process fails, or has not answered at `deadline`."""
        try:
            line = self._lines.get(timeout=max(deadline - time.monotonic(), 0.01))
        except queue.Empty:
            raise SideError("the time limit was exceeded; raise --row_limit or --limit") from None
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            lines = [text.strip() for text in self._errors if text.strip()]
            raise SideError(lines[-1][:300] if lines else f"its process ended with exit code {code}")
        return json.loads(line)

    def ask(self, request: str, deadline: float) -> dict[str, Any]:
        """Send a request and return its answer. Raises SideError as `receive` does."""
        try:
            self._requests.write(request + "\n")
            self._requests.flush()
        except OSError:  # the process has ended; `receive` raises the reason
            pass
        return self.receive(deadline)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()


def has_accelerator() -> bool:
    """Return True if JAX's default device is not a CPU. A separate process asks, so that the device stays free.

    Raises ValueError with JAX's reason if there is no device.
    """
    done = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.default_backend())"], capture_output=True, text=True
    )
    if done.returncode:
        raise ValueError(f"JAX has no device: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.strip() != "cpu"


def run(
    suites: Sequence[str],
    model: str,
    batches: Sequence[int],
    steps: Sequence[int],
    dtype: str | None,
    *,
    peer: str | None,
    repeats: int,
    row_limit: float,
    limit: float,
    json_file: str | None,
) -> dict[str, Any]:
    """Run every case and return {"rows": [...]} and the settings; see `run_case` for a row.

    row_limit, limit: in seconds, for a case and for all cases. json_file: rewritten after each case. Raises ValueError
    for a case that is not supported, and OSError if json_file cannot be written.
    """
    cases.check(suites, model, batches, steps, dtype)
    planned = cases.plan(suites, model, batches, steps, dtype, has_accelerator())
    deadline = time.monotonic() + limit
    names = ["lcm_jax", *([peer] if peer else [])]
    results: dict[str, Any] = {"model": model, "dtype": planned[0].dtype, "repeats": repeats, "rows": []}
    peak = None
    rows: list[dict[str, Any]]
    for case in planned:
        sides = names[:1] if case.suite in ("matmul", "data") else names
        began = time.monotonic()
        if began >= deadline:
            rows = [{"case": case.name, "side": side, "error": "not run: --limit was reached"} for side in sides]
        else:
            rows = run_case(case, sides, repeats, min(began + row_limit, deadline))
        if case.suite == "matmul":
            peak = rows[0].get("tflops")
        for row in rows:
            if peak and "tflops" in row:
                row["share_of_peak"] = round(row["tflops"] / peak, 4)
        results["rows"] += rows
        if json_file:
            files.write_text(Path(json_file), json.dumps(results, indent=1) + "\n")
        for row in rows:
            print(f"{row['case']}, {row['side']}: {summary(row)}  [{time.monotonic() - began:.0f} s]", flush=True)
    return results


def run_case(case: Case, names: Sequence[str], repeats: int, deadline: float) -> list[dict[str, Any]]:
    """Return a row for each side: "error", or these figures of the timed runs after the first.

    first_s: seconds of the first run; saved_s: seconds of compilation saved by the cache. ms, ms_min, ms_max: median
    and range. images_per_s: images of a run / median. tflops: matrix work / median. peak_gb: peak memory.
    ratio (second side only): the median over the turns of its time / the first side's. Of the suite data:
    bytes_per_image on disk; cpu_ms, the processor time of an image; cores, the number that feeds an accelerator which
    needs `cases.IMAGES_PER_S`.
    """
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": SHARED_MEMORY} if len(names) > 1 else {}
    written = tempfile.TemporaryDirectory(prefix="lcm_jax-benchmark-")  # by processes that are killed in the end
    environment["TMPDIR"] = written.name
    sides: dict[str, Side] = {}
    rows: dict[str, dict[str, Any]] = {name: {"case": case.name, "side": name} for name in names}
    seconds: dict[str, list[float]] = {}

    def attempt(name: str, action) -> None:
        try:
            action()
        except SideError as error:
            rows[name]["error"] = str(error)
            sides.pop(name).close()

    try:
        for name in names:
            sides[name] = Side(SIDES[name], case, environment)
        for name in names:

            def prepare(name=name):
                rows[name] |= sides[name].receive(deadline)["facts"]
                sides[name].ask("run", deadline)  # a second warm-up run: caches and clocks settle
                seconds[name] = []

            attempt(name, prepare)
        for turn in range(repeats):
            for name in list(sides):
                if turn and time.monotonic() + 2 * seconds[name][-1] > deadline:
                    continue  # earlier turns count
                attempt(name, lambda name=name: seconds[name].append(sides[name].ask("run", deadline)["seconds"]))
        for name in list(sides):
            attempt(name, lambda name=name: rows[name].update(sides[name].ask("stop", deadline + 10)))
    finally:
        for side in sides.values():
            side.close()
        written.cleanup()
    flops = next((row["flops"] for row in rows.values() if row.get("flops")), None)
    for name, row in rows.items():
        if "error" not in row:
            add_figures(row, case, seconds[name], flops)
    if len(names) == 2 and all("error" not in row for row in rows.values()):
        first, second = (seconds[name] for name in names)
        rows[names[1]]["ratio"] = round(statistics.median(b / a for a, b in zip(first, second, strict=False)), 3)
    return list(rows.values())


def add_figures(row: dict[str, Any], case: Case, seconds: Sequence[float], flops: int | None) -> None:
    """Add the figures that `run_case` lists to a row. flops: of one run, if a side counted them."""
    median = statistics.median(seconds)
    row |= {
        name: round(1e3 * f(seconds), 3) for name, f in [("ms", statistics.median), ("ms_min", min), ("ms_max", max)]
    }
    row["runs"] = len(seconds)
    if case.suite != "matmul":
        row["images_per_s"] = round(case.images / median, 3)
    if flops:
        row["flops"], row["tflops"] = flops, round(flops / median / 1e12, 4)
    peak_bytes = row.pop("peak_bytes")
    row["peak_gb"] = None if peak_bytes is None else round(peak_bytes / 1e9, 3)


def is_cached(row: Mapping[str, Any]) -> bool:
    """Return True if the compilation cache saved more than a second of the first run."""
    return row.get("saved_s", 0) > 1


def summary(row: Mapping[str, Any]) -> str:
    """Return a short description of a row."""
    if "error" in row:
        return f"failed: {row['error']}"
    images = f", {row['images_per_s']:.2f} images/s" if "images_per_s" in row else ""
    return f"first run {row['first_s']:.1f} s{' (cached)' * is_cached(row)}, then {row['ms']:.1f} ms{images}"


def show(results: Mapping[str, Any]) -> None:
    """Print the results as a table."""
    devices = " and ".join(dict.fromkeys(row["device"] for row in results["rows"] if "device" in row))
    versions = {k: v for row in results["rows"] for k, v in row.get("versions", {}).items()}
    title = f"{results['model']}, {results['dtype']}; {devices}; {', '.join(f'{k} {v}' for k, v in versions.items())}"
    table = Table(title=title)
    columns = ("case", "side", "first run, s", "ms (range)", "images/s", "TFLOP/s", "of peak", "peak GB", "x time")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < 2 else "right")
    for row in results["rows"]:
        if "error" in row:
            table.add_row(row["case"], row["side"], "failed", row["error"])
            continue
        share, ratio, peak = row.get("share_of_peak"), row.get("ratio"), row["peak_gb"]
        table.add_row(
            row["case"],
            f"{row['side']} ({row['mode']})",
            f"{row['first_s']:.1f}{'*' * is_cached(row)}",
            f"{row['ms']:.1f} ({row['ms_min']:.1f} to {row['ms_max']:.1f})",
            f"{row['images_per_s']:.2f}" if "images_per_s" in row else "",
            f"{row['tflops']:.3g}" if "tflops" in row else "",
            "" if share is None else f"{share:.1%}",
            "" if peak is None else f"{peak:.2f}",
            "" if ratio is None else f"{ratio:.2f}",
        )
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)
    for row in results["rows"]:
        if "cores" in row:
            console.print(
                f"{row['case']}: {row['bytes_per_image'] / 1e3:.0f} kB and {row['cpu_ms']:.2f} ms of a core per image; "
                f"{row['cores']:.2f} cores feed an accelerator that needs {cases.IMAGES_PER_S} images/s",
                highlight=False,
            )
    console.print("* loaded from the compilation cache   x time: the peer's time / ours, turn by turn", highlight=False)
