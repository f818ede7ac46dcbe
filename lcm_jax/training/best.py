"""The best checkpoint of a run by one figure of its previews, kept beside the last one."""

import math
from collections.abc import Mapping
from typing import Any

from etils import epath

from lcm_jax.training import distributed
from lcm_jax.training.checkpoint import Checkpoints
from lcm_jax.training.state import TrainState


def check_best(config, figures: Mapping[str, bool]) -> None:
    """Raise ValueError if no preview gives the figure that `config.checkpoint.best` names.

    figures: those that previews give, see `TrainTask`.
    """
    name = config.checkpoint.best
    if not name:
        return
    if name not in figures:
        given = f"use one of {', '.join(figures)}" if figures else "set it to '', since they have none"
        raise ValueError(f"checkpoint.best {name!r} is not a figure of this run's previews; {given}")
    if not config.sample.every_steps:
        raise ValueError(f"checkpoint.best {name!r} requires previews; set sample.every_steps above 0, or this to ''")


class BestCheckpoint(Checkpoints):
    """The checkpoint with the best value of one figure, in `folder` as those of `Checkpoints` are in theirs.

    A better one is complete before the one before it is deleted. Its metadata has the figure, the value and the
    settings by which it was measured: a value of another figure or by other settings does not compare, and the next one
    replaces it. A resumed run makes the same previews again, so that the best of a step that it has yet to reach stays.

    figure: its name. lower: True if lower is better. last: the other checkpoints of the run, from which it resumes.
    """

    def __init__(
        self, folder: epath.PathLike, figure: str, lower: bool, settings: Mapping[str, Any], last: Checkpoints
    ):
        super().__init__(folder, keep=None)
        self._sign, self._last = (-1.0 if lower else 1.0), last
        self._rule = {"figure": figure, "settings": dict(settings)}
        self.figure, self.step, self._value = figure, None, math.nan
        for step, note in sorted(self.notes().items()):
            value = note.get("value")
            if isinstance(value, float) and {k: note.get(k) for k in self._rule} == self._rule and self._beats(value):
                self.step, self._value = step, value
        if self.step is not None:  # a run may have been killed before it deleted the others
            self._delete_others()

    def _beats(self, value: float) -> bool:
        return math.isfinite(value) and not self._sign * value <= self._sign * self._value

    def summary(self, resume: bool = True, wait: bool = True) -> str:
        return self._last.summary(resume, wait)

    def consider(self, state: TrainState, figures: Mapping[str, float]) -> bool:
        """Save `state` if its figure is better than every one before it; return True once it is saved.

        Every process calls it. figures: of the preview of `state`, in the main process; elsewhere empty. Raises
        CheckpointError as `save` and `wait` do; the best one before then stays.
        """
        value = float(figures.get(self.figure, math.nan))
        if not distributed.any_process(self._beats(value)):
            return False
        self._last.wait()  # processes meet in the same order while one of the two is written
        step = int(state.step)
        if step in self.steps():  # the same state, measured by another figure
            self.delete(step)
        self.save(state, self._rule | {"value": value})
        self.wait()
        self.step, self._value = step, value
        self._delete_others()
        return True

    def _delete_others(self) -> None:
        for step in self.steps():
            if step != self.step:
                self.delete(step)
