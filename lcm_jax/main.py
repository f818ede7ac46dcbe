"""Train a model from a config file: distill, fine-tune or train from scratch.

    python -m lcm_jax.main --config=shapes --workdir=runs/shapes
    python -m lcm_jax.main --config=shapes --workdir=runs/long --config.train.steps=4000
    python -m lcm_jax.main --config=lcd:sd15 --dry_run

--list_configs lists the bundled configs; --config also accepts a file, such as configs/shapes.py. Any config key can be
overridden by --config.group.key=value. The same command in the same workdir resumes an interrupted run.
"""

import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from lcm_jax import config_files

CONFIG = config_flags.DEFINE_config_file("config", None, "Bundled config or file, with an optional argument: lcd:sdxl.")
LIST_CONFIGS = flags.DEFINE_bool("list_configs", False, "List the bundled configs, then exit.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, samples, metrics, report, export.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, if the run has several processes.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes, if the run has several.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0, if the run has several.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print estimated memory, FLOPs and time, then exit.")


def main(argv: list[str]) -> int:
    logging.set_verbosity(logging.WARNING)  # libraries log at INFO
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; options are written --name=value")
    # Imported late, so that --help and a mistyped option return immediately.
    from lcm_jax.errors import RunError, check_devices, keep_interrupts, phase

    try:
        with phase("starting", memory="use a device with more memory", kept="nothing was changed"):
            from lcm_jax import command, dry_run
            from lcm_jax.recipes import make_task
            from lcm_jax.training import distributed, loop

            keep_interrupts()
            command.configure_jax()
            if not DRY_RUN.value:
                distributed.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
            check_devices()
            config, workdir = CONFIG.value, Path(WORKDIR.value or "")
            if DRY_RUN.value:
                dry_run.show(dry_run.estimate(config))
                return 0
            task = make_task(config, workdir)
        loop.train(task, config, workdir)
    except KeyboardInterrupt as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        return 130
    except (RunError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse(argv: list[str]) -> list[str]:
    """Parse the flags and return the remaining arguments; exit with a one-line error if they are wrong."""
    try:
        rest = flags.FLAGS(config_files.by_file(argv))
        if LIST_CONFIGS.value:
            print(config_files.listing())
            sys.exit(0)
        if CONFIG.value is None:
            raise flags.ValidationError("--config is missing; use a file, or a name from --list_configs")
        CONFIG.value.to_dict()  # raises the error of a config file that cannot be loaded
        if not (DRY_RUN.value or WORKDIR.value):
            raise flags.ValidationError("--workdir is missing; use the folder of a run")
        return rest
    except (flags.Error, AttributeError, KeyError, OSError, ValueError) as error:
        sys.exit(f"error: {config_files.explain(error, argv)}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
