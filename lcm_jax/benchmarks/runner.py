"""Run the cases of the benchmark, the two sides in turns, each in its own process."""

import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from lcm_jax import files
from lcm_jax.benchmarks import cases
from lcm_jax.benchmarks.cases import TOLERANCES, Case, Selection
from lcm_jax.benchmarks.compare import difference
from lcm_jax.benchmarks.report import summary
from lcm_jax.benchmarks.sides import OURS, Side, SideError, environment, last_line
from lcm_jax.benchmarks.start import run_start
from lcm_jax.profiling.trace import check_new

SLOW = 10.0  # seconds of a first run after which no other one warms up
PROFILED = ("sample", "decode", "train")  # suites
Row = dict[str, Any]


def has_accelerator() -> bool:
    """Return True if JAX's default device is not a CPU. A separate process asks, so that the device stays free.

    Raises ValueError with JAX's reason if there is no device.
    """
    done = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.default_backend())"], capture_output=True, text=True
    )
    if done.returncode:
        raise ValueError(f"JAX has no device: {last_line(done.stderr)}")
    return done.stdout.strip() != "cpu"


def commit() -> str | None:
    """Return the commit of the package, with -dirty if files have changed, or None if it is not in a git checkout."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:  # no git
        return None
    return done.stdout.strip() or None


def write_models(planned: Sequence[Case], folder: Path, deadline: float) -> None:
    """Write the random models that the cases need to `folder`. Raises ValueError if that fails."""
    used = [case for case in planned if case.suite in ("sample", "decode", "train") or case.part == "image"]
    parts = set()
    for case in used:
        if case.model in cases.RANDOM:
            parts.add("teacher" if case.suite == "train" else "student")
        if case.vae == "tiny":
            parts.add("tiny_vae")
    if not parts:
        return
    arguments = [used[0].model, used[0].dtype, str(folder / "models"), *sorted(parts)]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "lcm_jax.benchmarks.random_model", *arguments],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=deadline - time.monotonic(),
        )
    except subprocess.TimeoutExpired:
        raise ValueError("writing a random model exceeded the time limit; raise --limit") from None
    if done.returncode:
        raise ValueError(f"a random model could not be written: {last_line(done.stderr)}")


def run(
    selection: Selection,
    *,
    peer: str | None,
    repeats: int,
    row_limit: float,
    limit: float,
    json_file: str | None,
    profile: Path | None = None,
) -> dict[str, Any]:
    """Run every case and return {"rows": [...]}, the settings and the machine; see `run_case` for a row.

    row_limit, limit: in seconds, for a case and for all cases. json_file: rewritten after each case. profile: new
    folder for a profile of our side of each case, see `write_profile`. Raises ValueError if nothing can be run, and
    OSError if json_file cannot be written.
    """
    if profile is not None:
        check_new(profile)
    deadline = time.monotonic() + limit
    accelerator = has_accelerator()
    planned = cases.plan(selection, accelerator)
    names = [OURS, *([peer] if peer else [])]
    results: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "lcm_jax.benchmark", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "commit": commit(),
        "device": None,
        "cores": os.cpu_count(),
        "versions": {},
        "model": selection.model,
        "repeats": repeats,
        "peak": {},
        "rows": [],
    }
    with tempfile.TemporaryDirectory(prefix="lcm_jax-benchmark-") as name:
        folder = Path(name)
        write_models(planned, folder, deadline)
        for _, group in groupby(planned, lambda case: case.group):
            with open_sides(names, folder) as sides:
                for case in group:
                    began = time.monotonic()
                    rows = run_row(case, names, sides, repeats, min(began + row_limit, deadline), folder, accelerator)
                    add_peaks(results, rows)
                    if json_file:
                        files.write_text(Path(json_file), json.dumps(results, indent=1) + "\n")
                    for row in rows:
                        took = time.monotonic() - began
                        print(f"{row['case']}, {row['side']}: {summary(row)}  [{took:.0f} s]", flush=True)
                    if profile is not None and case.suite in PROFILED and "error" not in rows[0]:
                        write_profile(case, sides, profile, deadline)
    return results


def write_profile(case: Case, sides: dict[str, Side], folder: Path, deadline: float) -> None:
    """Write a profile of one more run of our side to a folder in `folder`, named after the case, and print its name."""
    target = (folder / re.sub(r"\W+", "-", case.name)).absolute()
    try:
        sides[OURS].ask(f"profile {target}", deadline)
        print(f"a profile is in {target}; python -m lcm_jax.profile {target} prints it", flush=True)
    except SideError as error:
        print(f"{case.name}: no profile was written: {error}", flush=True)
        sides.pop(OURS).close()


@contextmanager
def open_sides(names: Sequence[str], folder: Path) -> Iterator[dict[str, Side]]:
    """Yield the processes of a group of cases, which `run_case` starts, and end them."""
    sides: dict[str, Side] = {}
    try:
        yield sides
    finally:
        for side in sides.values():
            side.close()


def add_peaks(results: dict[str, Any], rows: list[Row]) -> None:
    """Add the rows of a case to the results, and to each its shares of the device's peaks.

    "peak" has the larger figure of both sides: tflops of the matrix product, gb_per_s of the copy.
    """
    peak = results["peak"]
    for row in rows:
        for name in ("tflops", "gb_per_s"):
            if row["suite"] == "peak" and name in row:
                peak[name] = max(peak.get(name, 0.0), row[name])
    for row in rows:
        for name, share in (("tflops", "share_of_peak"), ("gb_per_s", "share_of_copy")):
            if name in row and name in peak:
                row[share] = digits(row[name] / peak[name])
        if "versions" in row:
            results["versions"] |= row.pop("versions")
            results["device"] = results["device"] or row["device"]
    results["rows"] += rows


def run_row(
    case: Case, names: Sequence[str], sides: dict[str, Side], repeats: int, deadline: float, folder: Path, at_once: bool
) -> list[Row]:
    """Return the rows of a case: "error", or the figures of `add_figures`. sides: of its group, see `run_case`."""
    names = names[:1] if case.alone else names
    facts = {name: value for name, value in asdict(case).items() if name != "model"}
    rows: dict[str, Row] = {name: {"case": case.name, "side": name, **facts} for name in names}
    if time.monotonic() >= deadline:
        for row in rows.values():
            row["error"] = "not run: --limit was reached"
        return list(rows.values())
    if case.suite == "start":
        more, seconds = run_start(case, names, repeats, deadline, folder)
    else:
        more, seconds = run_case(case, names, sides, repeats, deadline, folder, at_once)
    for name in names:
        rows[name] |= more[name]
    flops, nbytes, size = (
        next((row[key] for row in rows.values() if row.get(key)), None) for key in ("flops", "bytes", "size")
    )  # as one side has counted them
    for name, row in rows.items():
        if "error" not in row:
            row["size"] = size or 0
            add_figures(row, seconds[name], case.images, flops, nbytes)
    if len(names) == 2 and all("error" not in row for row in rows.values()):
        ratios = [b / a for a, b in zip(*(seconds[name] for name in names), strict=False)]
        figures = (("ratio", statistics.median(ratios)), ("ratio_min", min(ratios)), ("ratio_max", max(ratios)))
        rows[names[1]] |= {name: round(value, 3) for name, value in figures}
    return list(rows.values())


def run_case(
    case: Case, names: Sequence[str], sides: dict[str, Side], repeats: int, deadline: float, folder: Path, at_once: bool
) -> tuple[dict[str, Row], dict[str, list[float]]]:
    """Compare the outputs of both sides, then time them in turns: (rows, seconds of the timed runs), both by side.

    A row has the facts of its side, among them first_s, the seconds of its first run, and saved_s, the seconds of
    compilation that the cache has saved; peak_bytes; "difference" of the outputs; or "error". sides: processes that are
    running; those that are missing are started, those that fail are closed. at_once: both sides may compile at the same
    time.
    """
    rows: dict[str, Row] = {name: {} for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    answers: dict[str, dict[str, Any]] = {}

    def fail(name: str, reason: str) -> None:
        rows[name]["error"] = reason
        sides.pop(name).close()

    def exchange(requests: Mapping[str, str]) -> None:
        """Send a request to each side that has not failed, at once or one after the other, and keep the answers."""
        active = [name for name in requests if "error" not in rows[name]]
        for some in [active] if at_once else [[name] for name in active]:
            for name in some:
                sides[name].send(requests[name])
            for name in some:
                try:
                    answers[name] = sides[name].receive(deadline)
                except SideError as error:
                    fail(name, str(error))

    for name in names:
        if name not in sides:
            sides[name] = Side(name, folder, environment(folder, names))
    prepare, (first, *others) = f"prepare {case.to_json()}", names
    (folder / "draws.npz").unlink(missing_ok=True)
    exchange({first: prepare})
    if "error" in rows[first] and case.suite != "peak":
        for name in others:
            fail(name, f"not run, since {first} has failed before it wrote the random numbers for both")
    exchange({first: "first", **dict.fromkeys(others, prepare)})
    exchange(dict.fromkeys(others, "first"))
    for name in [name for name in names if "error" not in rows[name]]:
        rows[name] |= answers[name]["facts"]
    if others and all("error" not in row for row in rows.values()):
        outputs = [answers[name]["outputs"] for name in names]
        if not compare_outputs(case, rows, outputs):
            return rows, seconds
    if all(row.get("first_s", 0) < SLOW for row in rows.values()):
        at_once = False  # from now on one after the other
        exchange(dict.fromkeys(names, "run"))  # a second warm-up run: caches and clocks settle
    for turn in range(repeats):
        for name in [name for name in names if "error" not in rows[name]]:
            if turn and time.monotonic() + 2 * seconds[name][-1] > deadline:
                continue  # earlier turns count
            try:
                seconds[name].append(sides[name].ask("run", deadline)["seconds"])
            except SideError as error:
                fail(name, str(error))
    for name in [name for name in names if "error" not in rows[name]]:
        try:
            rows[name] |= sides[name].ask("finish", deadline + 10)
        except SideError as error:
            fail(name, str(error))
    return rows, seconds


def compare_outputs(case: Case, rows: Mapping[str, Row], outputs: Sequence[str]) -> bool:
    """Set "difference" of both rows, or "error" and return False if it is beyond the tolerance of the dtype."""
    ours, theirs = (dict(np.load(file)) for file in outputs)
    name, found = difference(ours, theirs)
    tolerance = TOLERANCES[case.dtype]
    for row in rows.values():
        if found > tolerance:
            row["error"] = f"the {name} of the two sides differ by {found:.2g}, and {tolerance} is allowed"
        elif ours:
            row["difference"] = digits(found, 2)
    return found <= tolerance


def add_figures(row: Row, seconds: Sequence[float], images: int, flops: int | None, nbytes: int | None) -> None:
    """Add the figures of the timed runs to a row.

    ms, ms_min, ms_max: median and range. images_per_s: images / median. tflops: matrix work / median. gb_per_s: bytes
    that must be read and written at least / median. peak_gb: peak memory. Others are added later, if there are two
    sides: ratio, ratio_min, ratio_max of the second one, median and range over the turns of its time / the first
    side's. Of the suite data: bytes_per_image on disk; cpu_ms, the processor time of an image; cores, the number that
    feeds an accelerator which needs `cases.IMAGES_PER_S`.
    """
    median = statistics.median(seconds)
    for name, value in (("ms", median), ("ms_min", min(seconds)), ("ms_max", max(seconds))):
        row[name] = round(1e3 * value, 3)
    row["runs"] = len(seconds)
    if images:
        row["images_per_s"] = round(images / median, 3)
    if flops:
        row["flops"], row["tflops"] = flops, digits(flops / median / 1e12)
    if nbytes:
        row["bytes"], row["gb_per_s"] = nbytes, digits(nbytes / median / 1e9)
    if (peak_bytes := row.pop("peak_bytes", None)) is not None:
        row["peak_gb"] = round(peak_bytes / 1e9, 3)


def digits(value: float, number: int = 4) -> float:
    """Return a value with this number of significant digits."""
    return float(f"{value:.{number}g}")
