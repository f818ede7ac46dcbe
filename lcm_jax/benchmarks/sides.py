"""The processes of the two sides, as their runner sees them; `worker` has the other end of the protocol."""

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcm_jax.compiler import cache_folder

OURS = "lcm_jax"
MODULES = {OURS: "lcm_jax.benchmarks.ours", "diffusers": "lcm_jax.benchmarks.diffusers_peer"}
SHARED_MEMORY = "0.45"  # share of a GPU for JAX if the peer's process uses the rest
LATE = "the time limit was exceeded; raise --row_limit or --limit"


class SideError(RuntimeError):
    """A side could not run its case; the message is the reason."""


class Side:
    """The process of one side."""

    def __init__(self, name: str, folder: Path, environment: Mapping[str, str]):
        self._errors = tempfile.TemporaryFile("w+", errors="replace")
        process = subprocess.Popen(
            [sys.executable, "-m", MODULES[name], str(folder)],
            env=os.environ | environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        assert process.stdin is not None and process.stdout is not None
        self._process, self._requests, self._answers = process, process.stdin, process.stdout
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._answers:
            self._lines.put(line)
        self._lines.put("")

    def send(self, request: str) -> None:
        try:
            self._requests.write(request + "\n")
            self._requests.flush()
        except OSError:  # the process has ended; `receive` raises the reason
            pass

    def receive(self, deadline: float) -> dict[str, Any]:
        """Return the next answer. Raises SideError if the process fails, or has not answered at `deadline`."""
        try:
            line = self._lines.get(timeout=max(deadline - time.monotonic(), 0.01))
        except queue.Empty:
            raise SideError(LATE) from None
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            raise SideError(last_line(self._errors.read()) or f"its process ended with exit code {code}")
        return json.loads(line)

    def ask(self, request: str, deadline: float) -> dict[str, Any]:
        """Send a request and return its answer. Raises SideError as `receive` does."""
        self.send(request)
        return self.receive(deadline)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()


def last_line(text: str) -> str:
    """Return the last line that has content, at most 300 characters of it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def environment(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the variables of a side's process: temporary files in `folder`, compiled programs where they are kept."""
    (folder / "tmp").mkdir(exist_ok=True)
    variables = {"TMPDIR": str(folder / "tmp")}
    if (cache := cache_folder()) is not None:
        variables["TORCHINDUCTOR_CACHE_DIR"] = str(cache.with_name("torchinductor"))
    if len(names) > 1:
        variables["XLA_CLIENT_MEM_FRACTION"] = SHARED_MEMORY
    return variables
