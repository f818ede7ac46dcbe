"""The protocol of both sides: a process that prepares cases and runs them on request.

It reads a line for each request, and answers each with a line of JSON:

    prepare {case}   builds the model and the inputs of a case: {}
    first            runs it for the first time: {"facts": ..., "outputs": file}
    run              runs it: {"seconds": ...}
    profile FOLDER   runs it, and writes a profile to a new folder: {}
    finish           {"peak_bytes": ..., ...}

All other output of the process goes to stderr. The folder on the command line is shared by both sides: the first one
writes the random numbers of a case there, from which the other one computes the same outputs.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lcm_jax.benchmarks.cases import Case


class Prepared(NamedTuple):
    """A case that is ready to run."""

    run: Callable[[], Any]  # runs the case once, until its result is complete
    outputs: Callable[[], Mapping[str, Any]]  # the first run, with shared random numbers; what the sides must agree on
    facts: dict[str, Any]  # device, versions, mode, and "flops" and "bytes" of one run if this side counts them
    peak_bytes: Callable[[], int | None]  # peak device memory; None if the device does not record it
    taken: Callable[[], Mapping[str, float]] = dict  # more figures of all runs
    profile: Callable[[Path], None] | None = None  # runs the case, and writes a profile to a new folder


def host_peak_bytes() -> int:
    """Return the peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_draws(folder: Path, **arrays: Any) -> None:
    """Write the random numbers of a case for the other side."""
    save(folder / "draws.npz", arrays)


def save(file: Path, arrays: Mapping[str, Any]) -> None:
    np.savez(file, **{name: np.asarray(array) for name, array in arrays.items()})  # pyright: ignore[reportArgumentType]


def read_draws(folder: Path) -> dict[str, np.ndarray]:
    """Return what `write_draws` has written."""
    with np.load(folder / "draws.npz") as file:
        return dict(file)


def serve(prepare: Callable[[Case, Path], Prepared]) -> None:
    """Answer requests until the standard input ends; see the module's docstring."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    folder = Path(sys.argv[1])
    prepared: Any = None

    def first() -> dict[str, Any]:
        began = time.perf_counter()
        outputs = prepared.outputs()
        seconds = round(time.perf_counter() - began, 2)
        file = folder / f"outputs-{os.getpid()}.npz"
        save(file, outputs)
        return {"facts": {"first_s": seconds} | prepared.facts, "outputs": str(file)}

    def run() -> dict[str, float]:
        began = time.perf_counter()
        prepared.run()
        return {"seconds": time.perf_counter() - began}

    for line in sys.stdin:
        request, _, argument = line.strip().partition(" ")
        answer: dict[str, Any] = {}
        if request == "prepare":
            prepared = None  # frees the model of the case before
            prepared = prepare(Case(**json.loads(argument)), folder)
        elif request == "first":
            answer = first()
        elif request == "run":
            answer = run()
        elif request == "profile":
            prepared.profile(Path(argument))
        else:
            answer = {"peak_bytes": prepared.peak_bytes(), **prepared.taken()}
        channel.write(json.dumps(answer) + "\n")
        channel.flush()
