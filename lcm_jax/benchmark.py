"""Time sampling and training, optionally beside diffusers, on this machine.

    python -m lcm_jax.benchmark --suite=sample,train --model=shapes-lcm --peer=diffusers
    python -m lcm_jax.benchmark --suite=sample,train --model=sd15 --json=sd15.json
    python -m lcm_jax.benchmark --suite=data

Each side runs in its own process, and they take turns, so that a slowdown of the machine affects both. A row contains
the seconds of the first run (which compiles, or loads from the compilation cache), the median and the range of the
others, the peak memory of the process or the device, and the share of the throughput that a large matrix product
reaches on this device. A failed row contains the reason, and the next one is run. sd15 has full size and random
weights; nothing is downloaded. The suite data reads training batches of 512 x 512 images, from a latent cache and from
JPEGs, which are written for it, and tells how many cores keep a fast accelerator busy.
"""

import sys

from absl import flags

from lcm_jax import command

FLAGS = flags.FlagValues()  # separate from other commands, which may be imported as well

SUITE = flags.DEFINE_list("suite", ["sample", "train"], "Suites to time: sample, train, data.", flag_values=FLAGS)
MODEL = flags.DEFINE_string(
    "model", "shapes-lcm", "sd15 (full size, random weights), shapes-lcm, or a model folder.", flag_values=FLAGS
)
PEER = flags.DEFINE_enum(
    "peer", "none", ["none", "diffusers"], "Library to compare with; diffusers requires torch.", flag_values=FLAGS
)
BATCH = flags.DEFINE_list("batch", [], "Batch sizes, such as 1,8; default: the suite's own.", flag_values=FLAGS)
STEPS = flags.DEFINE_list("steps", [], "Numbers of sampling steps, such as 1,4; default: 4 and 1.", flag_values=FLAGS)
DTYPE = flags.DEFINE_string(
    "dtype",
    None,
    "float32, bfloat16 or float16; default: bfloat16 for sd15 on an accelerator, else float32.",
    flag_values=FLAGS,
)
REPEATS = flags.DEFINE_integer(
    "repeats", 10, "Timed runs of each side after the first.", lower_bound=1, flag_values=FLAGS
)
ROW_LIMIT = flags.DEFINE_float(
    "row_limit", 180, "Time limit of a row in seconds; a row that exceeds it fails.", flag_values=FLAGS
)
LIMIT = flags.DEFINE_float(
    "limit", 480, "Time limit of all rows in seconds; the remaining rows are not run.", flag_values=FLAGS
)
JSON = flags.DEFINE_string("json", None, "JSON file for the results, rewritten after every row.", flag_values=FLAGS)


def whole_numbers(flag) -> list[int]:
    """Return the values of a flag as integers. Raises ValueError for a value that is not a whole number."""
    for value in flag.value:
        if not value.isdecimal():
            raise ValueError(f"--{flag.name} {value!r} is not a whole number; use numbers such as 1,8")
    return [int(value) for value in flag.value]


def benchmark() -> None:
    """Read the flags and print the table. Raises ValueError or OSError if nothing can be timed."""
    from lcm_jax.benchmarks import runner  # imported late, so that --help returns immediately

    results = runner.run(
        SUITE.value,
        MODEL.value,
        whole_numbers(BATCH),
        whole_numbers(STEPS),
        DTYPE.value,
        peer=None if PEER.value == "none" else PEER.value,
        repeats=REPEATS.value,
        row_limit=ROW_LIMIT.value,
        limit=LIMIT.value,
        json_file=JSON.value,
    )
    runner.show(results)
    if all("error" in row for row in results["rows"]):
        raise ValueError("all rows failed; see the table for the reasons")


def run() -> None:
    """Run the command; exits as `command.run` does."""
    command.run(
        benchmark,
        FLAGS,
        lambda: f"{__doc__}\nOptions:{FLAGS.module_help(sys.modules[__name__])}",
        "use a machine with more memory",
    )


if __name__ == "__main__":
    run()
