"""Checkpoints of a run: written asynchronously, committed atomically, kept by a policy."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from lcm_jax.errors import RunError, disk_is_full, first_line
from lcm_jax.training.state import TrainState
from lcm_jax.weights.orbax_tree import checksum, ignore_orphans

STABLER = "start in another --workdir with a lower optimizer.learning_rate or in float32 (train.dtype)"


class CheckpointError(RunError):
    """A checkpoint cannot be read or written, or none of a folder that has some can."""


def checksums(state) -> dict[str, int]:
    """The crc32 of each leaf's bytes, by its path: orbax returns flipped bits on a disk without a word.

    A leaf of which this process does not hold every value (FSDP over several hosts) has none.
    """
    return {
        jax.tree_util.keystr(path): checksum(jax.device_get(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if isinstance(leaf, np.ndarray) or leaf.is_fully_addressable or leaf.is_fully_replicated
    }


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])


def not_finite(state) -> list[str]:
    """Return the paths of the arrays with a NaN or an infinity; one reduction on the device."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    finite = np.asarray(_all_finite([leaf for _, leaf in leaves]))
    return [jax.tree_util.keystr(path) for (path, _), good in zip(leaves, finite, strict=True) if not good]


class Checkpoints:
    """The checkpoints in `folder`, one numbered subfolder each; the newest `keep` stay.

    A subfolder appears under its number only when it is complete, so that a run killed while writing leaves the one
    before it untouched.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = Path(folder).absolute()
        self._keep = keep
        self._aside = self.folder.with_name(self.folder.name + "-unreadable")
        # orbax logs its steps by absl, at level INFO, which absl commands print, and in hundreds of lines what its
        # threads raise, which `save` and `wait` raise as well.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        ignore_orphans()
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, enable_async_checkpointing=True, create=True)
        return ocp.CheckpointManager(self.folder, options=options)

    def save(self, state: TrainState) -> None:
        """Starts to write `state` in the background; returns once it is safe to donate the arrays.

        Raises CheckpointError if the state is not finite, also if its step is saved already, and as `wait` does.
        """
        step = int(state.step)
        if bad := not_finite(state):
            more = f" and {len(bad) - 1} more arrays are" if len(bad) > 1 else " is"
            raise CheckpointError(
                f"step {step}: {bad[0]}{more} not finite, which is not saved; {self.summary(resume=False)}; {STABLER}"
            )
        if step not in self._manager.all_steps():
            arguments = ocp.args.StandardSave(state)
            with self._writing():
                self._manager.save(step, args=arguments, custom_metadata={"crc32": checksums(state)})

    def wait(self) -> None:
        """Returns when everything asked for is on disk.

        Raises CheckpointError for what went wrong in the background (a full disk, say).
        """
        with self._writing():
            self._manager.wait_until_finished()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # orbax and tensorstore raise many kinds
            if isinstance(error, MemoryError):
                raise
            full = disk_is_full(error)
            reason, remedy = ("the disk is full", "free some space") if full else (first_line(error), "mend that")
            raise CheckpointError(
                f"no checkpoint can be written to {self.folder}: {reason}; {remedy}; {self.summary()}"
            ) from error

    def summary(self, resume: bool = True) -> str:
        """Return what is kept for the next process of this run, as a clause."""
        with suppress(Exception):  # one that is being written counts if it succeeds
            self._manager.wait_until_finished()
        steps = self._manager.all_steps(read=True)
        if not steps:
            return f"there is no checkpoint in {self.folder} yet"
        return f"checkpoint {max(steps)} in {self.folder} is kept" + "; run the same command to resume there" * resume

    def restore(self, abstract: TrainState, say=print) -> TrainState | None:
        """The newest state that can be read, on the shardings of `abstract`, or None where no step was ever saved.

        A checkpoint that cannot be read, or whose values are not those that were saved, is moved aside to
        `<folder>-unreadable/`, named, and the one before it is tried.
        Raises CheckpointError when there were checkpoints and none could be read: starting over would bury them.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                state = cast(TrainState, self._manager.restore(step, args=ocp.args.StandardRestore(abstract)))
                self._compare(step, state)
            except Exception as error:  # orbax and tensorstore raise many kinds; every one of them is reported
                if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                    raise  # the checkpoint is not to blame
                aside = self._set_aside(step)
                reason = first_line(error)
                say(f"checkpoint {step} cannot be read ({reason}); moved to {aside}, trying the one before it")
                continue
            return state
        if aside := sorted(path.name for path in self._aside.glob("*")):
            raise CheckpointError(
                f"none of the checkpoints in {self.folder} could be read; {', '.join(aside)} are kept in "
                f"{self._aside}: start in another --workdir to train from the beginning"
            )
        return None

    def _compare(self, step: int, state: TrainState) -> None:
        """Raises CheckpointError where a leaf's checksum is not the one saved with it."""
        saved = (self._manager.metadata(step).custom_metadata or {}).get("crc32", {})
        found = checksums(state)
        changed = [name for name in saved if name in found and saved[name] != found[name]]
        if changed:
            raise CheckpointError(f"{len(changed)} arrays are not what was saved, first {changed[0]}")

    def _set_aside(self, step: int) -> Path:
        self._manager.close()
        self._aside.mkdir(exist_ok=True)
        target = self._aside / str(step)
        while target.exists():
            target = target.with_name(target.name + "_")
        shutil.move(self.folder / str(step), target)
        self._manager = self._open()
        return target

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._manager.close()
