"""What can happen to any long run, as one line: memory, disks, Ctrl-C, devices, closed pipes and second processes."""

import errno
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from whole_runs import ROOT

from lcm_jax import errors, locks
from lcm_jax.errors import Interrupted, RunError, phase


def run(program: str, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""} | environment,
    )


def failing(error: BaseException):
    with phase("encoding images", memory="lower data.size", kept=lambda: "nothing is kept"):
        raise error


def test_memory_that_the_device_does_not_have_is_said_with_its_size():
    with pytest.raises(
        RunError, match=r"^out of memory \(4398.05 GB\) while encoding images; lower data.size; nothing"
    ):
        with phase("encoding images", memory="lower data.size", kept="nothing is kept"):
            jnp.zeros((2**20, 2**20), jnp.float32).block_until_ready()
    with pytest.raises(RunError, match=r"^out of memory \(64.0 GiB\) while"):
        failing(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 64.0GiB.\nmore"))
    with pytest.raises(RunError, match=r"^out of memory \(7.45 GiB\) while"):
        failing(MemoryError("Unable to allocate 7.45 GiB for an array with shape (1000000000,)"))


def test_a_full_disk_is_not_taken_for_little_memory():
    full = os.strerror(errno.ENOSPC)
    for error in (
        OSError(errno.ENOSPC, full, "/disk/file"),
        ValueError(f"RESOURCE_EXHAUSTED: Error writing: {full} [os_error_code='28']"),
    ):
        with pytest.raises(
            RunError, match="^the disk is full .* while encoding images; free some space; nothing is kept"
        ):
            failing(error)


def test_ctrl_c_says_during_what_and_what_is_kept_and_others_pass():
    with pytest.raises(Interrupted, match="^interrupted while encoding images; nothing is kept$"):
        failing(KeyboardInterrupt())
    with pytest.raises(ZeroDivisionError):
        failing(ZeroDivisionError())
    with pytest.raises(RunError, match="^inner$"):
        failing(RunError("inner"))


def test_a_ctrl_c_that_a_callback_swallows_comes_again(monkeypatch):
    class Swallows:
        def __del__(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    errors.keep_interrupts()
    with pytest.raises(KeyboardInterrupt):
        Swallows()
        time.sleep(5)


@pytest.mark.parametrize("platform", ["cuda", "rocm", "cuda,cpu"])
def test_devices_that_are_not_there_are_one_line(platform):
    done = run(
        "from lcm_jax.errors import *\ntry: check_devices()\nexcept RunError as e: print(e)", JAX_PLATFORMS=platform
    )
    if done.stdout == "" and done.returncode == 0:
        pytest.skip("there is such a device")
    assert (
        done.stdout.startswith(f"JAX_PLATFORMS={platform} names devices that JAX does not find")
        and done.stdout.count("\n") == 1
    )
    assert "found: cpu; unset JAX_PLATFORMS, or install lcm_jax[gpu]" in done.stdout


def test_a_closed_pipe_or_terminal_does_not_end_a_run():
    """The readers of both are gone before the first line; the last line proves that the program ended."""
    program = (
        "import os, sys\nfrom lcm_jax.output import outliving\n"
        "read, write = os.pipe(); os.dup2(write, 1); os.close(write); os.close(read)\n"
        "{more}with outliving():\n    for i in range(3): print('line', i)\n"
        "os.write({end}, b'ended')"
    )
    done = run(program.format(more="", end=2))
    assert done.returncode == 0 and done.stderr == "line 0\nline 1\nline 2\nended", "standard error takes over"
    done = run(program.format(more="keep = os.dup(2); os.dup2(1, 2)\n", end="keep"))
    assert done.returncode == 0 and done.stderr == "ended"


def test_a_lock_ends_with_its_process(tmp_path):
    program = (
        "import os, sys, pathlib\nfrom lcm_jax import locks\n"
        f"with locks.lock(pathlib.Path({str(tmp_path / 'lock')!r})):\n    print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert other.stdout.readline() == "held\n"
    with pytest.raises(locks.Locked, match=rf"^process {other.pid} on .+ since \d{{4}}-"):
        locks.check(tmp_path / "lock")
    other.kill()
    other.communicate()
    locks.check(tmp_path / "lock")
    with locks.lock(tmp_path / "lock"), pytest.raises(locks.Locked, match=f"^process {os.getpid()} on"):
        locks.check(tmp_path / "lock")
