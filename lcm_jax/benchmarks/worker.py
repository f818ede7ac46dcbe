"""A process that prepares one case and times it each time it is asked to: the protocol of both sides.

The parent reads one JSON object per line: {"facts": ...} when the case has run once, then {"seconds": ...} for each
line "run" that it writes, and {"peak_bytes": ...} for the line "stop". Everything else that the process or its
libraries print goes to stderr.
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

    run: Callable[[], Any]  # runs the case once and returns when its result is complete
    facts: dict[str, Any]  # device, versions, and "flops" of one run if this side counts them
    peak_bytes: Callable[[], int | None]  # device memory in use at most; None if the device does not record it


def host_peak_bytes() -> int:
    """Return the largest resident memory that this process had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def serve(prepare: Callable[[Case], Prepared]) -> None:
    """Prepare the case given as JSON on the command line, run it once, and answer the parent until it says stop."""
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
            send(peak_bytes=prepared.peak_bytes())
            return
