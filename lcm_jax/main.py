"""Train a model from a config file: distill, fine-tune or train from scratch.

    python -m lcm_jax.main --config=shapes --workdir=runs/shapes
    python -m lcm_jax.main --config=shapes --workdir=runs/long --config.train.steps=4000
    python -m lcm_jax.main --config=lcd:sd15 --dry_run

--list_configs lists the bundled configs; --config also accepts a file, such as configs/shapes.py. Any config key can be
overridden by --config.group.key=value. The same command in the same workdir resumes an interrupted run.

Several processes of one run find each other under Slurm, Open MPI, Kubernetes and on TPU pods; elsewhere each gets
--coordinator, --num_processes and --process_id. Exit codes: 0 complete; 1 error; 75 work is left and the same command
resumes it, after SIGTERM or SIGHUP (a checkpoint was saved) or because another process is gone; 130 Ctrl-C.
"""

import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from lcm_jax import command, config_files, ranges
from lcm_jax.errors import check_devices, keep_interrupts, phase

FLAGS = flags.FlagValues()  # of this command alone, so that others can be imported beside it
OWN: dict[str, Any] = {"flag_values": FLAGS}
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Bundled config or file, with an optional argument: lcd:sdxl.", **OWN
)
LIST_CONFIGS = flags.DEFINE_bool("list_configs", False, "List the bundled configs, then exit.", **OWN)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, samples, metrics, report.", **OWN)
COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, for several processes.", **OWN)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes, if the run has several.", **OWN)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0, if there are several.", **OWN)
IGNORE_UNREADABLE = flags.DEFINE_bool("ignore_unreadable", False, "Begin anew if no checkpoint can be read.", **OWN)
PROFILE = flags.DEFINE_string("profile", None, "New folder for a profile of updates, for lcm_jax.profile.", **OWN)
PROFILE_STEPS = flags.DEFINE_string("profile_steps", None, "First and last of them: 10:15. Default: 3rd to 5th.", **OWN)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print estimated memory, FLOPs and time, then exit.", **OWN)


def train() -> None:
    """List configs, estimate, or train, as the flags say. Raises RunError, ValueError, OSError and Interrupted."""
    if LIST_CONFIGS.value:
        print(config_files.listing())
        return
    with phase("starting", memory="use a device with more memory", kept="nothing was changed"):
        from lcm_jax import dry_run
        from lcm_jax.recipes import make_task
        from lcm_jax.training import distributed, loop

        keep_interrupts()
        command.configure_jax()
        config, workdir = CONFIG.value, Path(WORKDIR.value or "")
        if DRY_RUN.value:
            check_devices()
            full = dry_run.estimate(dry_run.without_adapters(config)) if "lora" in config else None
            dry_run.show(dry_run.estimate(config), full)
            return
        distributed.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    with distributed.ending_together():
        with phase("starting", memory="use a device with more memory", kept="nothing was changed"):
            check_devices()
            task = make_task(config, workdir)
        profile = None if PROFILE.value is None else Path(PROFILE.value)
        profile_steps = ranges.span("--profile_steps", PROFILE_STEPS.value)
        if not loop.train(task, config, workdir, profile, profile_steps, IGNORE_UNREADABLE.value):
            sys.exit(distributed.RESUMABLE)


def parse(argv: list[str]) -> list[str]:
    """Parse the flags and return the remaining arguments. Raises ValueError of one line if they are wrong."""
    rest = config_files.parse(FLAGS, argv)
    if CONFIG.value is None and not LIST_CONFIGS.value:
        raise ValueError("--config is missing; use a file, or a name from --list_configs")
    if not (LIST_CONFIGS.value or DRY_RUN.value or WORKDIR.value):
        raise ValueError("--workdir is missing; use the folder of a run")
    if ranges.span("--profile_steps", PROFILE_STEPS.value) and PROFILE.value is None:
        raise ValueError("--profile is missing; use the folder that the profile of --profile_steps is for")
    return rest


def main() -> None:
    """The command; exits as `command.run` does."""
    options = lambda: f"{__doc__}\nOptions:{FLAGS.module_help(sys.modules[__name__])}"  # noqa: E731
    command.run(train, parse, options, "lower train.batch_size, or use a device with more memory", must_be_seen=True)


if __name__ == "__main__":
    main()
