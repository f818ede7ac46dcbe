"""A run of two real processes: the losses of one process, files that are written once, and one stop for both."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import line_process
import numpy as np
import pytest
from whole_runs import ROOT, checkpoints_of

from lcm_jax.training import distributed


def records(workdir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir: Path) -> list[float]:
    trained = [line for line in records(workdir) if "loss" in line]
    assert [line["step"] for line in trained] == [1, 2, 3], "each update is recorded once"
    return [line["loss"] for line in trained]


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder of the runs of line_process.py by two processes, and what each printed."""
    folder = tmp_path_factory.mktemp("both")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(ROOT),
    }
    script = str(ROOT / "tests" / "line_process.py")
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(folder), port, str(number)],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for number in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(error for _, error in outputs)
    return folder, [output for output, _ in outputs]


def test_two_processes_have_the_losses_of_one(both, tmp_path):
    folder, _ = both
    assert line_process.run(tmp_path / "one", fsdp=1)
    for mesh in ("data", "fsdp"):
        np.testing.assert_allclose(losses(folder / mesh), losses(tmp_path / "one"), rtol=1e-5)
        preview = (folder / mesh / "samples" / "000002.png").read_text()
        np.testing.assert_allclose(float(preview), float((tmp_path / "one/samples/000002.png").read_text()), rtol=1e-5)


def test_one_process_writes_and_prints(both):
    folder, (first, second) = both
    assert "line 3/3" in first and first.count("complete: ") == 3
    assert all(line.startswith("[Gloo]") for line in second.splitlines()), "by the library itself"
    for mesh in ("data", "fsdp"):
        assert checkpoints_of(folder / mesh) == [2, 3]
        previews = [line for line in records(folder / mesh) if "slope" in line]
        assert [line["step"] for line in previews] == [0, 2, 3], "at the start, when it is due, and at the end"
        assert previews[-1]["best_step"] == 3 and previews[-1]["slope"] == max(line["slope"] for line in previews)
        assert [path.name for path in (folder / mesh / "best").iterdir()] == ["3"]
        written = {path.name for path in (folder / mesh).iterdir()}
        assert written == {
            "best",
            "checkpoints",
            "config.json",
            "origin.json",
            "lock",
            "metrics.jsonl",
            "samples",
            "tensorboard",
        }
    assert len(list((folder / "fsdp" / "tensorboard").iterdir())) == 1


def test_a_stop_of_one_process_stops_both_at_the_same_step(both):
    folder, (first, _) = both
    step = checkpoints_of(folder / "stopped")[-1]
    assert step in (line_process.STOP_AT, line_process.STOP_AT + 1) and records(folder / "stopped")[-1]["step"] == step
    assert f"stopped at step {step} of 1000" in first


@pytest.mark.parametrize(
    ("variables", "several"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1", "TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ],
)
def test_clusters_are_known_by_their_environment(variables, several):
    assert distributed.in_cluster(variables) == several


def test_only_a_part_of_the_flags_is_an_error(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    with pytest.raises(distributed.RunError, match="only some of --coordinator, --num_processes and --process_id"):
        distributed.initialize(processes=2)
