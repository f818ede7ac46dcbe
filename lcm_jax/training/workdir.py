"""The folder of a run: whose it is, what the run began from, and that one process at a time writes to it."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lcm_jax import files, locks
from lcm_jax.errors import RunError

# Groups of a config that say where and how often, not what: a run may be continued with other values.
FREE_GROUPS = ("mesh", "checkpoint", "log", "sample", "metrics", "report")


def config_digest(config: Mapping[str, Any]) -> str:
    """sha256 of all that decides the result of a run, in hexadecimal (config: plain nested dict)."""
    deciding = {name: value for name, value in config.items() if name not in FREE_GROUPS}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True, default=list).encode()).hexdigest()


def check_workdir(workdir: Path, config: Mapping[str, Any]) -> None:
    """Raise RunError if `workdir` has the run of another config, or another process is writing to it.

    Writes nothing.
    """
    with _named(workdir):
        locks.check(workdir / "lock")
    path = workdir / "config.json"
    if not path.exists():
        return
    theirs = read_object(path, "delete it to continue with the config of this command")
    mine = json.loads(json.dumps(config, default=list))
    if config_digest(theirs) == config_digest(mine):
        return
    names = [
        f"{name} ({before!r} there, {now!r} here)"
        for name, before, now in differences(theirs, mine)
        if name.split(".")[0] not in FREE_GROUPS
    ]
    raise RunError(
        f"workdir {workdir} belongs to a run with another config; different: {', '.join(names[:6])}"
        f"{' ..' if len(names) > 6 else ''}\nChoose another --workdir, or set these keys back to continue that run."
    )


def claim_workdir(workdir: Path, config: Mapping[str, Any]) -> None:
    """Writes `config.json`, by which `check_workdir` knows the run again."""
    files.write_text(workdir / "config.json", json.dumps(config, default=list, indent=1, sort_keys=True) + "\n")


def check_origin(workdir: Path, origin: Mapping[str, str]) -> None:
    """Keeps what a run was begun from in `origin.json`. Raises RunError where that has changed since."""
    path = workdir / "origin.json"
    if not path.exists():
        files.write_text(path, json.dumps(dict(origin), indent=1) + "\n")
        return
    before = read_object(path, "delete it to continue with the weights that the config names now")
    if changed := [name for name, digest in before.items() if origin.get(name) != digest]:
        raise RunError(
            f"workdir {workdir} was begun with other weights: {', '.join(changed)} changed since. "
            f"Put them back to continue that run, or choose another --workdir."
        )


@contextmanager
def hold_workdir(workdir: Path) -> Iterator[None]:
    """Make the folder, and keep other runs out of it until the block ends. Raises RunError if one is there."""
    workdir.mkdir(parents=True, exist_ok=True)
    with _named(workdir), locks.lock(workdir / "lock"):
        yield


@contextmanager
def _named(workdir: Path) -> Iterator[None]:
    try:
        yield
    except locks.Locked as holder:
        raise RunError(f"workdir {workdir} is in use by {holder}; wait for it, or use another --workdir") from None


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """Read a file of a workdir that holds a JSON object. Raises RunError with the remedy if it does not."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or not UTF-8
        raise RunError(f"{path} is damaged ({error}); restore it, or {remedy}") from None
    if not isinstance(content, dict):
        raise RunError(f"{path} is damaged (a JSON {type(content).__name__}, not an object); restore it, or {remedy}")
    return content


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (dotted key, value before, value after) of each leaf that differs; None for one that is absent."""
    before, after = _flatten(before), _flatten(after)
    keys = sorted(before.keys() | after.keys())
    return [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
