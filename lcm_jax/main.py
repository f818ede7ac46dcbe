"""Train by a config file: distil, fine-tune, or train a model from scratch.

    python -m lcm_jax.main --config=configs/shapes.py --workdir=runs/shapes
    python -m lcm_jax.main --config=configs/shapes.py --workdir=runs/long --config.train.steps=4000
    python -m lcm_jax.main --config=configs/lcd.py:sd15 --dry_run

Every key of the config can be set by --config.group.key=value. The same command in the same workdir goes on where a
stopped run left off.
"""

import re
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "The config file; an argument follows a colon.")
WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run: checkpoints, samples, metrics, report, export.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only say what the run would take: memory, work, time. Needs no weights.")
flags.mark_flag_as_required("config")
flags.register_multi_flags_validator(
    ["workdir", "dry_run"], lambda given: given["dry_run"] or given["workdir"], "Flag --workdir must have a value."
)


def main(argv: list[str]) -> int:
    logging.set_verbosity(logging.WARNING)  # libraries speak at INFO
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; options are written --name=value")
    # Imported late, so that --help and a mistyped option answer at once.
    from lcm_jax import command, dry_run
    from lcm_jax.recipes import RECIPES
    from lcm_jax.training.checkpoint import CheckpointError
    from lcm_jax.training.loop import RunError, check_run, train

    config = CONFIG.value
    if config.objective.name not in RECIPES:
        print(f"objective.name is {config.objective.name!r}; choose one of {', '.join(RECIPES)}", file=sys.stderr)
        return 2
    try:
        command.configure_jax()
        if DRY_RUN.value:
            dry_run.show(dry_run.figures(config))
            return 0
        workdir = Path(WORKDIR.value)
        check_run(workdir, config)
        train(RECIPES[config.objective.name](config, workdir), config, workdir)
    except (RunError, CheckpointError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse(argv: list[str]) -> list[str]:
    """Reads the flags; a mistake in them is an error of one line that names the nearest right word."""
    try:
        rest = flags.FLAGS(argv)
        if CONFIG.value is not None:
            CONFIG.value.to_dict()  # reports a config file that did not load
        return rest
    except (flags.Error, AttributeError, KeyError, OSError, ValueError) as error:
        text = str(error.args[0] if isinstance(error, KeyError) else error).replace("\\'", "'")
        named, hint = re.match(r"[\"']+(\w+)'", text), re.search(r"Did you mean [^?]+\?", text)
        for flag in (a.split("=")[0] for a in argv if named and a.lstrip("-").startswith("config.")):
            if named[1] in flag.split("."):  # a key that the config lacks
                sys.exit(f"error: {flag} is no key of the config. {hint[0] if hint else 'Its file names them all.'}")
        lines = text.replace("\\n", "\n").splitlines()
        if any("Traceback" in line for line in lines):  # get_config did not like its argument, and said why at the end
            lines = [lines[-1].removeprefix("ValueError: ")]
        sys.exit("error: " + " ".join(" ".join(lines).split()))


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
