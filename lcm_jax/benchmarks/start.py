"""The suite "start": seconds of whole processes, to the first image, to the text of --help, and of an import."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lcm_jax.benchmarks import cases
from lcm_jax.benchmarks.cases import Case
from lcm_jax.benchmarks.sides import LATE, OURS, SideError, last_line
from lcm_jax.weights import layout

COMMANDS = ("main", "sample", "convert", "cache", "evaluate", "study", "app", "benchmark", "profile", "compare_dtypes")
IMAGES = 3  # timed processes to the first image after the one with an empty cache
PEER = "lcm_jax.benchmarks.diffusers_start"


def time_process(arguments: Sequence[str], deadline: float, variables: dict[str, str]) -> float:
    """Return the seconds of a Python process. Raises SideError if it fails, or has not ended at `deadline`."""
    began = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            env={name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"} | variables,
            timeout=max(deadline - began, 0.01),
        )
    except subprocess.TimeoutExpired:
        raise SideError(LATE) from None
    seconds = time.monotonic() - began
    if done.returncode:
        raise SideError(last_line(done.stderr) or f"its process ended with exit code {done.returncode}")
    return seconds


def processes(case: Case, name: str, folder: Path, deadline: float) -> Callable[[dict[str, Any]], float]:
    """Return a function that runs the process of one side once, and returns its seconds. It may add to the row."""
    variables = {"XDG_CACHE_HOME": str(folder / "cache"), "LCM_JAX_CACHE": "1"}  # the cache is empty at first

    def run(*arguments: str) -> float:
        return time_process(arguments, deadline, variables)

    def slowest_help(row: dict[str, Any]) -> float:
        seconds = {each: run("-m", f"lcm_jax.{each}", "--help") for each in COMMANDS}
        row["note"] = f"slowest of {len(seconds)}: lcm_jax.{max(seconds, key=seconds.__getitem__)}"
        return max(seconds.values())

    if case.part == "help":
        return slowest_help
    if case.part == "import":
        return lambda row: run("-c", f"import {name}")
    model, output = cases.model_folder(case, True, folder), folder / "images"
    if name != OURS:
        arguments = [
            PEER,
            str(layout.locate(model)),
            cases.PROMPT,
            str(case.steps),
            str(case.size),
            case.dtype,
            f"{output}.png",
        ]
    else:
        size = [f"--{side}={case.size}" for side in ("height", "width") if case.size]
        arguments = ["lcm_jax.sample", f"--model={model}", f"--prompt={cases.PROMPT}", f"--output={output}", *size]
        arguments += [f"--num_inference_steps={case.steps}", f"--dtype={case.dtype}", "--overwrite"]
    return lambda row: run("-m", *arguments)


def run_start(
    case: Case, names: Sequence[str], repeats: int, deadline: float, folder: Path
) -> tuple[dict[str, dict[str, Any]], dict[str, list[float]]]:
    """Return (a row, seconds of the processes after the first one), both by side; the sides take turns.

    A row has first_s, the seconds of the first process, or "error".
    """
    rows: dict[str, dict[str, Any]] = {name: {"mode": "process"} for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    run = {name: processes(case, name, folder, deadline) for name in names}
    for turn in range(1 + min(repeats, IMAGES if case.part == "image" else repeats)):
        for name, row in rows.items():
            if "error" in row or (turn > 1 and time.monotonic() + 2 * statistics.median(seconds[name]) > deadline):
                continue  # earlier turns count
            try:
                each = run[name](row)
            except SideError as error:
                row["error"] = str(error)
                continue
            if turn:
                seconds[name].append(each)
            else:
                row["first_s"] = round(each, 2)
    return rows, seconds
