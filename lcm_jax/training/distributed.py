"""Several processes of one run: how they find each other, which one writes, where they wait, and how they end.

With one process, which is the rule, every function here returns at once. What processes tell each other goes through
JAX's coordination service in process 0, beside the devices: neither a message nor waiting for it stalls a step.
"""

import atexit
import ctypes
import importlib.util
import ipaddress
import itertools
import json
import os
import platform
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax._src.distributed import global_state  # orbax uses it too: JAX has no public name for what processes say
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from lcm_jax.errors import RunError, first_line

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# By launcher: the number of its processes, and of the hosts that they are on, in the environment of each.
COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")
HOSTS = ("SLURM_STEP_NUM_NODES", "SKYPILOT_NUM_NODES", "MEGASCALE_NUM_SLICES")
TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
INITIALIZATION_SECONDS = 30 * 60  # the hosts of a large job start minutes apart, and pull images first
LOOPBACK_SECONDS = 3 * 60  # processes on one host start together
HEARTBEAT_SECONDS = 60  # a process that has not been heard of for so long is lost
SHUTDOWN_SECONDS = 30  # at the end, for the last process
WAIT_SECONDS = 24 * 3600  # for what the first process alone does: indexing, encoding, previews, the report
RESUMABLE = 75  # the exit code EX_TEMPFAIL: work is left, and the same command resumes it
RESUME = "run the same command to resume"
LOST = re.compile(r"gloo|nccl|heartbeat|coordination|barrier failed|connection (closed|reset)|socket closed", re.I)
ENDED = "ended"  # under this key and its number, a process is told why another one has ended early
TELL_SECONDS = 0.5  # for that to arrive
_numbers = itertools.count()  # a name is used once


class Given(NamedTuple):
    """Where processes join; what is None, JAX finds in the environment."""

    coordinator: str | None
    processes: int | None
    process: int | None


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    timeout: int = INITIALIZATION_SECONDS,
    heartbeat: int = HEARTBEAT_SECONDS,
) -> None:
    """Join the other processes of this run, if there are any; call it once, before any device is used.

    coordinator: host:port of process 0. processes: their number. process: the number of this one. Each defaults to its
    variable of `VARIABLES`; with none of them, JAX finds the processes of Slurm, Open MPI, Kubernetes and TPU pods.
    timeout: seconds until all must have joined. heartbeat: seconds after which a silent process is lost.
    Raises RunError if only some of them are given, if a coordinator that other hosts cannot reach is given, or if the
    others do not join in time.
    """
    given = find_processes(os.environ, coordinator, processes, process)
    if given is None:
        return
    alone = given.coordinator is not None and is_loopback(given.coordinator)
    timeout = min(timeout, LOOPBACK_SECONDS) if alone else timeout
    remedy = "start all of them, each with its own --process_id"
    if alone:
        remedy += f"; {given.coordinator} is reached from this host alone, others need the address of one"
    elif given.coordinator is None:
        remedy = "start all of them, or pass --coordinator, --num_processes and --process_id (Kubernetes: jax[k8s])"
    where = given.coordinator or "the address that JAX found"
    _say_when_aborted(
        f"error: the processes of this run did not all join at {where} within {timeout} seconds; {remedy}", 1
    )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # the default has none between processes
    try:
        jax.distributed.initialize(
            *given,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise RunError(f"the processes of this run cannot join at {where} ({first_line(error)}); {remedy}") from error
    _say_when_aborted(f"error: another process of this run is gone; {RESUME}", RESUMABLE)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX only makes a note of it; `StopSignal` takes it over in time
    if given.coordinator is None and not shares_devices(os.environ):
        jax.config.update("jax_cuda_visible_devices", "all")  # where JAX would take the first alone
    if global_state.num_processes == 1:
        return
    _watch()
    if global_state.process_id:
        sys.stdout = open(os.devnull, "w")  # one process prints


def find_processes(
    environment: Mapping[str, str], coordinator: str | None, processes: int | None, process: int | None
) -> Given | None:
    """Return where the processes join, by the flags and else the environment, or None if there is one alone.

    Raises RunError as `initialize` does.
    """
    if processes == 1:
        return None
    address, count, number = (environment.get(name) or None for name in VARIABLES)
    found = (coordinator or address, processes or count, number if process is None else process)
    if all(each is None for each in found):
        return Given(None, None, None) if in_cluster(environment) else None
    if any(each is None for each in found):
        raise RunError(
            "only some of --coordinator, --num_processes and --process_id are given; pass all three, or set "
            f"{', '.join(VARIABLES)}"
        )
    address, count, number = str(found[0]), int(found[1] or 0), int(found[2] or 0)
    if not re.fullmatch(r".+:\d+", address):
        raise RunError(f"--coordinator {address} has no port; use host:port, such as node0:1234")
    if not 0 <= number < count:
        raise RunError(f"--process_id {number} is not supported with --num_processes {count}; use 0 to {count - 1}")
    if is_loopback(address) and (hosts := on_several_hosts(environment)):
        raise RunError(
            f"--coordinator {address} is this host alone, and the run has several hosts ({hosts}); use the name or the "
            "address of the host of process 0, which all of them reach"
        )
    return Given(address, count, number)


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Return True if the environment is that of one of several processes whose addresses JAX finds by itself.

    A TPU VM or an indexed Kubernetes job may be one host alone, which JAX finds out.
    """
    if any(int(environment.get(name) or 1) > 1 for name in COUNTS):
        return True
    if addresses := next((environment[name] for name in TPU_HOSTS if environment.get(name)), None):
        return "," in addresses
    # JAX sets the first variable where there is no TPU, and Colab where there is one host.
    on_tpu_vm = "TPU_SKIP_MDS_QUERY" not in environment and importlib.util.find_spec("libtpu") is not None
    return on_tpu_vm or {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys()


def on_several_hosts(environment: Mapping[str, str]) -> str:
    """Return the variable of a launcher by which the run is on several hosts, as NAME=value, or "" if none is."""
    for name in HOSTS:
        if int(environment.get(name) or 1) > 1:
            return f"{name}={environment[name]}"
    every, here = (environment.get(f"OMPI_COMM_WORLD_{name}SIZE") for name in ("", "LOCAL_"))
    if every and here and int(here) < int(every):
        return f"OMPI_COMM_WORLD_LOCAL_SIZE={here} of {every}"
    return next((f"{name}={environment[name]}" for name in TPU_HOSTS if "," in environment.get(name, "")), "")


def is_loopback(address: str) -> bool:
    """Return True if host:port is an address by which a host reaches itself alone, such as 127.0.0.1:1234."""
    host = address.rpartition(":")[0].strip("[]")
    if host.lower() in ("localhost", "ip6-localhost", "localhost.localdomain"):
        return True
    try:
        parsed = ipaddress.ip_address(host)
    except ValueError:  # a name
        return False
    return parsed.is_loopback or parsed.is_unspecified


def shares_devices(environment: Mapping[str, str]) -> bool:
    """Return True if several processes of this host see the same GPUs, of which JAX gives each one, by its number.

    One process for each host has all of them, and so has a process to which its launcher shows no other.
    """
    if len(environment.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1:
        return False
    tasks, nodes = environment.get("SLURM_STEP_NUM_TASKS"), environment.get("SLURM_STEP_NUM_NODES")
    return not (tasks is not None and tasks == nodes) and environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") != "1"


def is_main() -> bool:
    """Return True in the process that writes files and prints."""
    return jax.process_index() == 0


def name_process() -> str:
    """Return the number of this process and its host, as errors name them."""
    return f"process {global_state.process_id} on {platform.node()}"


# ---- waiting and telling --------------------------------------------------------------------------------------------


def client() -> Any:
    """Return the client of the coordination service, whose calls release Python's lock; None before they have joined.

    A thread may wait in a call for as long as it likes, and must have returned from it when Python ends.
    """
    return global_state.client


def unique(name: str) -> str:
    """Return `name` with a number that is used once, and is the same in all processes if all come here in order."""
    return f"{name} {next(_numbers)}"


def wait_for_all(name: str) -> None:
    """Return when every process has come here. Waits without the devices, whose collectives time out."""
    if jax.process_count() > 1:
        barrier = multihost.get_barrier_sync_fn()
        with ThreadPoolExecutor(1) as thread:  # in which signals, handled in the main one, are not held up
            thread.submit(barrier, key=unique(name), timeout_ms=WAIT_SECONDS * 1000).result()


@contextmanager
def main_first(name: str) -> Iterator[None]:
    """Run the block in the main process, then in the others, which find the files that it has made."""
    if not is_main():
        wait_for_all(name)
    yield
    if is_main():
        wait_for_all(name)


def any_process(flag: bool) -> bool:
    """Return True in every process if `flag` is True in one; all of them come here."""
    if jax.process_count() == 1:
        return flag
    name = unique("any")
    if flag:
        client().key_value_set(f"{name}/{jax.process_index()}", "")
    wait_for_all(name)
    return bool(client().key_value_dir_get(f"{name}/"))


def from_main(text: str) -> str:
    """Return the main process's text in every process; all of them come here."""
    if jax.process_count() == 1:
        return text
    name = unique("text")
    if is_main():
        client().key_value_set(name, text)
        return text
    return client().blocking_key_value_get(name, WAIT_SECONDS * 1000)


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


# ---- ending ---------------------------------------------------------------------------------------------------------


def part_of(count: int) -> range:
    """Return the numbers of this process, of `count` that all processes share: ranges in the order of the processes."""
    processes, process = jax.process_count(), jax.process_index()
    return range(count * process // processes, count * (process + 1) // processes)


def gather_rows(rows: Any) -> Any:
    """Return the rows of all processes, one after another in the order of the processes.

    rows: a pytree of NumPy arrays with a leading axis, of any length in each process; every process has to call it.
    """
    if jax.process_count() == 1:
        return rows
    lengths = np.asarray(multihost_utils.process_allgather(np.array(len(jax.tree.leaves(rows)[0]))))

    def gather(leaf: np.ndarray) -> np.ndarray:
        # As bytes, since JAX would narrow float64.
        flat = np.ascontiguousarray(leaf).reshape(len(leaf), -1).view(np.uint8)
        padded = np.pad(flat, ((0, lengths.max() - len(leaf)), (0, 0)))
        parts = np.asarray(multihost_utils.process_allgather(padded))
        whole = np.concatenate([part[:length] for part, length in zip(parts, lengths, strict=True)])
        return whole.view(leaf.dtype).reshape(-1, *leaf.shape[1:])

    return jax.tree.map(gather, rows)


def end(text: str, code: int) -> NoReturn:
    """Print `text` and end this process at once, whatever its threads wait for."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.write(f"{text}\n" if text else "")
        sys.stderr.flush()
    os._exit(code)


def lost_process(error: BaseException) -> str | None:
    """Return why another process is gone, in one line, or None if the error has another cause."""
    chain = [error, error.__cause__, error.__context__]
    texts = [first_line(each) for each in chain if each is not None and not isinstance(each, RunError)]
    return next((text for text in texts if LOST.search(text)), None)


@contextmanager
def ending_with_others(kept: Callable[[], str]) -> Iterator[None]:
    """Run the block; end this process if the block fails because another one is gone.

    kept: a clause that states what is saved. It ends at once with the code RESUMABLE, since whatever would be closed
    first, such as a checkpoint that is being written, waits for the process that is gone.
    """
    try:
        yield
    except Exception as error:
        if global_state.num_processes == 1 or (reason := lost_process(error)) is None:
            raise
        time.sleep(2 * TELL_SECONDS)  # if the other one has said why, this process ends meanwhile
        end(f"error: another process of this run is gone ({reason}); {kept()}", RESUMABLE)


@contextmanager
def ending_together() -> Iterator[None]:
    """Run the work of a command; if it fails in this process, the others end with its text and exit code.

    SystemExit passes: all processes have agreed on it.
    """
    try:
        with ending_with_others(lambda: RESUME):
            yield
    except (Exception, KeyboardInterrupt) as error:
        if client() is not None:
            _tell_others(error)
        raise


def _tell_others(error: BaseException) -> None:
    code = 130 if isinstance(error, KeyboardInterrupt) else 1  # as `command.run` has it
    known = isinstance(error, RunError | ValueError | OSError) or code == 130 and str(error)
    text = first_line(error) if known else f"{type(error).__name__}: {first_line(error)}"
    told = json.dumps({"process": name_process(), "code": code, "text": text})
    _leaving.set()
    for other in range(global_state.num_processes):
        with suppress(jax.errors.JaxRuntimeError):  # it has heard of another, has ended, or process 0 is gone
            client().key_value_set(f"{ENDED}/{other}", told)

    def leave_at_once() -> None:  # JAX would wait for all processes
        if global_state.process_id == 0:
            time.sleep(2 * TELL_SECONDS)  # the service ends with this process, and the others have yet to hear
        end("", code)

    atexit.register(leave_at_once)


def _watch() -> None:
    """From now on, end this process soon after another one has failed, with what is known of it."""
    own = f"{ENDED}/{global_state.process_id}"

    def listen() -> None:
        try:
            told = client().blocking_key_value_get(own, WAIT_SECONDS * 10**5)
        except jax.errors.JaxRuntimeError as error:
            if not _leaving.is_set():
                end(f"error: another process of this run is gone ({first_line(error)}); {RESUME}", RESUMABLE)
            return
        time.sleep(TELL_SECONDS)  # an error that all processes have is printed by each
        if not _leaving.is_set():
            other = json.loads(told)
            end(f"error: {other['process']} has ended: {other['text']}", other["code"])

    def leave() -> None:
        _leaving.set()
        with suppress(jax.errors.JaxRuntimeError):
            client().key_value_set(own, "")
        thread.join()

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    atexit.register(leave)  # runs before JAX disconnects, being registered later


def _say_when_aborted(text: str, code: int) -> None:
    """From now on, print `text` and exit with `code` when this process is aborted.

    JAX aborts a process if others do not join in time, and when the coordination service reports that one is lost or is
    gone itself, after a long message. Python's own handlers would run in the main thread, which is waiting.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handle(_: int) -> None:
        os.write(2, f"{text}\n".encode())
        os._exit(code)

    _handlers.append(handle)
    ctypes.CDLL(None).signal(signal.SIGABRT, handle)


_leaving = threading.Event()  # this process ends for a reason of its own
_handlers: list[Any] = []  # what C calls must not be collected
