"""Runs that are killed, stopped and damaged, by the real command in real processes."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_model
from whole_runs import ROOT, checkpoints_of


def command(teacher: Path, workdir: Path, steps: int, cache: Path) -> subprocess.Popen:
    """The real command on the shrunk config, in a process of its own."""
    file = workdir.parent / "shrunk.py"
    file.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\nfrom whole_runs import shrunk_for_processes\n"
        f"get_config = lambda: shrunk_for_processes({str(teacher)!r})\n"
    )
    # Twice as quick to compile without optimisation, and no less a program whose bits must come out the same.
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(ROOT),
    }
    arguments = [f"--config={file}", f"--workdir={workdir}", f"--config.train.steps={steps}"]
    return subprocess.Popen(
        [sys.executable, "-m", "lcm_jax.main", *arguments],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def line(folder: Path, cache: Path) -> subprocess.Popen:
    """The smallest of runs, of line_process.py, in a process of its own."""
    script = [str(ROOT / "tests" / "line_process.py"), str(folder), "to be killed"]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }
    return subprocess.Popen(
        [sys.executable, *script], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def last_step(workdir: Path) -> int:
    """The last step in a run's log, of whose last line a part may be written."""
    path = workdir / "metrics.jsonl"
    steps = re.findall(r'"step": (\d+),', path.read_text()) if path.exists() else []
    return int(steps[-1]) if steps else 0


def wait_for_step(workdir: Path, step: int, saved: int, process: subprocess.Popen) -> None:
    """Until the log has `step` and a checkpoint of step `saved` or later is whole, which takes a moment longer."""
    deadline = time.monotonic() + 240
    metrics = workdir / "metrics.jsonl"
    while time.monotonic() < deadline:
        logged = metrics.exists() and f'"step": {step},' in metrics.read_text()
        if logged and any(done >= saved for done in checkpoints_of(workdir)):
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def final_state(workdir: Path, step: int):
    tree = ocp.PyTreeCheckpointer().restore(workdir / "checkpoints" / str(step) / "default")
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(tree)}


def test_killed_and_stopped_runs_end_with_the_same_bits(tmp_path):
    """kill -9, then SIGTERM, then a damaged checkpoint: parameters, target and optimizer equal an unbroken run's."""
    teacher = tiny_model.write(tmp_path / "teacher", unet=tiny_model.SHALLOW)
    cache, steps = tmp_path / "cache", 20
    whole = command(teacher, tmp_path / "whole", steps, cache)
    output = whole.communicate(timeout=500)[0]
    assert whole.returncode == 0, output

    broken = command(teacher, tmp_path / "broken", steps, cache)
    wait_for_step(tmp_path / "broken", 6, 4, broken)
    broken.send_signal(signal.SIGKILL)
    broken.communicate()
    assert broken.returncode == -signal.SIGKILL

    stopped = command(teacher, tmp_path / "broken", steps, cache)
    wait_for_step(tmp_path / "broken", 10, 8, stopped)
    stopped.send_signal(signal.SIGTERM)
    output = stopped.communicate(timeout=240)[0]
    assert stopped.returncode == 75, output
    assert "resumed" in output and "stopped at step" in output
    assert not (tmp_path / "broken" / "export").exists()

    before, newest = checkpoints_of(tmp_path / "broken")
    files = (tmp_path / "broken" / "checkpoints" / str(newest)).rglob("*")
    arrays = max((path for path in files if path.is_file()), key=lambda path: path.stat().st_size)
    arrays.write_bytes(arrays.read_bytes()[: arrays.stat().st_size // 2])
    last = command(teacher, tmp_path / "broken", steps, cache)
    output = last.communicate(timeout=500)[0]
    assert last.returncode == 0, output
    assert f"checkpoint {newest} cannot be read" in output and f"at step {before}" in output
    expected, found = final_state(tmp_path / "whole", steps), final_state(tmp_path / "broken", steps)
    assert expected.keys() == found.keys() and len(expected) > 300
    for name, value in expected.items():
        assert value.tobytes() == found[name].tobytes(), name
    lines = [json.loads(line)["step"] for line in (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, steps + 1)), "each step stands in the log once"


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_ends_with_the_bits_of_an_undisturbed_one(tmp_path):
    """kill -9 at random moments: while it starts, resumes, updates, saves, samples, keeps the best, or ends."""
    cache, draw, kills, newest = tmp_path / "cache", random.Random(0), [], 0
    began = time.monotonic()
    whole = line(tmp_path / "whole", cache)
    output = whole.communicate(timeout=300)[0]
    assert whole.returncode == 0, output
    usual = time.monotonic() - began  # to the end of a run
    broken = tmp_path / "broken"
    while len(kills) < 24:
        process = line(broken, cache)
        at_any_time = draw.random() < 0.25  # or while it updates, when it is most busy
        end = time.monotonic() + (draw.uniform(0, usual) if at_any_time else 300)
        target = newest + draw.randint(1, 6)
        while process.poll() is None and last_step(broken) < target and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))
        process.kill()
        output = process.communicate()[0]
        assert process.returncode in (-signal.SIGKILL, 0), output
        assert "from the beginning" not in output and "cannot be read" not in output
        steps = checkpoints_of(broken) if (broken / "checkpoints").exists() else []
        assert max(steps, default=0) >= newest, "what was saved stays"
        newest = max(steps, default=0)
        kills.append((process.returncode, newest))
    last = line(broken, cache)
    output = last.communicate(timeout=300)[0]
    assert last.returncode == 0, output
    print(f"killed {sum(code != 0 for code, _ in kills)} times, with checkpoints {[step for _, step in kills]}")
    assert sum(code != 0 for code, _ in kills) >= 20
    assert checkpoints_of(broken) == checkpoints_of(tmp_path / "whole")
    for number in checkpoints_of(broken):
        expected, found = final_state(tmp_path / "whole", number), final_state(broken, number)
        assert expected.keys() == found.keys()
        assert all(value.tobytes() == found[name].tobytes() for name, value in expected.items())
    names = lambda folder: sorted(str(p.relative_to(folder)) for p in folder.glob("best/*"))  # noqa: E731
    assert names(broken) == names(tmp_path / "whole")
    figures = lambda folder: [  # noqa: E731
        {name: each[name] for name in ("step", "loss", "slope", "best_step") if name in each}
        for each in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    ]
    assert figures(broken) == figures(tmp_path / "whole"), "each update and each preview is recorded once"
