"""The page's server as a process of its own, started by the real command."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Server:
    """A process of `python -m lcm_jax.app` that is warm."""

    def __init__(self, process: subprocess.Popen, address: str, log: Path):
        self.process, self.address, self._log = process, address, log

    def log(self) -> str:
        return self._log.read_text()

    def memory(self) -> int:
        """Resident bytes."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", text)[1]) * 1024

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)


@contextmanager
def serve(*arguments: str, optimized: bool = True, seconds: float = 300) -> Iterator[Server]:
    """Start the command on a free port, yield the server once it prints its address, and stop it.

    optimized: False compiles faster, for tests whose images need not be made fast.
    """
    command = [sys.executable, "-m", "lcm_jax.app", "--port=0", *arguments]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        with log.open("w") as stream:
            env = os.environ | {"PYTHONPATH": str(ROOT)}
            env |= {} if optimized else {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
            process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=env)
        try:
            end = time.monotonic() + seconds
            while (address := re.search(r"^ready: (http\S+)$", log.read_text(), re.M)) is None:
                assert process.poll() is None and time.monotonic() < end, log.read_text()
                time.sleep(0.1)
            yield Server(process, address[1], log)
        finally:
            process.kill()
            process.wait()
