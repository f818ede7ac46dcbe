"""Runs of real processes: the losses of one, files that are written once, one stop for all, and one that is killed."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import line_process
import numpy as np
import orbax.checkpoint as ocp
import pytest
from whole_runs import ROOT, checkpoints_of

from lcm_jax.training import agreement, distributed
from lcm_jax.training.distributed import RunError


class Ended(NamedTuple):
    codes: list[int]
    outputs: list[str]
    errors: list[str]
    seconds: float


def free_port(first: int = 0) -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(count: int, command: list[str], variables=lambda number, port: {}, port: int | None = None) -> Ended:
    """Run a command as `count` processes to the end."""
    port = port or free_port()
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }
    began = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            env=environment | variables(number, port),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for number in range(count)
    ]
    try:
        ended = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    outputs, errors = zip(*ended, strict=True)
    return Ended([p.returncode for p in processes], list(outputs), list(errors), time.monotonic() - began)


def by_hand(number: int, port: int) -> dict[str, str]:
    values = (f"127.0.0.1:{port}", "2", str(number))
    return dict(zip(distributed.VARIABLES, values, strict=True))


def by_slurm(number: int, port: int) -> dict[str, str]:
    """Of four tasks on one node, as `srun` sets them; JAX makes the port of the job's number."""
    numbers = {"JOB_ID": port - 61440, "PROCID": number, "LOCALID": number, "NTASKS": 4}
    numbers |= {"STEP_NUM_TASKS": 4, "STEP_NUM_NODES": 1}
    return {f"SLURM_{name}": str(value) for name, value in numbers.items()} | {"SLURM_STEP_NODELIST": "localhost"}


def line(plan: str, folder: Path) -> list[str]:
    return [str(ROOT / "tests" / "line_process.py"), str(folder), plan]


def records(workdir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir: Path, steps: int = line_process.STEPS) -> list[float]:
    trained = [line for line in records(workdir) if "loss" in line]
    assert [line["step"] for line in trained] == list(range(1, steps + 1)), "each update is recorded once"
    return [line["loss"] for line in trained]


def rows(workdir: Path, processes: int) -> dict[int, list[float]]:
    """The points of each batch that `processes` processes have read, by the number of the batch."""
    found: dict[int, list[float]] = {}
    for number in range(processes):
        for each in map(json.loads, (workdir / f"{number}_of_{processes}.jsonl").read_text().splitlines()):
            found.setdefault(each["step"], []).extend(each["x"])
    return found


def arrays(folder: Path, step: int) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint, whatever mesh wrote it."""
    tree = ocp.PyTreeCheckpointer().metadata(folder / str(step) / "default").item_metadata.tree
    whole = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    read = ocp.PyTreeCheckpointer().restore(folder / str(step) / "default", restore_args=whole)
    return {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(read)}


def own_lines(error: str) -> list[str]:
    """What a process printed beside the libraries' logs (a letter, the date) and their continuation."""
    return [each for each in error.splitlines() if each.startswith(("error", "warning", "Traceback", "  File"))]


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> tuple[Path, Ended]:
    """The folder of the runs of line_process.py by four processes, and how these ended."""
    folder = tmp_path_factory.mktemp("four")
    ports = (61440 + (os.getpid() + i) % 4096 for i in range(4096))
    for port in ports:
        with socket.socket() as free:
            if free.connect_ex(("127.0.0.1", port)):
                break
    return folder, start(4, line("whole", folder), by_slurm, port)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """The same by this process, on all of its devices and undisturbed."""
    folder = tmp_path_factory.mktemp("one")
    assert line_process.run(folder / "short", fsdp=1) and line_process.run_long(folder / "long", fsdp=1)
    return folder


def test_four_processes_have_the_losses_of_one(four, one):
    folder, ended = four
    assert ended.codes == [75] * 4, "\n".join(ended.errors)
    for mesh in ("data", "fsdp"):
        np.testing.assert_allclose(losses(folder / mesh), losses(one / "short"), rtol=1e-5)
        preview = (folder / mesh / "samples" / "000002.png").read_text()
        np.testing.assert_allclose(float(preview), float((one / "short/samples/000002.png").read_text()), rtol=1e-5)


def test_one_process_writes_and_prints(four):
    folder, ended = four
    first, *others = ended.outputs
    assert "line 3/3" in first and first.count("complete: ") == 3
    assert all(line.startswith("[Gloo]") for output in others for line in output.splitlines()), "by the library itself"
    assert not any(own_lines(error) for error in ended.errors)
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


def test_rows_of_all_processes_are_gathered_in_their_order_to_the_bit(four):
    folder, _ = four
    for number in range(4):
        with np.load(folder / f"gathered_{number}.npz") as gathered:
            assert gathered["x"].dtype == np.float64 and gathered["ok"].dtype == bool
            np.testing.assert_array_equal(gathered["x"][:, 0], np.repeat(np.arange(4), np.arange(1, 5)) + 1e-12)
            np.testing.assert_array_equal(gathered["ok"], np.concatenate([np.arange(n) > 0 for n in range(1, 5)]))


@pytest.mark.slow
def test_an_evaluation_by_two_processes_is_that_of_one(tmp_path):
    flags = ["-m", "lcm_jax.evaluate", "--model=shapes-lcm", "--plan=lcm:1", "--config.report.prompts=9"]
    flags += ["--config.report.reference=8", "--config.report.batch_size=3"]
    images = {}
    for count in (1, 2):
        output = tmp_path / str(count)
        shared = lambda number, port, count=count: by_hand(number, port) if count > 1 else {}  # noqa: E731
        ended = start(count, [*flags, f"--output={output}"], shared)
        assert ended.codes == [0] * count, ended.errors
        assert all(not text.strip() or text.startswith("[Gloo]") for text in ended.outputs[1:])
        images[count] = {path.name: path.read_bytes() for path in output.rglob("images/**/*.png")}
    assert len(images[1]) == 9 and images[1] == images[2]
    one, two = (json.loads((tmp_path / str(count) / "report.json").read_text())["models"] for count in (1, 2))
    one, two = (each["shapes-lcm"]["lcm"]["1"] for each in (one, two))
    assert all(one[name] == two[name] for name in ("verifier", "tasks", "intervals"))
    np.testing.assert_allclose(one["frechet"], two["frechet"], rtol=1e-4)


def test_sigterm_to_one_process_stops_all_at_the_same_update_and_others_resume_it(four, one):
    """By four processes to a SIGTERM, by two to a kill -9, by two to the end: nothing is lost, and nothing twice."""
    folder, (_, (first, *_), _, _) = four
    long = folder / "long"
    step = checkpoints_of(long)[-1]
    assert line_process.STOP_AT < step < line_process.LONG and records(long)[-1]["step"] == step
    assert f"stopped at step {step} of 40; checkpoint saved; run the same command to resume" in first
    read = rows(long, 4)
    assert all(sorted(read[i]) == sorted(rows(one / "long", 1)[i]) for i in range(step)), "the batches of one process"
    before = arrays(long / "checkpoints", step)

    # Two processes read what four wrote, to the last bit, and so does one.
    ended = start(2, line("resumed", folder), by_hand)
    for name in ("by two", "by one"):
        if name == "by one":
            line_process.copy_newest(folder / "by two" / "checkpoints", folder / name / "checkpoints", fsdp=2)
        after = arrays(folder / name / "checkpoints", step)
        assert before.keys() == after.keys() and len(before) > 5
        assert all(before[key].tobytes() == after[key].tobytes() for key in before), name

    # The one that is left has ended soon, with what to do.
    assert ended.codes == [distributed.RESUMABLE, -signal.SIGKILL], ended.errors
    assert ended.seconds < 60
    newest = checkpoints_of(long)[-1]
    assert step + line_process.KILL_AFTER - 3 <= newest < line_process.LONG
    (told,) = own_lines(ended.errors[0])
    assert re.fullmatch(
        rf"error: another process of this run is gone \(.*\); checkpoint {newest} in .* is kept; run the same command "
        "to resume there",
        told,
    )
    assert "from the beginning" not in ended.outputs[0]

    ended = start(2, line("once more", folder), by_hand)
    assert ended.codes == [0, 0], ended.errors
    assert f"resumed {long} at step {newest}" in ended.outputs[0]
    np.testing.assert_allclose(losses(long, line_process.LONG), losses(one / "long", line_process.LONG), rtol=1e-4)
    read = rows(long, 2)
    assert min(read.keys() - {0}) == step, "a run looks at the first batch before it resumes"
    for number in range(step, line_process.LONG):  # batches between the checkpoint and the kill were read twice
        assert set(read[number]) == set(rows(one / "long", 1)[number])


def test_without_the_first_process_the_others_end(tmp_path):
    ended = start(2, line("without the first", tmp_path), by_hand)
    assert ended.codes == [-signal.SIGKILL, distributed.RESUMABLE], ended.errors
    assert ended.seconds < 60 and len(ended.errors[1].splitlines()) < 40
    told = own_lines(ended.errors[1])
    assert told and all("another process of this run is gone" in each for each in told)
    assert "run the same command to resume" in told[-1] and checkpoints_of(tmp_path / "first")


def test_processes_of_different_configs_do_not_start(tmp_path):
    """By the real command: the process that differs is named, by itself and in the output of the first."""
    flags = ["--config=shapes", f"--workdir={tmp_path / 'run'}", "--config.mesh.data=2"]
    port = free_port()
    flags += [f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
    code = "import sys, os; sys.argv += os.environ['MORE'].split(); import runpy; "
    code += "runpy.run_module('lcm_jax.main', run_name='__main__', alter_sys=True)"
    more = lambda number, port: {"MORE": f"--process_id={number} --config.train.seed={5 * number}"}  # noqa: E731
    ended = start(2, ["-c", code, *flags], more)
    assert ended.codes == [1, 1], ended.errors
    host = socket.gethostname()
    text = f"process 1 on {host} has another config than process 0: train.seed (0 there, 5 here); start every process"
    assert own_lines(ended.errors[1]) == [f"error: {text} with the same command"]
    assert own_lines(ended.errors[0]) == [f"error: process 1 on {host} has ended: {text} with the same command"]
    assert not (tmp_path / "run").exists()


def test_a_process_whose_code_or_data_differ_is_named(monkeypatch):
    monkeypatch.setattr(distributed, "wait_for_all", lambda name: None)
    monkeypatch.setattr(distributed, "name_process", lambda: "process 3 on node7")
    versions = agreement.code_versions()
    assert versions["jax"] == jax.__version__ and len(versions["source"]) == 12
    others = {"code": versions | {"jax": "0.0.1"}, "data": {"records": "5000", "caches": "a"}}
    monkeypatch.setattr(distributed, "from_main", lambda text: json.dumps(others["code"], sort_keys=True))
    message = rf"^process 3 on node7 has another code than process 0: jax \('0.0.1' there, '{jax.__version__}' here\)"
    with pytest.raises(RunError, match=message + "; install the same version on every host$"):
        agreement.check_code_and_config({})
    monkeypatch.setattr(distributed, "from_main", lambda text: json.dumps(others["data"], sort_keys=True))
    with pytest.raises(RunError, match="another data than process 0: records .'5000' there, '4999' here.; give every"):
        agreement.check_data({"records": "4999", "caches": "a"})
    agreement.check_data(others["data"])


# ---- how processes find each other ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "several"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1", "TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
    ],
)
def test_clusters_are_known_by_their_environment(variables, several):
    assert distributed.in_cluster({"TPU_SKIP_MDS_QUERY": "1"} | variables) == several


def test_a_tpu_vm_is_asked_for_its_hosts(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace(name=name))
    assert distributed.in_cluster({}) and not distributed.in_cluster({"TPU_SKIP_MDS_QUERY": "1"})


@pytest.mark.parametrize(
    ("variables", "shares"),
    [
        ({}, True),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, True),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "CUDA_VISIBLE_DEVICES": "3"}, False),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}, False),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, False),
    ],
)
def test_one_process_on_a_host_has_all_of_its_devices(variables, shares):
    assert distributed.shares_devices(variables) == shares


@pytest.mark.parametrize(
    ("address", "alone"),
    [
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("0.0.0.0:1", True),
        ("10.0.0.1:1", False),
        ("node0:1", False),
        ("[fe80::1]:1", False),
    ],
)
def test_a_coordinator_that_other_hosts_cannot_reach_is_refused(address, alone):
    find = lambda **variables: distributed.find_processes(variables, address, 2, 0)  # noqa: E731
    assert find() == (address, 2, 0), "all processes may be on this host"
    for name, value in {"SLURM_STEP_NUM_NODES": "2", "TPU_WORKER_HOSTNAMES": "a,b", "SKYPILOT_NUM_NODES": "4"}.items():
        if not alone:
            assert find(**{name: value}) == (address, 2, 0)
            continue
        message = rf"{re.escape(address)} is this host alone, .* several hosts \({name}={value}\); use the name or the"
        with pytest.raises(RunError, match=message):
            find(**{name: value})
    variables = {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}
    assert find(**variables) == (address, 2, 0)
    if alone:
        with pytest.raises(RunError, match="OMPI_COMM_WORLD_LOCAL_SIZE=4 of 8"):
            find(**variables | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("127.0.0.1:1", 2, None), "only some of --coordinator, --num_processes and --process_id are given"),
        (("node0", 2, 0), "--coordinator node0 has no port; use host:port"),
        (("node0:1", 2, 2), "--process_id 2 is not supported with --num_processes 2; use 0 to 1"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags, message):
    with pytest.raises(RunError, match=message):
        distributed.find_processes({}, *flags)
    assert distributed.find_processes({"SLURM_STEP_NUM_TASKS": "4"}, None, 1, None) is None, "one alone is one alone"
    assert distributed.find_processes({"SLURM_STEP_NUM_TASKS": "4"}, None, None, None) == (None, None, None)


def test_processes_that_never_come_are_named_in_time():
    code = "from lcm_jax.training import distributed; distributed.initialize('127.0.0.1:{}', 2, 0, timeout=1)"
    ended = start(1, ["-c", code.format(free_port())])
    assert ended.codes == [1] and ended.seconds < 60
    (told,) = own_lines(ended.errors[0])
    assert re.match(r"error: the processes of this run did not all join at 127.* within 1 seconds; start all of", told)
    assert "is reached from this host alone" in told
