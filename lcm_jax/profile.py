"""Print where the time of a device goes, from a profile that --profile=FOLDER has written.

    python -m lcm_jax.sample --prompt="a red circle" --output=images --profile=profiles/sample
    python -m lcm_jax.profile profiles/sample

--profile is an option of sample, main (training) and benchmark. The first table has the time of each kind of work, the
second the most expensive kernels, with those of the same work in one row (+3: and three more). "x limit" is the time of
a kernel divided by its limit: the larger one of its FLOPs at the measured peak of a large matrix product in the same
dtype, and its bytes at the measured peak of a large copy. It can be below 1 for arrays that are still in a cache. A
fusion counts its inputs and outputs as bytes. Where kernels overlap, the time is divided among them. Times are those of
one run: a call of the pipeline, or an update. Recording slows a program down, most of all one of many short kernels.
"""

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from lcm_jax import command, files

if TYPE_CHECKING:
    from lcm_jax.profiling.hlo import Kernel
    from lcm_jax.profiling.trace import Profile

FLAGS = flags.FlagValues()  # of this command alone, so that others can be imported beside it
OWN: dict[str, Any] = {"flag_values": FLAGS}
TOP = flags.DEFINE_integer("top", 10, "Number of kernels to print.", lower_bound=1, **OWN)
JSON = flags.DEFINE_string("json", None, "JSON file for all kernels and totals.", **OWN)

NARROW = ("bfloat16", "float16")  # compute dtypes for which products in float32 are counted
SMALL = 0.01  # share of the time from which a program is printed
SCOPE_WIDTH = 32
FOLDER: list[Path] = []  # the argument of the command


class Row(NamedTuple):
    """An operation of a program. count, seconds: of all its runs. kernel: None if its program is unknown."""

    module: str
    name: str
    count: int
    seconds: float
    kernel: "Kernel | None"


def make_rows(profile: "Profile") -> list[Row]:
    """Return the operations of a profile, the most expensive first."""
    from lcm_jax.profiling.trace import exclusive_seconds

    names: dict[Any, Counter[str]] = defaultdict(Counter)
    seconds: dict[Any, float] = defaultdict(float)
    for run, taken in zip(profile.kernels, exclusive_seconds(profile.kernels), strict=True):
        key = run.program, run.op or run.name
        names[key][run.name] += 1
        seconds[key] += taken
    rows = []
    for (program, op), taken in sorted(seconds.items(), key=lambda item: -item[1]):
        known = profile.programs[program].kernels if program in profile.programs else {}
        # A library may run several kernels for an operation, such as the parts of a product and their sum.
        rows.append(Row(program[0], op, max(names[program, op].values()), taken, known.get(op)))
    return rows


def summarize(profile: "Profile") -> dict[str, Any]:
    """Return the figures of a profile, those of times for one run.

    kernels and kinds: with ms, share of the time in which the device was busy, and x_limit; operations of the same work
    are one entry, named by the most expensive of them, and `ops` is their number. unattributed: the time of kernels
    without an operation in a known program. programs: see `count_avoidable`.
    """
    from lcm_jax.profiling.hlo import KINDS

    rows, runs, peaks = make_rows(profile), profile.runs, profile.peaks
    busy = sum(row.seconds for row in rows)

    def figures(chosen: Sequence[Row]) -> dict[str, Any]:
        known = [(row.count, row.kernel) for row in chosen if row.kernel is not None]
        seconds = sum(row.seconds for row in chosen)
        flops = sum(count * kernel.flops for count, kernel in known)
        limit = sum(count * peaks.limit(kernel.flops, kernel.nbytes, kernel.dtype) for count, kernel in known)
        return {
            "runs": sum(row.count for row in chosen) / runs,
            "ms": 1e3 * seconds / runs,
            "share": seconds / busy,
            "gflops": flops / runs / 1e9,
            "gb": sum(count * kernel.nbytes for count, kernel in known) / runs / 1e9,
            "tflops_per_second": flops / seconds / 1e12 if seconds else None,
            "limit_ms": 1e3 * limit / runs,
            "x_limit": seconds / limit if limit else None,
        }

    attributed = [row for row in rows if row.kernel is not None]
    alike: dict[Any, list[Row]] = defaultdict(list)
    for row in attributed:
        if row.kernel is not None:
            alike[row.module, row.kernel.kind, row.kernel.flops, row.kernel.nbytes, row.kernel.op.arrays].append(row)
    groups = sorted(alike.values(), key=lambda group: -sum(row.seconds for row in group))
    kinds = {kind: [row for row in attributed if row.kernel and row.kernel.kind == kind] for kind in KINDS}
    unknown = [row for row in rows if row.kernel is None]
    total = figures(attributed)
    return {
        "device": profile.device,
        "dtype": profile.dtype,
        "recorded_runs": runs,
        "peak_tflops": {name: value / 1e12 for name, value in peaks.flops.items()},
        "peak_gb_per_second": peaks.bandwidth / 1e9,
        "wall_ms": 1e3 * profile.seconds / runs,
        "busy_ms": 1e3 * busy / runs,
        "idle_ms": 1e3 * max(profile.seconds - busy, 0) / runs,
        "limit_ms": total["limit_ms"],
        "kinds": [{"kind": kind} | figures(chosen) for kind, chosen in kinds.items() if chosen],
        "kernels": [
            {
                "op": first.name,
                "ops": len(group),
                "program": first.module,
                "kind": first.kernel.kind,
                "result": str(first.kernel.op.arrays[0]),
                "scope": first.kernel.scope,
            }
            | figures(group)
            for group in groups
            if (first := group[0]).kernel is not None
        ],
        "unattributed": figures(unknown) | {"names": [row.name for row in unknown[:3]]} if unknown else None,
        "programs": [
            {"program": module} | count_avoidable([row for row in attributed if row.module == module], profile, busy)
            for module in dict.fromkeys(row.module for row in attributed)
        ],
    }


def count_avoidable(rows: Sequence[Row], profile: "Profile", busy: float) -> dict[str, Any]:
    """Count the kernels of a program that ran and that another program might not need.

    copies: layout copies and transposes. converts_in_loops: kernels that only convert, in the body of a loop.
    wide_products: products and convolutions in float32, if the compute dtype has 16 bits; flops_share: of the
    program's. busy: seconds of all programs, of which this one has a share.
    """
    from lcm_jax.profiling.hlo import CONVERT, COPY

    kernels = [(row, row.kernel) for row in rows if row.kernel is not None]

    def count(chosen) -> dict[str, Any]:
        return {"kernels": len(chosen), "ms": 1e3 * sum(row.seconds for row, _ in chosen) / profile.runs}

    wide = [(row, kernel) for row, kernel in kernels if kernel.dtype == "float32" and profile.dtype in NARROW]
    flops = sum(row.count * kernel.flops for row, kernel in kernels)
    seconds = sum(row.seconds for row in rows)
    return {
        "ms": 1e3 * seconds / profile.runs,
        "share": seconds / busy,
        "copies": count([each for each in kernels if each[1].kind == COPY]),
        "converts_in_loops": count([each for each in kernels if each[1].kind == CONVERT and each[1].looped]),
        "wide_products": count(wide)
        | {"flops_share": sum(row.count * kernel.flops for row, kernel in wide) / flops if flops else 0.0},
    }


def show(summary: dict[str, Any], top: int) -> None:
    """Print the figures as two tables and the lines around them."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 160, highlight=False, markup=False)
    runs = summary["recorded_runs"]
    peaks = ", ".join(f"{name} {value:.3g} TFLOP/s" for name, value in summary["peak_tflops"].items())
    wall = summary["wall_ms"]
    part = lambda name: f"{summary[name]:.2f} ms ({summary[name] / wall:.1%})"  # noqa: E731
    console.print(
        f"{summary['device']}, computing in {summary['dtype']}; peaks measured: {peaks}, "
        f"{summary['peak_gb_per_second']:.3g} GB/s\n"
        f"{runs} run{'s' * (runs > 1)} of {wall:.2f} ms each: busy {part('busy_ms')}, idle {part('idle_ms')}; "
        f"all kernels at their limits: {part('limit_ms')}"
    )

    def add(table: Table, figures: dict[str, Any], *names: str) -> None:
        ratio = figures["x_limit"]
        table.add_row(
            *map(escape, names),
            f"{figures['runs']:.4g}",
            f"{figures['ms']:.3f}",
            f"{figures['share']:.1%}",
            f"{figures['tflops_per_second']:.3g}" if figures["gflops"] else "",
            f"{figures['gb'] / figures['ms'] * 1e3:.3g}" if figures["ms"] else "",
            "" if ratio is None else f"{ratio:.2f}",
        )

    numbers = ("runs", "ms", "share", "TFLOP/s", "GB/s", "x limit")
    for title, words, entries in (
        ("time by kind", ("kind",), summary["kinds"]),
        (f"the {top} most expensive kernels", ("op", "kind", "result", "from"), summary["kernels"][:top]),
    ):
        table = Table(title=title)
        for word in words:
            table.add_column(word, overflow="fold")
        for number in numbers:
            table.add_column(number, justify="right", no_wrap=True)
        for each in entries:
            if len(words) == 1:
                add(table, each, each["kind"])
            else:
                name = each["op"] + f" +{each['ops'] - 1}" * (each["ops"] > 1)
                add(table, each, name, each["kind"], each["result"], shorten(each["scope"]))
        if (rest := summary["unattributed"]) and len(words) == 1:
            add(table, rest | {"gflops": 0.0}, "not attributed")
        console.print(table)
    if rest := summary["unattributed"]:
        console.print(
            f"not attributed to an operation of a program: {rest['ms']:.3f} ms, {rest['share']:.1%} "
            f"({', '.join(rest['names'])})"
            + "; XLA_FLAGS=--xla_gpu_enable_command_buffer= shows kernels that CUDA graphs hide"
            * summary["device"].startswith("NVIDIA")
        )
    for each in summary["programs"]:
        if each["share"] < SMALL:
            continue
        copies, converts, wide = each["copies"], each["converts_in_loops"], each["wide_products"]
        counts = [
            f"{copies['kernels']} copies and transposes ({copies['ms']:.2f} ms)",
            f"{converts['kernels']} converts in loops ({converts['ms']:.2f} ms)",
        ]
        if summary["dtype"] in NARROW:
            counts.append(
                f"{wide['kernels']} float32 products and convolutions ({wide['flops_share']:.2%} of the FLOPs)"
            )
        console.print(f"{each['program']}, {each['ms']:.2f} ms: {', '.join(counts)}")


def shorten(scope: str) -> str:
    """Return the last modules of a scope, as many as fit in a table; JAX's `transpose` is a backward pass."""
    parts = scope.split("/")[:-1] or [""]  # without the operation itself
    while len(parts) > 1 and len("/".join(parts)) > SCOPE_WIDTH:
        parts.pop(0)
    return "backward: " * ("transpose(" in scope) + "/".join(parts)


def print_profile() -> None:
    """Read the profile and print it. Raises ValueError or OSError."""
    from lcm_jax.profiling.trace import open_profile  # imported late, so that --help returns immediately

    summary = summarize(open_profile(FOLDER[0]))
    if JSON.value:
        files.write_text(Path(JSON.value), json.dumps(summary, indent=1) + "\n")
    show(summary, TOP.value)


def parse(argv: list[str]) -> list[str]:
    """Parse the flags and the folder, and return the remaining arguments. Raises ValueError if there is no folder."""
    rest = FLAGS(argv)
    if len(rest) < 2:
        raise ValueError("the folder is missing; use python -m lcm_jax.profile FOLDER")
    FOLDER[:] = [Path(rest.pop(1))]
    return rest


def run() -> None:
    """The command; exits as `command.run` does."""
    options = lambda: f"{__doc__}\nOptions:{FLAGS.module_help(sys.modules[__name__])}"  # noqa: E731
    command.run(print_profile, parse, options, "use a machine with more memory")


if __name__ == "__main__":
    run()
