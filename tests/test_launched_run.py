"""A run of two real processes by launch/local.sh: stopped, deprived of a process, and completed by the same command."""

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import runnable
from whole_runs import ROOT, checkpoints_of

SETTINGS = {"mesh.data": -1, "train.steps": 12, "checkpoint.every_steps": 3, "log.every_steps": 1}


class Launched:
    """launch/local.sh with two processes on the CPU, each of which has one device."""

    def __init__(self, workdir: Path):
        options = [*runnable.SMALL_RUN, *runnable.options(SETTINGS)]
        self.command = ["launch/local.sh", "--config=shapes", f"--workdir={workdir}", *options]
        variables = {"PROCESSES": "2", "DEVICE": "cpu", "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
        self.environment = runnable.environment() | variables
        self.running = subprocess.Popen(
            self.command,
            cwd=ROOT,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.lines: list[str] = []

    def wait_for(self, pattern: str) -> None:
        assert self.running.stdout is not None
        for line in self.running.stdout:
            self.lines.append(line)
            if re.search(pattern, line):
                return
        raise AssertionError("".join(self.lines))

    def signal_one(self, number: signal.Signals) -> None:
        """Send a signal to process 1 alone."""
        for child in Path(f"/proc/{self.running.pid}/task/{self.running.pid}/children").read_text().split():
            if "--process_id=1" in Path(f"/proc/{child}/cmdline").read_text().split("\0"):
                os.kill(int(child), number)

    def finish(self) -> tuple[int, str]:
        rest, _ = self.running.communicate(timeout=600)
        return self.running.returncode, "".join(self.lines) + rest

    def kill(self) -> None:
        """End whatever a failed test leaves behind."""
        with suppress(ProcessLookupError):
            os.killpg(self.running.pid, signal.SIGKILL)


@pytest.fixture
def launch() -> Iterator[Callable[[Path], Launched]]:
    with ExitStack() as stack:

        def start(workdir: Path) -> Launched:
            run = Launched(workdir)
            stack.callback(run.kill)
            return run

        yield start


@pytest.mark.slow
def test_a_run_of_two_processes_survives_a_stop_and_a_death(launch, tmp_path):
    workdir = tmp_path / "run"
    run = launch(workdir)
    run.wait_for(r"^lcd \d+/12 ")
    run.signal_one(signal.SIGTERM)
    code, text = run.finish()
    step = int(re.findall(r"^stopped at step (\d+) of 12; checkpoint saved; ", text, re.MULTILINE)[0])
    assert code == 75 and checkpoints_of(workdir)[-1] == step < 12, text

    run = launch(workdir)
    run.wait_for(rf"^resumed {workdir} at step {step}")
    run.wait_for(r"^lcd \d+/12 ")
    run.signal_one(signal.SIGKILL)
    code, text = run.finish()
    assert code == 137 and "another process of this run is gone" in text, text

    code, text = launch(workdir).finish()
    assert code == 0 and "resumed" in text and (workdir / "report.json").exists(), text
