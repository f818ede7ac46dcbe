"""Trees of arrays in orbax checkpoints: read and written a part at a time, each array with its checksum."""

import asyncio
import logging
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from lcm_jax.errors import first_line
from lcm_jax.weights.errors import ModelError

GROUP_BYTES = 2**28  # of a model that are read or written at once, so that it is not held twice
TreePath = tuple[str, ...]


def checksum(array: np.ndarray) -> int:
    """Return the crc32 of the array's bytes in C order."""
    return zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data)


def _report_all_but_orphans(before: Callable, unraisable) -> None:
    error = unraisable.exc_value
    closed = isinstance(error, RuntimeError) and "Event loop is closed" in str(error)
    collected = error is not None and isinstance(error.__cause__, GeneratorExit)  # a read that nobody awaits any more
    if not (closed or collected):
        before(unraisable)


def ignore_orphans() -> None:
    """From now on, hide the tracebacks of reads and writes that end after one beside them has failed.

    The failure closes the event loop that they report to, and each would print a traceback beside the actual error: by
    the hook, or, if its own failure is never asked for, by asyncio's logger.
    """
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    if getattr(sys.unraisablehook, "func", None) is not _report_all_but_orphans:
        sys.unraisablehook = partial(_report_all_but_orphans, sys.unraisablehook)


def make_groups(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Yield the indices of `sizes` in order, in groups of GROUP_BYTES or a little more."""
    group, total = [], 0
    for i, size in enumerate(sizes):
        group, total = [*group, i], total + size
        if total >= GROUP_BYTES:
            yield group
            group, total = [], 0
    if group:
        yield group


# ---- writing --------------------------------------------------------------------------------------------------------


class Streamed(ocp.type_handlers.NumpyHandler):
    """Writes arrays that are read when it is their turn, a group at a time: orbax's own handler holds all at once."""

    def __init__(self, read: Callable[[str], np.ndarray], advance: Callable[[int], None]):
        super().__init__(deepcopy_host_arrays=False)
        self._read, self._advance = read, advance

    async def serialize(self, values, infos, args=None):
        args = args or [ocp.SaveArgs()] * len(values)

        def write_all():
            for group in make_groups([value.nbytes for value in values]):
                arrays = [self._read(infos[i].name) for i in group]
                write = super(Streamed, self).serialize(arrays, [infos[i] for i in group], [args[i] for i in group])
                for written in asyncio.run(write):
                    written.result()
                self._advance(sum(values[i].nbytes for i in group))

        with ThreadPoolExecutor(1) as thread:  # asyncio.run() needs a thread without a running event loop
            return [thread.submit(write_all)]


def write_tree(
    folder: Path, specs: dict[str, Any], read: Callable[[str], np.ndarray], advance: Callable[[int], None]
) -> None:
    """Write a tree of arrays as checkpoint 0 of `folder`, with its checksums, a group of arrays at a time.

    specs: the tree, of arrays whose values are not used. read: "a.b.c" -> the array at that path; called twice for
    each. advance: called with the number of bytes written. Raises ModelError.
    """
    ignore_orphans()
    leaves = jax.tree_util.tree_leaves_with_path(specs)
    sums = {
        jax.tree_util.keystr(path): checksum(read(jax.tree_util.keystr(path, simple=True, separator=".")))
        for path, _ in leaves
    }
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, Streamed(read, advance)))
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    try:
        with ocp.CheckpointManager(Path(folder).absolute(), options=options, item_handlers=handler) as manager:
            manager.save(0, args=ocp.args.PyTreeSave(specs), custom_metadata={"crc32": sums})
    except Exception as error:  # orbax and tensorstore raise many kinds
        raise ModelError(first_line(error)) from error


# ---- reading --------------------------------------------------------------------------------------------------------


def read_specs(folder: epath.PathLike, step: int | None = None) -> tuple[int, dict[str, Any]]:
    """Return (step, tree of jax.ShapeDtypeStruct) of a checkpoint in `folder`, by default the newest.

    Raises ModelError if there is none, or it cannot be read.
    """
    with _open(folder, step) as (_, step, tree):
        return step, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def read_leaves(folder: epath.PathLike, step: int, paths: Sequence[TreePath]) -> dict[TreePath, np.ndarray]:
    """Read the arrays at `paths` of checkpoint `step` in `folder`. orbax holds each twice while it reads.

    Changes nothing there. Raises ModelError if the checkpoint cannot be read, or an array is not what was saved.
    """
    with _open(folder, step) as (manager, step, _):
        saved = (manager.metadata(step).custom_metadata or {}).get("crc32", {})
        restore_args = unflatten_dict({path: ocp.RestoreArgs(restore_type=np.ndarray) for path in paths})
        item = jax.tree.map(lambda _: 0, restore_args)
        restore = ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True)
        leaves: dict[TreePath, Any] = flatten_dict(manager.restore(step, args=restore))
    changed = []
    for path, leaf in leaves.items():
        rest = "".join(f"[{name!r}]" for name in path[1:])
        for key in (f".{path[0]}{rest}", f"[{path[0]!r}]{rest}"):  # a run's state is a dataclass, a model is a dict
            if key in saved and saved[key] != checksum(leaf):
                changed.append(".".join(path))
    if changed:
        raise ModelError(
            f"checkpoint {step} in {folder} is damaged: checksum mismatch in {len(changed)} arrays, e.g. {changed[0]}; "
            "use another checkpoint"
        )
    return leaves


def absolute(folder: epath.PathLike) -> epath.Path:
    """Return the folder as orbax takes it; a URL stays as it is."""
    path = epath.Path(folder)
    return path if path.is_absolute() else epath.Path(Path(folder).absolute())


@contextmanager
def _open(folder: epath.PathLike, step: int | None) -> Iterator[tuple[ocp.CheckpointManager, int, Any]]:
    """Yield (manager, step, metadata of the tree); whatever fails inside becomes a ModelError."""
    ignore_orphans()
    options = ocp.CheckpointManagerOptions(read_only=True, create=False)
    handler = ocp.PyTreeCheckpointHandler()
    with ocp.CheckpointManager(absolute(folder), options=options, item_handlers=handler) as manager:
        steps = sorted(manager.all_steps())
        if not steps or step not in (None, *steps):
            existing = ", ".join(map(str, steps)) or "none"
            number = "" if step is None else f" {step}"
            raise ModelError(f"{folder} has no checkpoint{number}; existing checkpoints: {existing}")
        step = steps[-1] if step is None else step
        try:
            yield manager, step, manager.item_metadata(step).tree
        except Exception as error:  # orbax and tensorstore raise many kinds
            if isinstance(error, MemoryError):
                raise
            raise ModelError(
                f"checkpoint {step} in {folder} cannot be read ({first_line(error)}); use another checkpoint, such as "
                f"{epath.Path(folder) / str(steps[0])}"
            ) from error
