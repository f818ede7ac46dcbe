"""Several processes of one run: how they find each other, which one writes, and where they wait for each other.

With one process, which is the rule, every function here returns at once.
"""

import itertools
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from lcm_jax.errors import RunError, first_line

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# The number of processes in clusters whose addresses JAX finds by itself.
CLUSTERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
WAIT_SECONDS = 24 * 3600  # for what the first process alone does: indexing, encoding, previews, the report
SHUTDOWN_SECONDS = 30  # after an error in one process, the others end with it
_numbers = itertools.count()  # a barrier's name is used once


def initialize(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Join the other processes of this run, if there are any; call it before any device is used.

    coordinator: host:port of process 0. processes: their number. process: the number of this one. Each defaults to its
    variable of `VARIABLES`; with none of them, JAX finds the processes of Slurm, Open MPI and TPU pods.
    Raises RunError if only some of them are given or the others cannot be reached.
    """
    if processes == 1:
        return
    address, count, number = (os.environ.get(name) for name in VARIABLES)
    given = (coordinator or address, processes or count, number if process is None else process)
    if not any(each is not None for each in given):
        if not in_cluster(os.environ):
            return
        given = (None, None, None)
    elif any(each is None for each in given):
        raise RunError(
            "only some of --coordinator, --num_processes and --process_id are given; pass all three, or set "
            f"{', '.join(VARIABLES)}"
        )
    count, number = (None if each is None else int(each) for each in given[1:])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # the default has none between processes
    try:
        jax.distributed.initialize(given[0], count, number, shutdown_timeout_seconds=SHUTDOWN_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"the processes of this run cannot join at {given[0] or 'the address that JAX found'} "
            f"({first_line(error)}); start all of them, each with its own --process_id"
        ) from error
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # one process prints


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Return True if the environment is that of one of several processes whose addresses JAX finds by itself."""
    several = any(int(environment.get(name) or 1) > 1 for name in CLUSTERS)
    return several or "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def is_main() -> bool:
    """Return True in the process that writes files and prints."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Return when every process has come here. Waits without the devices, whose collectives time out."""
    if jax.process_count() > 1:
        multihost.get_barrier_sync_fn()(key=f"{name} {next(_numbers)}", timeout_ms=WAIT_SECONDS * 1000)


@contextmanager
def main_first(name: str) -> Iterator[None]:
    """Run the block in the main process, then in the others, which find the files that it has made."""
    if not is_main():
        wait_for_all(name)
    yield
    if is_main():
        wait_for_all(name)


def any_process(flag: bool) -> bool:
    """Return True in every process if `flag` is True in one."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def local(tree: Any) -> Any:
    """Return a tree of arrays as one process can use it alone; every process has to call it.

    Replicated arrays are not copied; arrays that processes share are gathered to the host.
    """
    if jax.process_count() == 1:
        return tree

    def whole(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return x
        return x.addressable_data(0) if x.is_fully_replicated else multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(whole, tree)
