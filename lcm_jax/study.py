"""Run a study: a grid of runs that differ in a few settings, one figure and one table.

    python -m lcm_jax.study --config=study_solver --workdir=runs/study_solver

--config takes a bundled study (study_solver, study_guidance, study_ema) or a file like them. Each run is a folder of
--workdir, named by its settings, as lcm_jax.main makes it. The same command resumes: complete runs are skipped, and an
interrupted one continues from its checkpoint. figure.png, report.md and report.json are written after every run.

Exit codes: 0 complete; 1 error; 75 stopped by SIGTERM or SIGHUP, the same command resumes; 130 Ctrl-C.
"""

import sys
import time
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from lcm_jax import command, config_files
from lcm_jax.errors import check_devices, keep_interrupts

FLAGS = flags.FlagValues()  # of this command alone, so that others can be imported beside it
OWN: dict[str, Any] = {"flag_values": FLAGS}
CONFIG = config_flags.DEFINE_config_file("config", None, "A bundled study or a file.", **OWN)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the study: a folder for each run, figure and table.", **OWN)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the runs and which of them are complete, then exit.", **OWN)

EXAMPLE = """Example:

    python -m lcm_jax.study --config=study_ema --workdir=runs/study_ema --dry_run
    python -m lcm_jax.study --config=study_ema --workdir=runs/study_ema --config.overrides.train.steps=2000
    python -m lcm_jax.study --config=study_solver --workdir=runs/k --config.grid.objective.num_ddim_steps='(50,20)'"""


def study() -> None:
    """Run what is left of the study and write its results. Raises ValueError, RunError, OSError and Interrupted."""
    from lcm_jax.recipes import make_task
    from lcm_jax.studies import plan
    from lcm_jax.training import distributed, loop

    keep_interrupts()
    command.configure_jax()
    check_devices()
    workdir = Path(WORKDIR.value or "")
    chosen = plan.make_plan(CONFIG.value, workdir)
    done = [each.run.name for each in chosen.runs if plan.is_complete(each)]
    if DRY_RUN.value:
        for each in chosen.runs:
            print(f"{'complete' if each.run.name in done else 'to do   '}  {each.folder}")
        return
    chosen.claim()
    print(f"{len(chosen.runs)} runs, {len(done)} of them complete, in {workdir}")
    if done:
        chosen.write(done)  # a table of what is there, whatever becomes of the other runs
    spent: list[float] = []
    for each in chosen.runs:
        if each.run.name in done:
            continue
        print(f"run {each.run.name}: {each.folder}")
        began = time.monotonic()
        if not loop.train(make_task(each.config, each.folder), each.config, each.folder):
            sys.exit(distributed.RESUMABLE)
        done.append(each.run.name)
        spent.append(time.monotonic() - began)
        chosen.write(done)
        left = (len(chosen.runs) - len(done)) * sum(spent) / len(spent)
        print(f"{len(done)} of {len(chosen.runs)} runs complete; about {left // 60:.0f}:{left % 60:02.0f} left")
    print(f"table in {workdir / 'report.md'} and {workdir / 'report.json'}, figure in {workdir / 'figure.png'}")


def parse(argv: list[str]) -> list[str]:
    """Parse the flags and return the remaining arguments. Raises ValueError of one line if they are wrong."""
    rest = config_files.parse(FLAGS, argv)
    for name, value in (("config", CONFIG.value), ("workdir", WORKDIR.value)):
        if value is None:
            raise ValueError(f"--{name} is missing; use --config=study_solver --workdir=FOLDER, or see --help")
    return rest


def main() -> None:
    """The command; exits as `command.run` does."""
    describe = lambda: f"{__doc__}\nOptions:{FLAGS.module_help(sys.modules[__name__])}\n{EXAMPLE}"  # noqa: E731
    command.run(study, parse, describe, "lower overrides.train.batch_size", must_be_seen=True)


if __name__ == "__main__":
    main()
