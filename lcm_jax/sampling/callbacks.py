"""Calls of a person's function on the host after each step of a compiled program, and a progress bar by them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

PROGRESS_STEPS = 10  # fewer are done before a bar is read


class StepCallback:
    """Function that a compiled program calls on the host after each step; what it calls in turn is set by each run.

    Programs are compiled once, and so need one function for all runs.
    """

    def __init__(self) -> None:
        self._function: Callable[[int, float, np.ndarray], np.ndarray] | None = None
        self._error: BaseException | None = None

    def __call__(self, i: np.ndarray, t: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Return the latents to go on with, float32[B, h, w, c], after step i: int32[] at t with latents z."""
        assert self._function is not None
        try:
            return self._function(int(i), t.item(), np.asarray(z))
        except BaseException as error:
            self._error = error  # JAX reports the text alone
            raise

    @contextmanager
    def calling(self, function: Callable[[int, float, np.ndarray], np.ndarray]) -> Iterator[None]:
        """Call function(i, t, z) after each step of the programs that run inside; its exceptions are raised here."""
        self._function, self._error = function, None
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if self._error is None:
                raise
            raise self._error from error
        finally:
            self._function = None

    @contextmanager
    def each_step(
        self,
        function: Callable[[int, float, np.ndarray], np.ndarray] | None,
        progress: bool | None,
        steps: int,
        batches: int,
    ) -> Iterator["StepCallback | None"]:
        """Yield this callback if programs are to call it, else None.

        It calls function(i, t, z), if there is one, and moves a bar of all steps of all batches. progress: True for the
        bar; None shows it from PROGRESS_STEPS steps on, where stderr can show one.
        """
        if progress is None:
            progress = steps >= PROGRESS_STEPS and shows_progress()
        if function is None and not progress:
            yield None
            return
        with progress_bar(steps * batches, progress) as advance:

            def each(i: int, t: float, z: np.ndarray) -> np.ndarray:
                z = z if function is None else function(i, t, z)
                advance()
                return z

            with self.calling(each):
                yield self


def diffusers_callback(pipe: Any, function: Callable[[Any, int, Any, dict], Any]) -> Callable:
    """Return function(i, t, z) that calls `function` as diffusers does: (pipe, i, t, {"latents": z}).

    It returns the latents of the dict that `function` returns, if there are any. Raises ValueError for another result,
    and for latents of another shape.
    """

    def call(i: int, t: float, z: np.ndarray) -> np.ndarray:
        result = function(pipe, i, t, {"latents": z})
        if result is None:
            return z
        if not isinstance(result, dict) or set(result) - {"latents"}:
            raise ValueError(
                f"callback_on_step_end returned {result!r:.80}; return a dict with latents, an empty one, or None"
            )
        latents = np.asarray(result.get("latents", z), np.float32)
        if latents.shape != z.shape:
            raise ValueError(f"callback_on_step_end returned latents of shape {latents.shape}; return {z.shape} (NHWC)")
        return latents

    return call


def shows_progress() -> bool:
    """Return True if stderr can show a bar: in a terminal or a notebook."""
    from rich.console import Console

    console = Console(stderr=True)
    return console.is_terminal or console.is_jupyter


@contextmanager
def progress_bar(total: int, shown: bool) -> Iterator[Callable[[], None]]:
    """Show a bar of `total` steps with the time left on stderr; yields a function that counts one step."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)
