"""Checkpoints of a run: written asynchronously, committed atomically, kept by a policy (the only importer of orbax)."""

import logging
import shutil
import zlib
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from lcm_jax.training.state import TrainState


class CheckpointError(RuntimeError):
    """No checkpoint of a folder that has some can be read."""


def checksums(state: TrainState) -> dict[str, int]:
    """The crc32 of each leaf's bytes, by its path: orbax returns flipped bits on a disk without a word.

    A leaf of which this process does not hold every value (FSDP over several hosts) has none.
    """
    return {
        jax.tree_util.keystr(path): zlib.crc32(np.ascontiguousarray(jax.device_get(leaf)))
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if leaf.is_fully_addressable or leaf.is_fully_replicated
    }


class Checkpoints:
    """The checkpoints in `folder`, one numbered subfolder each; the newest `keep` stay.

    A subfolder appears under its number only when it is complete, so that a run killed while writing leaves the one
    before it untouched.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = Path(folder).absolute()
        self._keep = keep
        # orbax tells its steps by absl at level INFO, which absl commands print.
        logging.getLogger("absl").setLevel(logging.WARNING)
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, enable_async_checkpointing=True, create=True)
        return ocp.CheckpointManager(self.folder, options=options)

    def save(self, state: TrainState) -> None:
        """Starts to write `state` in the background; returns once it is safe to donate the arrays."""
        step = int(state.step)
        if step not in self._manager.all_steps():
            self._manager.save(
                step, args=ocp.args.StandardSave(state), custom_metadata={"crc32": checksums(state)}
            )

    def wait(self) -> None:
        """Returns when everything asked for is on disk; raises what went wrong in the background (a full disk, say)."""
        self._manager.wait_until_finished()

    def restore(self, abstract: TrainState, say=print) -> TrainState | None:
        """The newest state that can be read, on the shardings of `abstract`, or None where no step was ever saved.

        A checkpoint that cannot be read, or whose values are not those that were saved, is moved aside to
        `<folder>-unreadable/`, named, and the one before it is tried.
        Raises CheckpointError when there were checkpoints and none could be read: starting over would bury them.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                state = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
                self._compare(step, state)
            except Exception as error:  # orbax and tensorstore raise many kinds; every one of them is reported
                aside = self._set_aside(step)
                reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
                say(f"checkpoint {step} cannot be read ({reason}); moved to {aside}, trying the one before it")
                continue
            return state
        if steps:
            raise CheckpointError(
                f"none of the checkpoints {steps} in {self.folder} could be read; "
                f"they are kept in {self.folder}-unreadable: start in another --workdir to train from the beginning"
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
        aside = self.folder.with_name(self.folder.name + "-unreadable")
        aside.mkdir(exist_ok=True)
        target = aside / str(step)
        while target.exists():
            target = target.with_name(target.name + "_")
        shutil.move(self.folder / str(step), target)
        self._manager = self._open()
        return target

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()
