"""Time sampling and training beside diffusers, in one run on this machine.

    python -m lcm_jax.benchmark --suite=sample,train --model=shapes-lcm --peer=diffusers
    python -m lcm_jax.benchmark --suite=sample,train --model=sd15 --json=sd15.json

The sides run in processes of their own and take turns, so that what slows the machine down slows both. Every row has
the seconds of the first run (which compiles, or loads from the compilation cache), the median of the others and their
range, the peak memory of the process or the device, and the share of the peak that a large matrix product reaches on
this device. A row that fails contains its reason, and the run goes on with the next one. sd15 has full size and random
weights made on the spot; nothing is downloaded.
"""

import sys

from absl import flags

from lcm_jax import command

FLAGS = flags.FlagValues()  # of this command alone, so that others can be imported beside it

SUITE = flags.DEFINE_list("suite", ["sample", "train"], "What to time: sample, train, or both.", flag_values=FLAGS)
MODEL = flags.DEFINE_string(
    "model", "shapes-lcm", "sd15 (full size, random weights), shapes-lcm, or a model folder.", flag_values=FLAGS
)
PEER = flags.DEFINE_enum(
    "peer", "none", ["none", "diffusers"], "The other side; diffusers needs torch and diffusers.", flag_values=FLAGS
)
BATCH = flags.DEFINE_list("batch", [], "Batch sizes, such as 1,8; by default each suite's own.", flag_values=FLAGS)
STEPS = flags.DEFINE_list("steps", [], "Numbers of sampling steps, such as 1,4; by default 4 and 1.", flag_values=FLAGS)
DTYPE = flags.DEFINE_string(
    "dtype", None, "float32, bfloat16 or float16; bfloat16 for sd15 on an accelerator.", flag_values=FLAGS
)
REPEATS = flags.DEFINE_integer(
    "repeats", 10, "Timed runs of each side after the first one.", lower_bound=1, flag_values=FLAGS
)
ROW_LIMIT = flags.DEFINE_float(
    "row_limit", 180, "Seconds that a row may take; what takes longer is a failed row.", flag_values=FLAGS
)
LIMIT = flags.DEFINE_float(
    "limit", 480, "Seconds that all rows may take together; those left over are not run.", flag_values=FLAGS
)
JSON = flags.DEFINE_string("json", None, "A file for all figures, rewritten after every row.", flag_values=FLAGS)


def whole_numbers(flag) -> list[int]:
    """Return a flag's comma-separated values. Raises ValueError for a value that is not a whole number."""
    for value in flag.value:
        if not value.isdecimal():
            raise ValueError(f"--{flag.name} {value!r} is not a whole number")
    return [int(value) for value in flag.value]


def benchmark() -> None:
    """Read the flags and print the table. Raises ValueError or OSError if nothing can be timed."""
    from lcm_jax.benchmarks import runner  # imported late, so that --help and a mistyped option answer at once

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
        raise ValueError("no row could be timed; the table has the reasons")


def run() -> None:
    """The command; exits as `command.run` does."""
    command.run(
        benchmark,
        FLAGS,
        lambda: f"{__doc__}\nOptions:{FLAGS.module_help(sys.modules[__name__])}",
        "use a machine with more memory",
    )


if __name__ == "__main__":
    run()
