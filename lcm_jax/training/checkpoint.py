"""Checkpoints of a run: written asynchronously, committed atomically, kept by a policy."""

import json
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
from etils import epath
from orbax.checkpoint import checkpoint_managers as managers

from lcm_jax.errors import RunError, disk_is_full, first_line
from lcm_jax.training import distributed
from lcm_jax.training.state import TrainState
from lcm_jax.weights.orbax_folder import checkpoint_root
from lcm_jax.weights.orbax_tree import absolute, checksum, ignore_orphans

GB = 1e9  # bytes
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


def check_root(workdir: Path, folder: str, before: str) -> None:
    """Raise CheckpointError if the folder of the checkpoints cannot be reached, or is not that of the run so far.

    folder, before: `config.checkpoint.folder`, now and when the run was last started. Writes nothing.
    """
    root, former = checkpoint_root(workdir, folder), checkpoint_root(workdir, before)
    try:
        if root == former or saved_steps(root / "checkpoints") or not (steps := saved_steps(former / "checkpoints")):
            return
    except Exception as error:  # each kind of remote folder has its own
        remedy = "set another checkpoint.folder"
        if isinstance(error, ImportError):
            remedy = f"install what it needs (for gs://: pip install lcm_jax[gcs]), or {remedy}"
        raise CheckpointError(f"checkpoint.folder {folder} cannot be read ({first_line(error)}); {remedy}") from error
    raise CheckpointError(
        f"checkpoint.folder is {root}, which has no checkpoint, and this run has some in {former}, up to {max(steps)}; "
        f"move its checkpoints/ and best/, or set checkpoint.folder to {before!r} as before"
    )


def saved_steps(folder: epath.Path) -> list[int]:
    """Return the steps of the checkpoints in `folder`, which need not exist."""
    return [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.exists() else []


class Checkpoints:
    """The checkpoints in `folder`, a numbered subfolder each.

    folder: a path, or a URL such as gs://bucket/run. keep: the number of the newest ones that are kept, or None to keep
    all. keep_every: those of steps that it divides are kept as well; 0 for none. A subfolder is renamed to its number
    only when it is complete, so that a run that is killed while it writes leaves the previous one intact.
    """

    def __init__(self, folder: epath.PathLike, keep: int | None, keep_every: int = 0):
        self.folder = absolute(folder)
        self._policies: list[managers.PreservationPolicy] = [managers.LatestN(keep)]
        if keep_every:
            self._policies.append(managers.EveryNSteps(keep_every))
        self._aside = self.folder.parent / f"{self.folder.name}-unreadable"
        # orbax logs each step at level INFO, which absl commands print, and errors of its threads in hundreds of lines,
        # which `save` and `wait` raise as well.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        ignore_orphans()
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(self._policies),
            enable_async_checkpointing=True,
            create=True,
            cleanup_tmp_directories=True,  # of a run that was killed while it wrote one
        )
        try:
            return ocp.CheckpointManager(self.folder, options=options)
        except (ValueError, TypeError) as error:  # orbax reads the metadata of every checkpoint
            raise CheckpointError(
                f"{self.folder} cannot be opened ({first_line(error)}); delete what is damaged"
            ) from error

    def save(self, state: TrainState, note: Mapping[str, Any] | None = None) -> None:
        """Start to write `state` in the background; return as soon as its arrays can be donated.

        note: JSON that `notes` returns. A step that is already saved is not written again. Raises CheckpointError if
        the state is not finite or the disk has no room for it, and as `wait` does.
        """
        step = int(state.step)
        if bad := not_finite(state):
            more = f" and {len(bad) - 1} more arrays are" if len(bad) > 1 else " is"
            raise CheckpointError(
                f"step {step}: {bad[0]}{more} not finite; not saved; {self.summary(resume=False)}; {STABLER}"
            )
        if step not in self._manager.all_steps():
            self.wait()  # for the room that the one before takes
            self._check_room(state)
            arguments = ocp.args.StandardSave(state)
            metadata = {"crc32": checksums(state), "note": dict(note or {})}
            with self._writing():
                self._manager.save(step, args=arguments, custom_metadata=metadata, force=True)  # older steps as well

    def _check_room(self, state: TrainState) -> None:
        """Raise CheckpointError if the disk has less room than the arrays take before they are compressed."""
        self._needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        if not distributed.is_main() or "://" in str(self.folder):
            return
        free = shutil.disk_usage(self.folder).free
        if free < self._needed:
            raise CheckpointError(
                f"a checkpoint cannot be written to {self.folder}: it needs {self._needed / GB:.2f} GB, and the disk "
                f"has {free / GB:.2f} GB free; free some space; {self.summary()}"
            )

    def notes(self) -> dict[int, dict[str, Any]]:
        """Return the notes of the checkpoints by step; a note is empty if it was saved without one.

        The main process reads them for all, which call this together: one of them that read later might find a
        checkpoint that another had deleted by then. Raises CheckpointError for one that is damaged.
        """
        notes = json.loads(distributed.from_main(json.dumps(self._read_notes())))
        distributed.wait_for_all("notes")  # none deletes one before all have opened the folder
        return dict(notes)

    def _read_notes(self) -> list[tuple[int, dict[str, Any]]]:
        """Return the notes as `notes` does; in other processes than the main one, none."""
        notes = []
        for step in self._manager.all_steps() if distributed.is_main() else ():
            try:
                notes.append((step, dict((self._manager.metadata(step).custom_metadata or {}).get("note") or {})))
            except Exception as error:  # orbax raises many kinds
                path = self.folder / str(step)
                raise CheckpointError(f"the metadata of {path} is damaged ({first_line(error)}); delete it") from error
        return notes

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, from the lowest on."""
        return sorted(self._manager.all_steps())

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
            reason, remedy = first_line(error), "fix this"
            if full:
                reason, remedy = f"the disk is full, and it needs {self._needed / GB:.2f} GB", "free some space"
            raise CheckpointError(
                f"a checkpoint cannot be written to {self.folder}: {reason}; {remedy}; {self.summary()}"
            ) from error

    def summary(self, resume: bool = True, wait: bool = True) -> str:
        """Return a clause that names the checkpoint from which the run can resume.

        wait: for one that is being written, which counts if it succeeds.
        """
        with suppress(Exception):
            if wait:
                self._manager.wait_until_finished()
        steps = saved_steps(self.folder)
        if not steps:
            return f"there is no checkpoint in {self.folder} yet"
        return f"checkpoint {max(steps)} in {self.folder} is kept" + "; run the same command to resume there" * resume

    def restore(
        self, abstract: TrainState, log: Callable[[str], None] = print, ignore_unreadable: bool = False
    ) -> TrainState | None:
        """Return the latest readable state on the shardings of `abstract`, or None if there is no checkpoint.

        A checkpoint that cannot be read or whose checksums do not match is logged and moved to `<folder>-unreadable/`,
        and the previous one is tried. ignore_unreadable: return None if none of them can be read. Otherwise it raises
        CheckpointError, since training from the beginning would replace them.
        """
        steps = json.loads(distributed.from_main(json.dumps(sorted(self._manager.all_steps(), reverse=True))))
        for step in steps:
            state, reason = None, ""
            try:
                state = cast(TrainState, self._manager.restore(step, args=ocp.args.StandardRestore(abstract)))
                self._compare(step, state)
            except Exception as error:  # orbax and tensorstore raise many kinds; all are logged
                if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                    raise  # the checkpoint may be intact
                if distributed.lost_process(error):
                    raise
                reason = first_line(error)
            if not distributed.any_process(bool(reason)):
                return state
            aside = self._set_aside(step)
            reason = reason or "by another process"
            log(f"checkpoint {step} cannot be read ({reason}); moved to {aside}; trying the previous one")
        kept = self._aside.iterdir() if self._aside.exists() else ()
        if aside := sorted(path.name for path in kept if path.name[0].isdigit()):
            lost = f"none of the checkpoints in {self.folder} can be read; {', '.join(aside)} are kept in {self._aside}"
            if not ignore_unreadable:
                raise CheckpointError(
                    f"{lost}; use another --workdir to train from the beginning, or --ignore_unreadable in this one"
                )
            log(f"{lost}; training from the beginning")
        return None

    def _compare(self, step: int, state: TrainState) -> None:
        """Raise CheckpointError if a leaf's checksum is not the saved one."""
        saved = (self._manager.metadata(step).custom_metadata or {}).get("crc32", {})
        found = checksums(state)
        changed = [name for name in saved if name in found and saved[name] != found[name]]
        if changed:
            raise CheckpointError(f"checksum mismatch in {len(changed)} arrays, e.g. {changed[0]}")

    def _set_aside(self, step: int) -> epath.Path:
        self._manager.close()
        target = self._aside / str(step)
        while target.exists():
            target = target.parent / f"{target.name}_"
        distributed.wait_for_all("unreadable")  # every process has closed it, and found the same place
        if distributed.is_main():
            self._aside.mkdir(parents=True, exist_ok=True)
            if "://" in str(self._aside):  # which has no empty folders, and nothing is renamed into none
                (self._aside / "unreadable").write_text("")
            (self.folder / str(step)).rename(target)
        distributed.wait_for_all("moved aside")
        self._manager = self._open()
        return target

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._manager.close()
