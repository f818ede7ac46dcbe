"""Checkpoints of a run: written asynchronously, committed atomically, kept by a policy."""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from lcm_jax.errors import RunError, disk_is_full, first_line
from lcm_jax.training import distributed
from lcm_jax.training.state import TrainState
from lcm_jax.weights.orbax_tree import checksum, ignore_orphans

STABLER = "use another --workdir with a lower optimizer.learning_rate or in float32 (train.dtype)"


class CheckpointError(RunError):
    """A checkpoint that cannot be read or written, or a folder without a readable one."""


def checksums(state) -> dict[str, int]:
    """Return the crc32 of each leaf's bytes by its path, since orbax does not detect flipped bits.

    Leaves that are sharded over several processes are left out.
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
    """Return the paths of the arrays with a NaN or an infinity, found by one reduction on the device."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    finite = np.asarray(_all_finite([leaf for _, leaf in leaves]))
    return [jax.tree_util.keystr(path) for (path, _), good in zip(leaves, finite, strict=True) if not good]


class Checkpoints:
    """The checkpoints in `folder`, a numbered subfolder each.

    keep: the number of the newest ones that are kept, or None to keep all. A subfolder is renamed to its number only
    when it is complete, so that a run that is killed while it writes leaves the previous one intact.
    """

    def __init__(self, folder: Path, keep: int | None):
        self.folder = Path(folder).absolute()
        self._keep = keep
        self._aside = self.folder.with_name(self.folder.name + "-unreadable")
        # orbax logs each step at level INFO, which absl commands print, and errors of its threads in hundreds of lines,
        # which `save` and `wait` raise as well.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        ignore_orphans()
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, enable_async_checkpointing=True, create=True)
        try:
            return ocp.CheckpointManager(self.folder, options=options)
        except (ValueError, TypeError) as error:  # orbax reads the metadata of every checkpoint
            raise CheckpointError(
                f"{self.folder} cannot be opened ({first_line(error)}); delete what is damaged"
            ) from error

    def save(self, state: TrainState, note: Mapping[str, Any] | None = None) -> None:
        """Start to write `state` in the background; return as soon as its arrays can be donated.

        note: JSON that `notes` returns. A step that is already saved is not written again. Raises CheckpointError if
        the state is not finite, and as `wait` does.
        """
        step = int(state.step)
        if bad := not_finite(state):
            more = f" and {len(bad) - 1} more arrays are" if len(bad) > 1 else " is"
            raise CheckpointError(
                f"step {step}: {bad[0]}{more} not finite; not saved; {self.summary(resume=False)}; {STABLER}"
            )
        if step not in self._manager.all_steps():
            arguments = ocp.args.StandardSave(state)
            metadata = {"crc32": checksums(state), "note": dict(note or {})}
            with self._writing():
                self._manager.save(step, args=arguments, custom_metadata=metadata, force=True)  # older steps as well

    def notes(self) -> dict[int, dict[str, Any]]:
        """Return the notes of the checkpoints by step; a note is empty if it was saved without one.

        Raises CheckpointError for one that is damaged.
        """
        notes = {}
        for step in self._manager.all_steps():
            try:
                notes[step] = dict((self._manager.metadata(step).custom_metadata or {}).get("note") or {})
            except Exception as error:  # orbax raises many kinds
                path = self.folder / str(step)
                raise CheckpointError(f"the metadata of {path} is damaged ({first_line(error)}); delete it") from error
        return notes

    def delete(self, step: int) -> None:
        """Delete the checkpoint of a step; every process has to call it."""
        with self._writing():
            self._manager.delete(step)

    def wait(self) -> None:
        """Wait until every checkpoint is on disk.

        Raises CheckpointError if one could not be written, such as for a full disk.
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
            reason, remedy = ("the disk is full", "free some space") if full else (first_line(error), "fix this")
            raise CheckpointError(
                f"a checkpoint cannot be written to {self.folder}: {reason}; {remedy}; {self.summary()}"
            ) from error

    def summary(self, resume: bool = True) -> str:
        """Return a clause that names the checkpoint from which the run can resume."""
        with suppress(Exception):  # a checkpoint that is being written counts if it succeeds
            self._manager.wait_until_finished()
        steps = self._manager.all_steps(read=True)
        if not steps:
            return f"there is no checkpoint in {self.folder} yet"
        return f"checkpoint {max(steps)} in {self.folder} is kept" + "; run the same command to resume there" * resume

    def restore(self, abstract: TrainState, log: Callable[[str], None] = print) -> TrainState | None:
        """Return the latest readable state on the shardings of `abstract`, or None if there is no checkpoint.

        A checkpoint that cannot be read or whose checksums do not match is logged and moved to `<folder>-unreadable/`,
        and the previous one is tried. Raises CheckpointError if there are checkpoints and none can be read, since
        training from the beginning would replace them.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                state = cast(TrainState, self._manager.restore(step, args=ocp.args.StandardRestore(abstract)))
                self._compare(step, state)
            except Exception as error:  # orbax and tensorstore raise many kinds; all are logged
                if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                    raise  # the checkpoint may be intact
                aside = self._set_aside(step)
                reason = first_line(error)
                log(f"checkpoint {step} cannot be read ({reason}); moved to {aside}; trying the previous one")
                continue
            return state
        if aside := sorted(path.name for path in self._aside.glob("*")):
            raise CheckpointError(
                f"none of the checkpoints in {self.folder} can be read; {', '.join(aside)} are kept in {self._aside}; "
                "use another --workdir to train from the beginning"
            )
        return None

    def _compare(self, step: int, state: TrainState) -> None:
        """Raise CheckpointError if a leaf's checksum is not the saved one."""
        saved = (self._manager.metadata(step).custom_metadata or {}).get("crc32", {})
        found = checksums(state)
        changed = [name for name in saved if name in found and saved[name] != found[name]]
        if changed:
            raise CheckpointError(f"checksum mismatch in {len(changed)} arrays, e.g. {changed[0]}")

    def _set_aside(self, step: int) -> Path:
        self._manager.close()
        self._aside.mkdir(exist_ok=True)
        target = self._aside / str(step)
        while target.exists():
            target = target.with_name(target.name + "_")
        distributed.wait_for_all("unreadable")  # every process has closed it, and found the same place
        if distributed.is_main():
            shutil.move(self.folder / str(step), target)
        distributed.wait_for_all("moved aside")
        self._manager = self._open()
        return target

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._manager.close()
