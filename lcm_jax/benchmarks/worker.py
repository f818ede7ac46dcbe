"""The protocol of both sides: a process that prepares one case and times it on request.

It writes one JSON object per line: {"facts": ...} after the first run of the case, {"seconds": ...} for each line "run"
that it reads, and {"peak_bytes": ..., ...} for the line "stop". All other output of the process goes to stderr.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from lcm_jax.benchmarks.cases import Case


class Prepared(NamedTuple):
    """A case that is ready to run."""

    run: Callable[[], Any]  # runs the case once, until its result is complete
    facts: dict[str, Any]  # device, versions, and "flops" of one run if this side counts them
    peak_bytes: Callable[[], int | None]  # peak device memory; None if the device does not record it
    taken: Callable[[], dict[str, float]] = dict  # more figures of all runs


def host_peak_bytes() -> int:
    """Return the peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def serve(prepare: Callable[[Case], Prepared]) -> None:
    """Prepare the case given as JSON on the command line, run it once, and answer requests until "stop"."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(**message: Any) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    def timed() -> float:
        began = time.perf_counter()
        prepared.run()
        return time.perf_counter() - began

    prepared = prepare(Case(**json.loads(sys.argv[1])))
    first = timed()
    send(facts=prepared.facts | {"first_s": round(first, 2)})
    for line in sys.stdin:
        if line.strip() == "run":
            send(seconds=timed())
        else:
            send(peak_bytes=prepared.peak_bytes(), **prepared.taken())
            return
