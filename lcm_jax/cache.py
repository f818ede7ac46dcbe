"""Encode the images and prompts of a training set once, into a latent cache that runs train from.

    python -m lcm_jax.cache --config=lcd:sd15 --output=caches/sd15 --config.data.shards='data/{00000..00015}.tar'
    python -m lcm_jax.main --config=lcd:sd15 --workdir=runs/sd15 --config.data.shards='data/{00000..00015}.tar' \\
        --config.data.encode=cache --config.data.cache=caches/sd15

The cache has the moments of the autoencoder and, unless the run trains its text encoder, the encoded prompts, in
bfloat16. After an interruption the same command resumes at the first shard that is missing. Of several processes
(--coordinator, --num_processes, --process_id) each encodes shards of its own, and a process uses all of its
accelerators. Records that cannot be read are left out; manifest.json counts them. A run refuses a cache of other data,
preparation or weights.
"""

import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from lcm_jax import command, config_files
from lcm_jax.errors import check_devices, keep_interrupts, phase

FLAGS = flags.FlagValues()  # of this command alone, so that others can be imported beside it
OWN: dict[str, Any] = {"flag_values": FLAGS}
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config of the runs to encode for: bundled or a file, with an optional argument: lcd:sdxl.", **OWN
)
OUTPUT = flags.DEFINE_string("output", None, "Folder of the cache.", **OWN)
SHARD_SIZE = flags.DEFINE_integer("shard_size", 4096, "Images in each shard.", lower_bound=1, **OWN)
COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, for several processes.", **OWN)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes, if there are several.", **OWN)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0, if there are several.", **OWN)


def encode() -> None:
    """Write the cache, as the flags say. Raises RunError, ValueError, OSError and Interrupted."""
    with phase("starting", memory="use a device with more memory", kept="nothing was changed"):
        from lcm_jax.data.sources import check_data
        from lcm_jax.recipes import check_config, find_recipe
        from lcm_jax.training import distributed

        keep_interrupts()
        command.configure_jax()
        distributed.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
        check_devices()
        config, folder = CONFIG.value, Path(OUTPUT.value or "")
        config.update_from_flattened_dict({"data.encode": "cache", "data.cache": str(folder)})
        check_config(config)
        check_data(config)
        task = find_recipe(config)(config, folder)  # whose index of the data is in the folder too
    assert task.encode_data is not None  # with data.encode=cache
    task.encode_data(shard_size=SHARD_SIZE.value)


def parse(argv: list[str]) -> list[str]:
    """Parse the flags and return the remaining arguments. Raises ValueError of one line if they are wrong."""
    rest = config_files.parse(FLAGS, argv)
    if CONFIG.value is None:
        raise ValueError("--config is missing; use a file, or a name from python -m lcm_jax.main --list_configs")
    if OUTPUT.value is None:
        raise ValueError("--output is missing; use the folder of the cache")
    return rest


def run() -> None:
    """The command; exits as `command.run` does."""
    options = lambda: f"{__doc__}\nOptions:{FLAGS.module_help(sys.modules[__name__])}"  # noqa: E731
    command.run(encode, parse, options, "use a device with more memory", must_be_seen=True)


if __name__ == "__main__":
    run()
