"""The code blocks of documentation that are marked to be run, and the options that make their long ones small.

`<!-- runnable -->` before a fence: the block runs as it is shown. `<!-- runnable in small -->`: its last command gets
the options of SMALL. The blocks of a page run in their order, in one folder.
"""

import os
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

from whole_runs import QUICK, SHRUNK_LCD

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^<!-- runnable( in small)? -->\n```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def options(settings: dict) -> list[str]:
    """Return the settings of a config as options of the command line."""
    return [f"--config.{name}={value}" for name, value in settings.items()]


FEW = {"report.prompts": 6, "report.batch_size": 6, "report.reference": 16}
TINY = {"sample.scored_prompts": 0, "data.length": 16, "data.held_out": 16, "report.teacher.ddim": (1,)}
SMALL_RUN = options(SHRUNK_LCD | QUICK | FEW | TINY)
SMALL = {"lcm_jax.main": SMALL_RUN, "lcm_jax.evaluate": options(FEW)}


class Block(NamedTuple):
    """A block as a command of bash, and its place in the page, from 1."""

    place: int
    command: str


def blocks(text: str) -> list[Block]:
    """Return the runnable blocks of a page."""
    found = []
    for place, (small, language, code) in enumerate(BLOCK.findall(text), 1):
        if language == "python":
            code = f"python -c {shlex.quote(code)}"
        elif small:
            code = f"{code.rstrip()} {shlex.join(SMALL[re.findall(r'lcm_jax[.][a-z]+', code)[-1]])}"
        found.append(Block(place, code))
    return found


def environment() -> dict[str, str]:
    """Return the environment of a user's shell in which `python` is this one, quick to compile."""
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
