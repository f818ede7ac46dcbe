"""The folder of a run: its config, the weights it started from, and a lock that keeps other processes out."""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lcm_jax import files, locks
from lcm_jax.errors import RunError
from lcm_jax.training import distributed
from lcm_jax.weights.orbax_folder import checkpoint_root

# Groups of a config that do not affect the weights: a run may resume with other values.
FREE_GROUPS = ("mesh", "checkpoint", "log", "sample", "metrics", "report")
SEEN_SECONDS = 60  # network file systems show new files to other hosts after a while


def config_digest(config: Mapping[str, Any]) -> str:
    """Return the sha256, in hexadecimal, of the config groups that affect the weights. config: plain nested dict."""
    deciding = {name: value for name, value in config.items() if name not in FREE_GROUPS}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True, default=list).encode()).hexdigest()


def check_workdir(workdir: Path, config: Mapping[str, Any]) -> None:
    """Raise RunError if `workdir` was created with a different config, or another process is writing to it.

    Writes nothing.
    """
    if distributed.is_main():  # a check takes the lock for a moment, in which another process would find it taken
        with _named(workdir):
            locks.check(workdir / "lock")
    path = workdir / "config.json"
    if not path.exists():
        return
    theirs = read_object(path, "delete it to resume with the config of this command")
    mine = json.loads(json.dumps(config, default=list))
    if config_digest(theirs) == config_digest(mine):
        return
    names = [
        f"{name} ({before!r} there, {now!r} here)"
        for name, before, now in differences(theirs, mine)
        if name.split(".")[0] not in FREE_GROUPS
    ]
    raise RunError(
        f"workdir {workdir} was created with a different config: {', '.join(names[:6])}"
        f"{' ..' if len(names) > 6 else ''}; use another --workdir, or restore these values to resume that run"
    )


def claim_workdir(workdir: Path, config: Mapping[str, Any]) -> None:
    """Write `config.json`, with which `check_workdir` compares, and a copy to `config.checkpoint.folder`.

    One process writes it. Raises RunError in another process if it is not there, since both must see the same folder.
    """
    path, text = workdir / "config.json", json.dumps(config, default=list, indent=1, sort_keys=True) + "\n"
    if distributed.is_main():
        files.write_text(path, text)
        if folder := config["checkpoint"]["folder"]:  # which opens as a model then
            root = checkpoint_root(workdir, folder)
            root.mkdir(parents=True, exist_ok=True)
            (root / path.name).write_text(text)
        return
    deadline = time.monotonic() + SEEN_SECONDS
    while not (path.exists() and path.read_text(encoding="utf-8") == text):
        if time.monotonic() > deadline:
            raise RunError(
                f"--workdir {workdir} of {distributed.name_process()} is not the folder that process 0 writes to; use "
                "one on a file system that all hosts share"
            )
        time.sleep(0.2)


def check_origin(workdir: Path, origin: Mapping[str, str]) -> None:
    """Record digests of the initial weights in `origin.json`. Raises RunError if they have changed."""
    path = workdir / "origin.json"
    if not path.exists():
        files.write_text(path, json.dumps(dict(origin), indent=1) + "\n")
        return
    before = read_object(path, "delete it to resume with the weights that the config names now")
    if changed := [name for name, digest in before.items() if origin.get(name) != digest]:
        raise RunError(
            f"workdir {workdir} was created with different weights: {', '.join(changed)} changed since; restore them "
            "to resume that run, or use another --workdir"
        )


@contextmanager
def hold_workdir(workdir: Path) -> Iterator[None]:
    """Create the folder and lock it until the block ends. Raises RunError if another process holds the lock."""
    workdir.mkdir(parents=True, exist_ok=True)
    if not distributed.is_main():  # another process holds it for this run
        yield
        return
    with _named(workdir), locks.lock(workdir / "lock"):
        yield


@contextmanager
def _named(workdir: Path) -> Iterator[None]:
    try:
        yield
    except locks.Locked as holder:
        raise RunError(f"workdir {workdir} is in use by {holder}; wait for it, or use another --workdir") from None


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object from a file of a workdir. Raises RunError with the remedy if the file is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise RunError(f"{path} is damaged ({error}); restore it, or {remedy}") from None
    if not isinstance(content, dict):
        raise RunError(f"{path} is damaged (a JSON {type(content).__name__}, not an object); restore it, or {remedy}")
    return content


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (dotted key, value before, value after) of each leaf that differs; an absent value is None."""
    before, after = _flatten(before), _flatten(after)
    keys = sorted(before.keys() | after.keys())
    return [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
