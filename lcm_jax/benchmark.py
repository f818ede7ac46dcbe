"""Time sampling, decoding, training, starting and reading data, optionally beside diffusers, on this machine.

    python -m lcm_jax.benchmark --suite=sample,train --model=shapes-lcm --peer=diffusers
    python -m lcm_jax.benchmark --suite=all --model=sd15 --peer=diffusers --json=sd15.json
    python -m lcm_jax.benchmark --suite=sample --batch=1,2,4,8 --steps=1,2,4,8 --json=growth.json

Each side runs in its own process, and they take turns, so that a slowdown of the machine affects both. Before anything
is timed, both compute the same case from the same weights and random numbers, and a row fails if their outputs differ
by more than the dtype allows. A row contains the seconds of the first run (which compiles, or loads from the
compilation cache), the median and the range of the others, the peak memory of the process or the device, the ratio of
the sides turn by turn, and the shares of the throughput that a large matrix product and a large copy reach on this
device. A failed row contains the reason, and the next one is run.

Suites: sample (prompts to pixels on the host), decode (the autoencoder alone), train (steps of LCD and LCM-LoRA from
latents), start (processes to their first image, with an empty cache and with a filled one; --help; imports), data
(reading training batches of 512 x 512 images, and how many cores keep a fast accelerator busy). sd15 and sdxl have full
size and random weights; nothing is downloaded.

All rows together take at most eight minutes (--limit), and each at most --row_limit; what the limit leaves out is
reported as not run. Estimated for --suite=all --model=sd15 --peer=diffusers on an H100 with 16 cores: models and peaks
30 s; the four rows of sampling, three programs of ours beside torch.compile, 180 s; decoding 30 s; a row of training
60 to 150 s; starting 60 s; data 20 s. Compiled programs of both sides are kept in the cache, so that a second call
takes half as long, and runs what the first one left out. On a CPU a row of a full-size model takes minutes: raise
--row_limit and --limit.
"""

import sys
from pathlib import Path

from absl import flags

from lcm_jax import command

FLAGS = flags.FlagValues()  # separate from other commands, which may be imported as well

SUITE = flags.DEFINE_list(
    "suite", ["sample", "train"], "Suites to time: sample, decode, train, start, data, or all.", flag_values=FLAGS
)
MODEL = flags.DEFINE_string(
    "model",
    "shapes-lcm",
    "shapes-lcm, sd15 or sdxl (full size, random weights), or a folder in diffusers layout.",
    flag_values=FLAGS,
)
PEER = flags.DEFINE_enum(
    "peer", "none", ["none", "diffusers"], "Library to compare with; diffusers requires torch.", flag_values=FLAGS
)
BATCH = flags.DEFINE_list("batch", [], "Batch sizes, such as 1,8; default: the suite's own.", flag_values=FLAGS)
STEPS = flags.DEFINE_list("steps", [], "Numbers of sampling steps, such as 1,4; default: 4 and 1.", flag_values=FLAGS)
SIZE = flags.DEFINE_list(
    "size", [], "Sides of the images in pixels, such as 512,768; default: the model's.", flag_values=FLAGS
)
VAE = flags.DEFINE_list(
    "vae",
    [],
    "Autoencoders to sample and decode with: own, or tiny, a random one of TAESD's size; default: own, and for sd15 "
    "and sdxl a row with tiny.",
    flag_values=FLAGS,
)
OBJECTIVE = flags.DEFINE_list(
    "objective", [], "Training steps to time: lcd, lora; default: both, for sdxl lora.", flag_values=FLAGS
)
DTYPE = flags.DEFINE_string(
    "dtype",
    None,
    "float32, bfloat16 or float16; default: bfloat16 for sd15 and sdxl on an accelerator, else float32.",
    flag_values=FLAGS,
)
REPEATS = flags.DEFINE_integer(
    "repeats", 10, "Timed runs of each side after the first.", lower_bound=1, flag_values=FLAGS
)
ROW_LIMIT = flags.DEFINE_float(
    "row_limit", 150, "Time limit of a row in seconds; a row that exceeds it fails.", flag_values=FLAGS
)
LIMIT = flags.DEFINE_float(
    "limit", 480, "Time limit of all rows in seconds; the remaining rows are not run.", flag_values=FLAGS
)
JSON = flags.DEFINE_string("json", None, "JSON file for the results, rewritten after every row.", flag_values=FLAGS)
PROFILE = flags.DEFINE_string(
    "profile",
    None,
    "New folder for a profile of one run of each case after its timing, for python -m lcm_jax.profile.",
    flag_values=FLAGS,
)


def whole_numbers(flag) -> list[int]:
    """Return the values of a flag as integers. Raises ValueError for a value that is not a whole number."""
    for value in flag.value:
        if not value.isdecimal():
            raise ValueError(f"--{flag.name} {value!r} is not a whole number; use numbers such as 1,8")
    return [int(value) for value in flag.value]


def benchmark() -> None:
    """Read the flags and print the table. Raises ValueError or OSError if nothing can be timed."""
    from lcm_jax.benchmarks import report, runner  # imported late, so that --help returns immediately
    from lcm_jax.benchmarks.cases import Selection

    selection = Selection(
        SUITE.value,
        MODEL.value,
        whole_numbers(BATCH),
        whole_numbers(STEPS),
        whole_numbers(SIZE),
        DTYPE.value,
        VAE.value,
        OBJECTIVE.value,
    )
    results = runner.run(
        selection,
        peer=None if PEER.value == "none" else PEER.value,
        repeats=REPEATS.value,
        row_limit=ROW_LIMIT.value,
        limit=LIMIT.value,
        json_file=JSON.value,
        profile=None if PROFILE.value is None else Path(PROFILE.value),
    )
    report.show(results)
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
