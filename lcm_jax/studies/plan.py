"""The plan of a study: its runs with their folders and configs, checked before any work, and its results."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from lcm_jax.errors import RunError
from lcm_jax.files import write_text
from lcm_jax.ranges import MANY_STEPS, check_setting, from_settings
from lcm_jax.recipes import check_config
from lcm_jax.recipes.settings import leaves
from lcm_jax.studies import results
from lcm_jax.studies.grid import Run, read_grid, run_configs
from lcm_jax.studies.sampling import Sampling, sample_scales
from lcm_jax.training.workdir import check_workdir, differences, read_object

GROUPS = ("base", "overrides", "grid", "design", "figure")
OPTIONAL = ("sampling",)


class Planned(NamedTuple):
    """A run, its config and its folder."""

    run: Run
    config: Any
    folder: Path


@dataclass(frozen=True)
class Plan:
    """A study in a folder. study: its config. sampling: of each run, or None for the figures of its own report."""

    study: Any
    workdir: Path
    runs: tuple[Planned, ...]
    sampling: Sampling | None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The settings by which a folder is that of this study: all but the figure, and the values of the grid and of
        the guidance scales, to which more may be added."""
        names = [name for name in (*GROUPS, *OPTIONAL) if name in self.study and name not in ("grid", "figure")]
        settings = {name: self.study[name] for name in names}
        plain = {name: each.to_dict() if isinstance(each, ConfigDict) else each for name, each in settings.items()}
        plain.get("sampling", {}).pop("guidance_scales", None)
        return json.loads(json.dumps(plain | {"grid": [key for key, _ in leaves(self.study.grid.to_dict())]}))

    def check(self) -> None:
        """Raise RunError if the folder is that of a run or of another study. Writes nothing."""
        if (self.workdir / "config.json").exists():
            raise RunError(f"--workdir={self.workdir} is the folder of a run; use another one for a study")
        path = self.workdir / "study.json"
        if not path.exists():
            return
        theirs = read_object(path, "delete it to continue with the config of this command")
        if changed := differences(theirs, self.identity):
            key, before, now = changed[0]
            raise RunError(
                f"--workdir={self.workdir} was created with another study: {key} is {before!r} there and {now!r} here; "
                "use another --workdir, or restore these values"
            )

    def claim(self) -> None:
        """Create the folder with study.json, by which `check` recognizes it."""
        self.workdir.mkdir(parents=True, exist_ok=True)
        write_text(self.workdir / "study.json", json.dumps(self.identity, indent=1) + "\n")

    def rows(self, complete: Sequence[Planned]) -> list[dict[str, Any]]:
        """Return the rows of these runs, which are complete, and first those of their teacher.

        With `sampling`, the runs are sampled here, unless that has been done.
        """
        found = []
        for run, config, folder in complete:
            if self.sampling is None:
                found += results.run_rows(run, config, folder)
            else:
                described = results.describe_run(run, config, folder)
                found += [described | row for rows in sample_scales(self.sampling, config, folder) for row in rows]
        others = [] if self.sampling is not None or not complete else results.teacher_rows(complete[0].folder)
        return others + found

    def write(self, names: Collection[str]) -> None:
        """Write figure.png, report.md and report.json of the runs of these names, which are complete; see `rows`."""
        complete = [each for each in self.runs if each.run.name in names]
        first = results.read_report(complete[0].folder)
        seconds = sum(results.read_report(each.folder)["seconds"]["training"] for each in complete)
        train = complete[0].config.train
        conditions = {name: first[name] for name in ("device", "versions")} | {
            "base": self.study.base,
            "runs": [len(complete), len(self.runs)],
            "updates": train.steps,
            "batch_size": train.batch_size,
            "captions": first["captions"] if self.sampling is None else self.sampling.captions,
            "training_seconds": round(seconds, 1),
        }
        results.write(self.study, self.workdir.resolve().name, self.rows(complete), conditions, self.workdir)


def is_complete(planned: Planned) -> bool:
    """Return True if a run has its report and its export. Raises RunError if it was made with another config."""
    check_workdir(planned.folder, planned.config.to_dict())
    return (planned.folder / "report.json").exists() and (planned.folder / "export").exists()


def make_plan(study, workdir: Path) -> Plan:
    """Return the plan of a study's config in a folder; nothing is written.

    Raises ValueError for settings that are not supported, of the study or of one of its runs, which is named; RunError
    for the folder of a run or of another study.
    """
    if missing := [name for name in GROUPS if name not in study]:
        raise ValueError(f"the config has no {missing[0]}; copy it from a bundled study, such as study_solver")
    if unknown := [name for name in study if name not in (*GROUPS, *OPTIONAL)]:
        raise ValueError(f"{unknown[0]} is not a key of a study; use {', '.join((*GROUPS, *OPTIONAL))}")
    sampling = None
    if "sampling" in study:
        sampling = from_settings(Sampling, "sampling", study.sampling.to_dict())
    runs = []
    for run, config in run_configs(study, workdir.resolve()):
        try:
            check_config(config)
            if "student" not in config.get("report", {}):
                raise ValueError(f"base {study.base} has no report of a student; use a base of LCD, LCF or fine-tuning")
            if sampling is not None:
                sampling.check(config)
        except ValueError as error:
            raise ValueError(f"run {run.name}: {error}") from None
        runs.append(Planned(run, config, workdir / run.name))
    _check_figure(study, runs, sampling)
    plan = Plan(study, workdir, tuple(runs), sampling)
    plan.check()
    return plan


def _check_figure(study, runs: Sequence[Planned], sampling: Sampling | None) -> None:
    figure, config = study.figure, runs[0].config
    allowed = ("run", *read_grid(study), *results.OWN)
    for name in ("x", "lines"):
        check_setting(f"figure.{name}", figure[name], allowed)
    check_setting("figure.steps", figure.steps, MANY_STEPS)
    metrics = config.metrics if sampling is None else (*sampling.metrics, "diversity")
    for metric in figure.metrics:
        check_setting("figure.metrics", metric, tuple(metrics))
    student = config.report.student.to_dict().values() if sampling is None else [sampling.steps]
    if missing := [n for n in figure.steps if n not in {n for numbers in student for n in numbers}]:
        raise ValueError(f"figure.steps has {missing[0]}, and no run is sampled in so many steps; remove it")
