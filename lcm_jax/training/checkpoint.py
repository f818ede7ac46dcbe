"""Checkpoints of a run: written asynchronously, committed atomically, kept by a policy (the only importer of orbax)."""

import asyncio
import logging
import math
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from lcm_jax.errors import RunError, disk_is_full, first_line
from lcm_jax.training.state import TrainState

STABLER = "start in another --workdir with a lower optimizer.learning_rate or in float32 (train.dtype)"
GROUP = 2**28  # bytes of a model that are read or written at once, so that it is not held twice


class CheckpointError(RunError):
    """A checkpoint cannot be read or written, or none of a folder that has some can."""


def checksum(array: np.ndarray) -> int:
    """The crc32 of its bytes in C order."""
    return zlib.crc32(np.ascontiguousarray(array))


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


def _tell_all_but_orphans(before: Callable, unraisable) -> None:
    if not (isinstance(unraisable.exc_value, RuntimeError) and "Event loop is closed" in str(unraisable.exc_value)):
        before(unraisable)


def _ignore_orphans() -> None:
    """From now on, reads that end after one beside them has failed are not told about.

    The failure closes the loop that they report to, and each would print a traceback before the error that counts.
    """
    if getattr(sys.unraisablehook, "func", None) is not _tell_all_but_orphans:
        sys.unraisablehook = partial(_tell_all_but_orphans, sys.unraisablehook)


def groups(sizes: Sequence[int]) -> Iterator[list[int]]:
    """The indices of `sizes` in order, in groups of GROUP bytes or a little more."""
    group, total = [], 0
    for i, size in enumerate(sizes):
        group, total = [*group, i], total + size
        if total >= GROUP:
            yield group
            group, total = [], 0
    if group:
        yield group


class Streamed(ocp.type_handlers.NumpyHandler):
    """Writes arrays that are read when it is their turn, a group at a time: orbax's own handler holds all at once."""

    def __init__(self, read: Callable[[str], np.ndarray], advance: Callable[[int], None]):
        super().__init__(deepcopy_host_arrays=False)
        self._read, self._advance = read, advance

    async def serialize(self, values, infos, args=None):
        args = args or [ocp.SaveArgs()] * len(values)

        def write_all():
            for group in groups([value.nbytes for value in values]):
                arrays = [self._read(infos[i].name) for i in group]
                write = super(Streamed, self).serialize(arrays, [infos[i] for i in group], [args[i] for i in group])
                for written in asyncio.run(write):
                    written.result()
                self._advance(sum(values[i].nbytes for i in group))

        with ThreadPoolExecutor(1) as thread:  # this one runs a loop already
            return [thread.submit(write_all)]


def write_tree(
    folder: Path, outline: dict[str, Any], read: Callable[[str], np.ndarray], advance: Callable[[int], None]
) -> None:
    """A tree of arrays as checkpoint 0 of `folder`, with its checksums; a few are held at a time.

    outline: arrays whose numbers do not matter. read: that at a.b.c in the tree, by this name; each is read twice.
    advance is told how many bytes were written. Raises CheckpointError.
    """
    _ignore_orphans()
    leaves = jax.tree_util.tree_leaves_with_path(outline)
    sums = {
        jax.tree_util.keystr(path): checksum(read(jax.tree_util.keystr(path, simple=True, separator=".")))
        for path, _ in leaves
    }
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, Streamed(read, advance)))
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    try:
        with ocp.CheckpointManager(Path(folder).absolute(), options=options, item_handlers=handler) as manager:
            manager.save(0, args=ocp.args.PyTreeSave(outline), custom_metadata={"crc32": sums})
    except Exception as error:  # orbax and tensorstore raise many kinds
        raise CheckpointError(first_line(error)) from error


def read_tree(folder: Path, step: int | None, part: str) -> tuple[int, dict[str, Any]]:
    """(step, tree of numpy arrays): what `part` is of the newest checkpoint in `folder`, or of that of `step`.

    Nothing is changed there. Raises CheckpointError where there is none, or it is not what was saved.
    """
    with _opened(folder, step) as (manager, step, tree):
        saved = (manager.metadata(step).custom_metadata or {}).get("crc32", {})
        leaves = flatten_dict({part: tree[part]})
        found = {}
        # A group at a time: what orbax reads at once it holds twice, as it was stored and as it is.
        for group in groups([leaf.dtype.itemsize * math.prod(leaf.shape) for leaf in leaves.values()]):
            paths = [list(leaves)[i] for i in group]
            how = unflatten_dict({path: ocp.RestoreArgs(restore_type=np.ndarray) for path in paths})
            item = jax.tree.map(lambda _: 0, how)
            restore = ocp.args.PyTreeRestore(item, restore_args=how, partial_restore=True)
            found |= flatten_dict(manager.restore(step, args=restore))
    found = unflatten_dict(found)[part]
    sums = checksums(found)
    prefixes = [f".{part}", f"[{part!r}]"]  # the state of a run is no dict
    known = {key: saved[prefix + key] for key in sums for prefix in prefixes if prefix + key in saved}
    changed = [key for key, value in known.items() if sums[key] != value]
    if changed:
        raise CheckpointError(
            f"checkpoint {step} in {folder} is damaged: {len(changed)} arrays are not what was saved, first "
            f"{changed[0]}; give another one"
        )
    return step, found


def read_outline(folder: Path, step: int | None = None) -> tuple[int, dict[str, Any]]:
    """As `read_tree`, but jax.ShapeDtypeStruct in place of arrays, of which nothing is read."""
    with _opened(folder, step) as (_, step, tree):
        return step, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


@contextmanager
def _opened(folder: Path, step: int | None) -> Iterator[tuple[ocp.CheckpointManager, int, Any]]:
    """(manager, step, what its metadata tell of its tree); whatever fails inside is a CheckpointError."""
    _ignore_orphans()
    options = ocp.CheckpointManagerOptions(read_only=True, create=False)
    handler = ocp.PyTreeCheckpointHandler()
    with ocp.CheckpointManager(Path(folder).absolute(), options=options, item_handlers=handler) as manager:
        steps = sorted(manager.all_steps())
        if not steps or step not in (None, *steps):
            there = ", ".join(map(str, steps)) or "none"
            raise CheckpointError(f"{folder} has no checkpoint{'' if step is None else f' {step}'}: there are {there}")
        step = steps[-1] if step is None else step
        try:
            yield manager, step, manager.item_metadata(step).tree
        except Exception as error:  # orbax and tensorstore raise many kinds
            raise CheckpointError(
                f"checkpoint {step} in {folder} cannot be read ({first_line(error)}): give another, such as "
                f"{folder / str(steps[0])}"
            ) from error


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
        _ignore_orphans()
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
                state = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
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
