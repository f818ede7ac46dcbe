"""The best checkpoint by a figure: the same whatever interrupts the run, and whole at every moment."""

import errno
import json
import os
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import line_process
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from whole_runs import QUICK, checkpoints_of, shrunk_lcd

from lcm_jax.training.best import BestCheckpoint, check_best
from lcm_jax.training.checkpoint import CheckpointError, Checkpoints
from lcm_jax.training.logging import read_previews
from lcm_jax.training.loop import train
from lcm_jax.training.state import TrainState
from lcm_jax.weights.orbax_folder import find_run
from lcm_jax.weights.orbax_tree import read_leaves

VALUES = {0: 5.0, 1: 4.0, 2: 6.0, 3: 2.0, 4: 2.0, 5: 3.0, 6: 2.5}  # of previews, by step: the best is at 3


def config_of(**more):
    settings = {
        "mesh.data": 1,
        "train.steps": 6,
        "checkpoint.every_steps": 2,
        "checkpoint.best": "error@4",
        "sample.every_steps": 1,
    }
    return shrunk_lcd("a teacher that is never read", **QUICK | settings | more)


def task_of():
    """The line of line_process, whose previews have VALUES."""
    write_preview = lambda average, frozen, path: {"error@4": VALUES[int(path.stem)]}  # noqa: E731
    return replace(line_process.line(), write_preview=write_preview, figures={"error@4": True})


def kept(workdir: Path) -> tuple[int, bytes]:
    """(step, the trained numbers) of the only checkpoint in best/."""
    (folder,) = (workdir / "best").iterdir()
    (leaf,) = read_leaves(workdir / "best", int(folder.name), [("params", "slopes")]).values()
    return int(folder.name), leaf.tobytes()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("unbroken")
    assert train(task_of(), config_of(**{"checkpoint.keep": 9, "checkpoint.every_steps": 1}), workdir)
    return workdir


def figures(workdir: Path) -> list[tuple[float, ...]]:
    return [(each["step"], each["error@4"], each["best_step"]) for each in read_previews(workdir)]


def test_the_first_of_the_best_is_kept_beside_the_last(unbroken):
    step, slopes = kept(unbroken)
    (there,) = read_leaves(unbroken / "checkpoints", 3, [("params", "slopes")]).values()
    assert step == 3 and slopes == there.tobytes() and checkpoints_of(unbroken)[-1] == 6
    assert figures(unbroken) == list(zip(VALUES, VALUES.values(), (0, 1, 1, 3, 3, 3, 3), strict=True))
    state = ocp.PyTreeCheckpointer().restore(unbroken / "best" / "3" / "default")
    assert state.keys() == {"step", "params", "ema", "opt_state"}, "of the form of every other"


def killed(when):
    """A method that ends the process where `when(argument)` is true, before it does anything."""

    def method(original):
        def run(self, argument, *rest):
            if when(argument):
                raise SystemExit("as after kill -9")
            return original(self, argument, *rest)

        return run

    return method


MOMENTS = {  # of a kill: the method, when, what is in best/ then, and the number of updates between checkpoints
    "beyond the last checkpoint": ("consider", lambda state: state.step == 4, ["3"], 5),
    "before it is written": ("save", lambda state: state.step == 3, ["1"], 3),
    "before the other is deleted": ("delete", lambda step: step == 1, ["1", "3"], 3),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_has_the_same_best(moment, unbroken, tmp_path, monkeypatch):
    name, when, left, every = MOMENTS[moment]
    config = config_of(**{"checkpoint.every_steps": every})
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(BestCheckpoint, name, killed(when)(getattr(BestCheckpoint, name)))
        train(task_of(), config, tmp_path)
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == left
    assert train(task_of(), config, tmp_path)
    assert kept(tmp_path) == kept(unbroken) and figures(tmp_path)[-1] == figures(unbroken)[-1]
    assert [each[:2] for each in figures(tmp_path)] == list(VALUES.items()), "each preview is recorded once"


def test_a_full_disk_leaves_the_best_before_it(tmp_path, monkeypatch):
    def full(manager, step, *arguments, **options):
        if "best" in str(manager.directory) and step == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(manager, step, *arguments, **options)

    save = ocp.CheckpointManager.save
    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    with pytest.raises(
        CheckpointError, match="^a checkpoint cannot .*best: the disk is full, and it needs 0.00 GB; free some space; "
    ) as error:
        train(task_of(), config_of(), tmp_path)
    assert "checkpoint 2 in" in str(error.value) and "\n" not in str(error.value)
    assert kept(tmp_path)[0] == 1


def state_at(step: int) -> TrainState:
    slopes = {"slopes": jnp.full(4, float(step))}
    return TrainState(step=jnp.int32(step), params=slopes, ema=slopes, opt_state=())


def consider(folder: Path, values: dict[int, float], figure="verifier@4", lower=False, settings=(("prompts", 36),)):
    """The steps at which `values` were the best so far."""
    with closing(Checkpoints(folder / "checkpoints", 2)) as last:
        with closing(BestCheckpoint(folder / "best", figure, lower, dict(settings), last)) as best:
            return [step for step, value in values.items() if best.consider(state_at(step), {figure: value})]


def test_what_is_better_and_what_does_not_compare(tmp_path):
    kept_steps = lambda: sorted(int(path.name) for path in (tmp_path / "best").iterdir())  # noqa: E731
    assert consider(tmp_path, {0: np.nan, 1: 0.5, 2: 0.5, 3: np.inf, 4: 0.75, 5: 0.25}) == [1, 4], "higher is better"
    assert consider(tmp_path, {6: 0.75, 7: 0.5}) == [] and kept_steps() == [4], "it is known after a resume"
    assert consider(tmp_path, {2: 9.0}, "frechet@4", lower=True) == [2], "another figure begins anew"
    assert kept_steps() == [2]
    assert consider(tmp_path, {2: 0.5}, settings=[("prompts", 72)]) == [2], "the same state by other settings"
    assert consider(tmp_path, {8: 0.5}, settings=[("prompts", 72)]) == [] and kept_steps() == [2]


@pytest.mark.parametrize("content", [[1], {"custom_metadata": [1]}, {"custom_metadata": {"note": [1]}}])
def test_a_damaged_note_is_named(content, tmp_path):
    assert consider(tmp_path, {1: 0.5}) == [1]
    (tmp_path / "best" / "1" / "_CHECKPOINT_METADATA").write_text(json.dumps(content))
    with pytest.raises(
        CheckpointError, match=r"best(/1 is damaged| cannot be opened) \(.*\); delete (it|what is damaged)$"
    ):
        consider(tmp_path, {2: 0.6})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"checkpoint.best": "error@3"},
            "^checkpoint.best 'error@3' is not a figure of .* previews; use one of error@4$",
        ),
        ({"sample.every_steps": 0}, "^checkpoint.best 'error@4' requires previews; set sample.every_steps above 0"),
    ],
)
def test_a_figure_that_no_preview_gives_is_refused_before_anything_starts(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(task_of(), config_of(**settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="set it to '', since they have none"):
        check_best(config_of(), {})


def test_checkpoints_may_lie_elsewhere(tmp_path):
    """Their folder resumes the run, and opens with the workdir and without it."""
    workdir, far = tmp_path / "run", tmp_path / "far"
    config = config_of(**{"checkpoint.folder": str(far), "train.steps": 4})
    for _ in range(2):
        assert train(task_of(), config, workdir)
    assert not (workdir / "checkpoints").exists() and not (workdir / "best").exists()
    assert {path.name for path in far.iterdir()} == {"checkpoints", "best", "config.json"}
    assert [path.name for path in (far / "best").iterdir()] == ["3"]
    for place in (workdir, workdir / "checkpoints", far, far / "checkpoints"):
        assert find_run(place)[1:] == (epath.Path(far) / "checkpoints", None)
    assert find_run(workdir / "best") == (workdir, epath.Path(far) / "best", None)
    assert find_run(workdir / "checkpoints" / "4") == (workdir, epath.Path(far) / "checkpoints", 4)
    with pytest.raises(
        CheckpointError, match=f"^checkpoint.folder is {workdir}, which has no checkpoint, and this run"
    ):
        train(task_of(), config_of(**{"train.steps": 4}), workdir)
