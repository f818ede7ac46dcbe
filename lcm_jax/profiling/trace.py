"""Profiles on disk: `Tracer` records one, `open_profile` reads it.

DIR/plugins/profile/*/*.xplane.pb   the trace of jax.profiler, which TensorBoard and Perfetto open too
DIR/hlo/MODULE.ID.txt               the optimized programs that ran in it
DIR/profile.json                    the device, its measured peaks, the number of runs and their wall time
"""

import json
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.extend.backend import get_backend
from jax.profiler import ProfileData

from lcm_jax import files, peaks
from lcm_jax.errors import first_line
from lcm_jax.profiling.hlo import Program

RECORD = "profile.json"
FLOATS = ("float32", "bfloat16", "float16")
AGAIN = "record a new one with --profile=FOLDER"
END = "end: "  # begins the name of the event that a CPU's kernel ends with


class Run(NamedTuple):
    """One run of a kernel. program: module and id. op: of the program, or "" if the trace has none. In nanoseconds."""

    program: tuple[str, int]
    op: str
    name: str
    start: float
    end: float


class Profile(NamedTuple):
    """A recorded profile.

    device: its kind. dtype: the compute dtype. runs: calls or updates in the trace. seconds: their wall time. programs:
    by module and id, those whose text was recorded. kernels: all runs of kernels on the first device.
    """

    device: str
    dtype: str
    runs: int
    seconds: float
    peaks: peaks.Peaks
    programs: Mapping[tuple[str, int], Program]
    kernels: Sequence[Run]


class Tracer:
    """Records a profile in a new folder."""

    def __init__(self, folder: Path, dtype: str):
        """Create the folder and measure the device's peaks. dtype: the compute dtype.

        Raises ValueError if the folder is not empty, and OSError if it cannot be created.
        """
        check_new(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._dtype = folder, dtype
        # Of int8 and fp8, the rest of the network is computed in bfloat16.
        self._peaks = peaks.measure(sorted({"float32", dtype if dtype in FLOATS else "bfloat16"}))
        self._began = 0.0

    def start(self) -> None:
        """Begin the trace."""
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # whose events take longer than short programs
        jax.profiler.start_trace(self.folder, profiler_options=options)
        self._began = time.perf_counter()

    def stop(self, runs: int) -> str:
        """End the trace, when its results have been computed, and write the profile; return a line that names it.

        runs: calls or updates in the trace. Raises ValueError if the device has recorded no kernels, and OSError.
        """
        seconds = time.perf_counter() - self._began
        jax.profiler.stop_trace()
        ops: dict[tuple[str, int], set[str]] = defaultdict(set)
        for run in read_runs(self.folder):
            ops[run.program].add(run.op)
        (self.folder / "hlo").mkdir()
        for (module, number), text in find_programs(ops).items():
            (self.folder / "hlo" / f"{module}.{number}.txt").write_text(text)
        record = {
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "dtype": self._dtype,
            "runs": runs,
            "seconds": seconds,
            "peak_flops": self._peaks.flops,
            "peak_bandwidth": self._peaks.bandwidth,
        }
        files.write_text(self.folder / RECORD, json.dumps(record, indent=1) + "\n")
        return f"a profile is in {self.folder}; python -m lcm_jax.profile {self.folder} prints it"


def check_new(folder: Path) -> None:
    """Raise ValueError if a profile cannot be recorded in `folder`, since it has content or is a file."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--profile={folder} is not an empty folder; use a new one")


def find_programs(ops: Mapping[tuple[str, int], set[str]]) -> dict[tuple[str, int], str]:
    """Return the text of the traced programs among those that this process has compiled.

    ops: the names of traced operations by program. Of several programs of that name, the one that has most of them.
    """
    modules = {module for module, _ in ops}
    compiled = [module for each in get_backend().live_executables() for module in each.hlo_modules()]
    texts = [(module.name, module.to_string()) for module in compiled if module.name in modules]
    names = [set(re.findall(r"%([\w.\-]+) = ", text)) for _, text in texts]
    found = {}
    for program, traced in ops.items():
        matches = [(len(traced & names[i]), text) for i, (name, text) in enumerate(texts) if name == program[0]]
        if matches:
            found[program] = max(matches)[1]
    return found


def open_profile(folder: Path) -> Profile:
    """Read a profile. Raises ValueError for a folder without one and for damaged files, and OSError."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; use one that --profile=FOLDER has written")
    runs = read_runs(folder)
    file = folder / RECORD
    if not file.exists():
        raise ValueError(f"{folder} has a trace but no {RECORD}; {AGAIN}")
    with intact(file):
        record = json.loads(files.decode(file.read_bytes(), RECORD))
        flops = {str(name): positive(value) for name, value in record["peak_flops"].items()}
        flops["float32"]  # which is always measured
        measured = peaks.Peaks(flops, positive(record["peak_bandwidth"]))
        number, seconds = int(positive(record["runs"])), positive(record["seconds"])
        device, dtype = str(record["device"]), str(record["dtype"])
    programs = {}
    for path in sorted((folder / "hlo").glob("*.txt")):
        with intact(path):
            module, _, ordinal = path.stem.rpartition(".")
            programs[module, int(ordinal)] = program = Program(files.decode(path.read_bytes(), path.name))
            len(program.kernels)  # computed here, so that a wrong operation is an error of this file
    return Profile(device, dtype, number, seconds, measured, programs, without_containers(runs, programs))


@contextmanager
def intact(file: Path) -> Iterator[None]:
    """Turn errors of a block that reads `file` into a ValueError of one line that names it."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{file} is not part of a profile ({reason}); {AGAIN}") from error


def positive(value: Any) -> float:
    """Return a finite number above 0. Raises ValueError for any other value."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{value!r} is not a number above 0")
    return float(value)


def without_containers(runs: Iterable[Run], programs: Mapping[tuple[str, int], Program]) -> list[Run]:
    """Leave out loops, calls and branches, whose kernels have runs of their own."""
    known = {program: each.containers for program, each in programs.items()}
    likely = re.compile(r"(while|call|conditional)(\.\d+)?$")  # in a program without text
    return [
        run
        for run in runs
        if run.op not in known.get(run.program, ()) and (run.program in known or not likely.match(run.op))
    ]


def read_runs(folder: Path) -> list[Run]:
    """Return the runs of kernels on the first device in the trace of a folder, containers such as loops included.

    Raises ValueError if there is no trace, several, or one without kernels.
    """
    paths = sorted(folder.glob("plugins/profile/*/*.xplane.pb"))
    if len(paths) != 1:
        raise ValueError(f"{folder} has {len(paths) or 'no'} trace{'s' * (len(paths) > 1)}; {AGAIN}")
    with intact(paths[0]):
        planes = {plane.name: plane for plane in ProfileData.from_file(str(paths[0])).planes}
        devices = sorted(name for name in planes if re.fullmatch(r"/device:(GPU|TPU):\d+", name))
        if devices:
            runs = list(stream_runs(planes[devices[0]]))
        else:
            runs = list(thread_runs(planes["/host:CPU"])) if "/host:CPU" in planes else []
    if not runs:
        raise ValueError(f"{paths[0]} has no kernels; {AGAIN}")
    return runs


def stream_runs(plane: Any) -> Iterator[Run]:
    """Yield the kernels of an accelerator: the events of its streams, in which a kernel has its HLO operation.

    Lines that group these events (steps, modules) are left out.
    """
    lines = list(plane.lines)
    streams = [line for line in lines if line.name.startswith("Stream")]
    for line in streams or [line for line in lines if line.name == "XLA Ops"]:
        for event in line.events:
            stats = dict(event.stats)
            yield make_run(event, stats, event.end_ns)


def thread_runs(plane: Any) -> Iterator[Run]:
    """Yield the kernels of a CPU, each until its last thread has finished.

    The event of a convolution or product ends when its threads have been started; another event, which refers to it,
    marks the end of their work. Of several host devices, the first is read.
    """
    started, ends = [], {}
    for line in plane.lines:
        for event in line.events:
            if event.name.startswith(END):
                stats = dict(event.stats)
                ends[stats.get("_ct"), stats.get("_c")] = event.end_ns
            elif "hlo_op" in (stats := dict(event.stats)):
                started.append((event, stats))
    first = min((stats.get("device_ordinal", 0) for _, stats in started), default=0)
    for event, stats in started:
        if stats.get("device_ordinal", 0) == first:
            end = ends.get((stats.get("_pt"), stats.get("_p")), event.end_ns)
            yield make_run(event, stats, max(end, event.end_ns))


def make_run(event: Any, stats: Mapping[str, Any], end: float) -> Run:
    module = re.sub(r"\(\d+\)$", "", str(stats.get("hlo_module", "")))
    return Run((module, int(stats.get("program_id", 0))), str(stats.get("hlo_op", "")), event.name, event.start_ns, end)


def exclusive_seconds(runs: Sequence[Run]) -> list[float]:
    """Return the time of each run in seconds: where several overlap, each moment is divided among them.

    The sum is the time in which any kernel ran.
    """
    edges = [(moment, i) for i, run in enumerate(runs) if run.end > run.start for moment in (run.start, run.end)]
    taken, active, before = [0.0] * len(runs), set(), 0.0
    for moment, i in sorted(edges):
        for each in active:
            taken[each] += (moment - before) / len(active) / 1e9
        before = moment
        active ^= {i}  # its start, then its end
    return taken
