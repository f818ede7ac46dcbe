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

from absl import app, flags, logging

SUITE = flags.DEFINE_list("suite", ["sample", "train"], "What to time: sample, train, or both.")
MODEL = flags.DEFINE_string("model", "shapes-lcm", "sd15 (full size, random weights), shapes-lcm, or a model folder.")
PEER = flags.DEFINE_enum("peer", "none", ["none", "diffusers"], "The other side; diffusers needs torch and diffusers.")
BATCH = flags.DEFINE_list("batch", [], "Batch sizes, such as 1,8; by default each suite's own.")
STEPS = flags.DEFINE_list("steps", [], "Numbers of sampling steps, such as 1,4; by default 4 and 1.")
DTYPE = flags.DEFINE_string("dtype", None, "float32, bfloat16 or float16; bfloat16 for sd15 on an accelerator.")
REPEATS = flags.DEFINE_integer("repeats", 10, "Timed runs of each side after the first one.", lower_bound=1)
ROW_LIMIT = flags.DEFINE_float("row_limit", 180, "Seconds that a row may take; what takes longer is a failed row.")
LIMIT = flags.DEFINE_float("limit", 480, "Seconds that all rows may take together; those left over are not run.")
JSON = flags.DEFINE_string("json", None, "A file for all figures, rewritten after every row.")


def whole_numbers(flag) -> list[int]:
    """Return a flag's comma-separated values. Raises ValueError for a value that is not a whole number."""
    for value in flag.value:
        if not value.isdecimal():
            raise ValueError(f"--{flag.name} {value!r} is not a whole number")
    return [int(value) for value in flag.value]


def main(argv: list[str]) -> int:
    logging.set_verbosity(logging.WARNING)  # libraries log at INFO
    if len(argv) > 1:
        print(f"error: unexpected argument {argv[1]!r}; write options as --name=value", file=sys.stderr)
        return 1
    # Imported late, so that --help and a mistyped option answer at once.
    from lcm_jax.benchmarks import runner

    try:
        results = runner.run(
            SUITE.value, MODEL.value, whole_numbers(BATCH), whole_numbers(STEPS), DTYPE.value,
            peer=None if PEER.value == "none" else PEER.value, repeats=REPEATS.value, row_limit=ROW_LIMIT.value,
            limit=LIMIT.value, json_file=JSON.value,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    runner.show(results)
    return 1 if all("error" in row for row in results["rows"]) else 0


def parse(argv: list[str]) -> list[str]:
    """Read the flags; --help prints them with an example, and succeeds."""
    if any(option in argv for option in ("--help", "-help", "-h")):
        print(f"{__doc__}\nOptions:{flags.FLAGS.module_help(sys.modules[__name__])}")
        sys.exit(0)
    return flags.FLAGS(argv)


def run() -> None:
    """Run the command; an option that does not exist is an error of one line that names the nearest one."""
    try:
        app.run(main, flags_parser=parse)
    except flags.Error as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run()
