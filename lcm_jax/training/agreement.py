"""What all processes of a run must have in common before it starts: the code, the config and the data."""

import hashlib
import json
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lcm_jax
from lcm_jax.errors import RunError
from lcm_jax.training import distributed
from lcm_jax.training.workdir import differences

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@cache
def code_versions() -> dict[str, str]:
    """Return the versions by which two processes may compute something else: packages, commit, and the source itself.

    The commit is left out if the package is not in a git repository, or there is no git.
    """
    folder = Path(lcm_jax.__file__).parent
    source = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        source.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    versions = {"source": source.hexdigest()[:12]} | {name: version(name) for name in PACKAGES}
    try:
        asked = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:  # no git
        return versions
    return versions | ({"commit": asked.stdout.strip()[:12]} if asked.returncode == 0 else {})


def check_code_and_config(config: Mapping[str, Any]) -> None:
    """Raise RunError in a process whose code or config is not the main process's; all of them come here.

    config: plain nested dict.
    """
    _check("code", code_versions(), "install the same version on every host")
    _check("config", config, "start every process with the same command")


def check_data(data: Mapping[str, str]) -> None:
    """Raise RunError in a process whose data are not the main process's; all of them come here."""
    _check("data", data, "give every host the same files")


def _check(what: str, mine: Mapping[str, Any], remedy: str) -> None:
    text = json.dumps(mine, default=list, sort_keys=True)
    if (theirs := distributed.from_main(text)) != text:
        changed = differences(json.loads(theirs), json.loads(text))
        names = [f"{name} ({there!r} there, {here!r} here)" for name, there, here in changed[:6]]
        more = " .." if len(changed) > 6 else ""
        raise RunError(
            f"{distributed.name_process()} has another {what} than process 0: {', '.join(names)}{more}; {remedy}"
        )
    distributed.wait_for_all(what)  # no process goes on before all have been compared
