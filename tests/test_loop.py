"""The training loop on the smallest of jobs, a line through points: what it saves, refuses and stops at."""

import json
import os
import signal
import time
from dataclasses import replace
from itertools import chain, repeat
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from whole_runs import QUICK, checkpoints_of, shrunk_lcd

from lcm_jax import locks
from lcm_jax.errors import Interrupted
from lcm_jax.training import loop
from lcm_jax.training.checkpoint import CheckpointError
from lcm_jax.training.logging import ProgressReport, Recorder
from lcm_jax.training.loop import RunError, TrainTask, check_workdir, train

X = np.linspace(-1, 1, 8, dtype=np.float32)


def config_of(**more):
    return shrunk_lcd("a teacher that is never read", **QUICK | more)


def squared_error(slope, batch, draws):
    total = jnp.mean(jnp.square(slope * batch["x"] - batch["y"]))
    return total, {"loss": total}


def line(draw=lambda rng, latents: None, loss=squared_error, **more) -> TrainTask:
    parts = {
        "title": "line",
        "objective": SimpleNamespace(draw=draw, loss=loss),
        "bind": lambda params, target, frozen: params["slope"],
        "prepare": lambda params, frozen, batch, draws: batch,
        "params": {"slope": jax.ShapeDtypeStruct((), jnp.float32)},
        "frozen": {},
        "load_params": lambda: {"slope": np.float32(0)},
        "load_frozen": dict,
        "latents": lambda batch: jax.ShapeDtypeStruct((8,), jnp.float32),
        "batch": {"x": X, "y": X},
        "make_batches": lambda step: repeat({"x": X, "y": 3 * X}),
        "write_preview": lambda ema, frozen, path: {},
        "on_complete": lambda ema, frozen, seconds: None,
        "weight_digests": dict,
    }
    return TrainTask(**parts | more)


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint(tmp_path):
    points = iter([{"x": X, "y": 3 * X}, {"x": X, "y": np.nan * X}])
    task = line(make_batches=lambda step: points)
    with pytest.raises(RunError, match=r"^step 2: .*loss is nan; checkpoint 1 in .* is kept; use another"):
        train(task, config_of(**{"train.steps": 30}), tmp_path)
    assert checkpoints_of(tmp_path) == [1]


def out_of_memory(rng, latents):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 64.0GiB.\nmore lines")


def no_kernel(rng, latents):
    raise NotImplementedError("Unsupported sequence length Q 4096, KV 77.")


def a_setting(rng, latents):
    raise ValueError("objective.distance is 'l3'; choose l2 or huber")


@pytest.mark.parametrize(
    "draw, message",
    [
        (
            out_of_memory,
            r"^the line step cannot be traced for 1 x cpu: .*64.0GiB.; lower train.batch_size.*remat=block$",
        ),
        (no_kernel, r"^the line step cannot be traced for 1 x cpu: NotImplementedError: .*KV 77.; use .*dtype=float32"),
        (a_setting, r"^the line step cannot be traced for 1 x cpu: objective.distance is 'l3'; choose l2 or huber$"),
    ],
)
def test_a_step_that_cannot_be_traced_is_one_line_and_writes_nothing(draw, message, tmp_path):
    def never(step):
        raise AssertionError("no data is read before the step is compiled")

    with pytest.raises(RunError, match=message) as caught:
        train(line(draw=draw, make_batches=never), config_of(), tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_step_that_cannot_be_compiled_is_one_line_and_writes_nothing(tmp_path):
    """A custom call that no compiler has."""
    call = jax.ffi.ffi_call("a_kernel_that_is_not_there", jax.ShapeDtypeStruct((), jnp.float32))
    task = line(loss=lambda slope, batch, draws: (slope * jax.lax.stop_gradient(call()), {}))
    with pytest.raises(RunError, match=r"^the line step cannot be compiled for 1 x cpu: .*; use --config.train.dtype"):
        train(task, config_of(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_workdir_of_another_config_is_refused(tmp_path):
    config = config_of()
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict(), default=list))
    before = (tmp_path / "config.json").read_bytes()
    rate = config.optimizer.learning_rate
    config.optimizer.learning_rate = 0.5
    with pytest.raises(RunError, match=rf"optimizer.learning_rate \({rate} there, 0.5 here\)"):
        train(line(), config, tmp_path)
    config.optimizer.learning_rate = rate
    config.log.every_steps = 7
    check_workdir(tmp_path, config.to_dict())  # how often it logs is free
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_bytes() == before


@pytest.mark.parametrize("moment", ["while it reads the losses", "while it draws samples"])
def test_a_signal_at_any_moment_is_followed_by_a_checkpoint(moment, tmp_path, monkeypatch):
    config = config_of(**{"train.steps": 4, "checkpoint.every_steps": 100, "sample.every_steps": 2})
    task = line()
    raise_signal = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    if moment == "while it draws samples":
        task = line(write_preview=lambda ema, frozen, path: (path.stem == "000002" and raise_signal()) or {})
        stops_at = 2
    else:
        read, stops_at = loop._read, 1
        monkeypatch.setattr(loop, "_read", lambda *a: raise_signal() or read(*a))
    assert not train(task, config, tmp_path)
    assert checkpoints_of(tmp_path) == [stops_at]


def test_a_finished_run_knows_its_seconds_and_what_it_began_from(tmp_path):
    def slow(step):
        for batch in line().make_batches(step):
            time.sleep(1)
            yield batch

    taken = []
    task = line(
        make_batches=slow,
        on_complete=lambda ema, frozen, seconds: taken.append(seconds),
        weight_digests=lambda: {"teacher": "1" * 64},
    )
    for _ in range(2):
        assert train(task, config_of(), tmp_path)
    assert taken[0] >= 2 and taken[1] >= 2, "what earlier processes of the run have taken counts"
    with pytest.raises(RunError, match="was created with different weights: teacher changed since"):
        train(replace(task, weight_digests=lambda: {"teacher": "0" * 64}), config_of(), tmp_path)


def test_no_state_that_is_not_finite_is_saved_or_exported(tmp_path):
    """The last update's loss is the loss before it: only the state itself shows what the update made of it."""
    exported = []
    task = line(on_complete=lambda ema, frozen, seconds: exported.append(ema))
    message = r"^step 1: .params\['slope'\] and \d+ more arrays are not finite.*no checkpoint in .*lower optimizer"
    with pytest.raises(CheckpointError, match=message) as caught:
        train(task, config_of(**{"optimizer.learning_rate": np.nan, "train.steps": 1}), tmp_path)
    assert "\n" not in str(caught.value) and not exported and checkpoints_of(tmp_path) == []


def test_zero_is_never_and_the_last_update_is_logged_and_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "MAX_PENDING", 2)
    never = {f"{group}.every_steps": 0 for group in ("log", "sample", "checkpoint")} | {"train.steps": 5}
    assert train(line(write_preview=None), config_of(**never), tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5] and checkpoints_of(tmp_path / "run") == [5]
    points = chain([{"x": X, "y": np.nan * X}], repeat({"x": X, "y": 3 * X}))
    with pytest.raises(RunError, match="^step 1: .*loss is nan; there is no checkpoint in .* yet"):
        train(line(make_batches=lambda step: points), config_of(**never | {"train.steps": 10**9}), tmp_path / "other")


def test_what_cannot_be_printed_or_logged_costs_no_update(tmp_path, monkeypatch):
    def broken(*_):
        raise BrokenPipeError

    monkeypatch.setattr(ProgressReport, "update", broken)
    with pytest.raises(BrokenPipeError):
        train(line(), config_of(**{"train.steps": 1}), tmp_path)
    assert checkpoints_of(tmp_path) == [1]


def test_a_workdir_that_another_run_holds_is_refused_before_anything_is_compiled(tmp_path):
    with (
        locks.lock(tmp_path / "lock"),
        pytest.raises(
            RunError, match=rf"is in use by process {os.getpid()} on .* since .*; wait for it, or use another"
        ),
    ):
        train(line(draw=None), config_of(), tmp_path)
    assert train(line(), config_of(), tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe"])
def test_a_damaged_file_of_a_workdir_is_named_with_the_remedy(content, tmp_path):
    assert train(line(), config_of(**{"train.steps": 1}), tmp_path)
    for name, remedy in (("config.json", "the config of this command"), ("origin.json", "the weights that the config")):
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RunError, match=rf"{name} is damaged \(.*\); restore it, or delete it .*{remedy}"):
            train(line(), config_of(**{"train.steps": 1}), tmp_path)
        (tmp_path / name).write_bytes(before)


def test_a_line_that_a_kill_cut_short_is_dropped_and_others_are_counted(tmp_path, capsys):
    path, good = tmp_path / "metrics.jsonl", '{"step": 1, "seconds": 7.5}'
    path.write_text(good + '\n{"step": 2, "sec')
    Recorder(tmp_path, 5, print).close()
    assert path.read_text() == good + "\n" and capsys.readouterr().out == ""
    path.write_bytes(b'\xff\n[3]\n{"step": "4"}\n{"step": 1, "loss": [2]}\n' + good.encode() + b"\n\0\0")
    recorder = Recorder(tmp_path, 5, print)
    recorder.close()
    assert path.read_text() == good + "\n" and recorder.seconds == 7.5
    assert capsys.readouterr().out == f"warning: {path} has 4 damaged lines, which are dropped\n"


def test_too_little_memory_says_what_to_lower_and_what_is_kept(tmp_path):
    def exhausted(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 64.0GiB.\nmore")

    config = config_of(**{"sample.every_steps": 2})
    for changed, message in (
        (
            {"make_batches": exhausted},
            "opening the data; lower train.batch_size, raise train.accumulate .* begin again",
        ),
        ({"write_preview": exhausted}, "sampling a preview; lower sample.batch_size; there is no checkpoint in .* yet"),
        (
            {"on_complete": exhausted},
            "the export and the report; lower report.batch_size; checkpoint 2 in .* is kept; run",
        ),
    ):
        with pytest.raises(RunError, match=rf"^out of memory \(64.0 GiB\) while .*{message}") as caught:
            train(line(**changed), config, tmp_path)
        assert "\n" not in str(caught.value)


def test_ctrl_c_leaves_a_preview_at_once_and_ends_a_report_with_what_is_kept(tmp_path):
    def interrupt(*_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)
        raise AssertionError("it was not interrupted")

    config = config_of(**{"sample.every_steps": 1, "checkpoint.every_steps": 0})
    at_once = line(write_preview=lambda ema, frozen, path: {} if path.stem == "000000" else interrupt())
    with pytest.raises(Interrupted, match="^interrupted at step 1 of 2; checkpoint saved; run the same command"):
        train(at_once, config, tmp_path)
    assert checkpoints_of(tmp_path) == [1]
    with pytest.raises(
        Interrupted, match="^interrupted while writing the export and the report; checkpoint 2 in .*kept"
    ):
        train(line(on_complete=interrupt), config, tmp_path)


def test_a_terminal_that_is_closed_stops_a_run_unless_nohup_says_otherwise(tmp_path):
    hang_up = lambda step: (os.kill(os.getpid(), signal.SIGHUP) or {"x": X, "y": X} for _ in repeat(0))  # noqa: E731
    before = signal.getsignal(signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert train(line(make_batches=hang_up), config_of(), tmp_path / "nohup")
        signal.signal(signal.SIGHUP, lambda *_: None)  # batches are read before the loop listens
        assert not train(line(make_batches=hang_up), config_of(**{"train.steps": 9}), tmp_path / "closed")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert checkpoints_of(tmp_path / "nohup") == [1, 2] and checkpoints_of(tmp_path / "closed")[-1] < 9


def test_progress_tells_speed_loss_and_time_left(capsys):
    progress = ProgressReport(total=100, done=0, title="lcd", every_seconds=0)
    scalars = {"loss": 0.25, "steps_per_second": 0.5, "images_per_second": 4.0, "data_seconds": 0.1}
    progress.update(40, scalars)
    progress.show_preview(50, {"frechet@4": 12.34567})
    progress.update(50, scalars | {"mfu": 0.5, "data_seconds": 0.4})
    progress.close()
    assert capsys.readouterr().out.splitlines() == [
        "lcd 40/100  loss 0.25  0.50 steps/s  4 images/s  2:00 left",
        "lcd 50/100  frechet@4 12.35 at 50  loss 0.25  0.50 steps/s  4 images/s  MFU 50%  20% waiting for data  "
        "1:40 left",
    ]


def test_checkpoints_are_saved_by_the_clock_when_losses_are_read(tmp_path, monkeypatch):
    clock = iter(range(0, 10**6, 20))  # seconds, at each look
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    settings = {"checkpoint.every_steps": 0, "checkpoint.keep": 99, "train.steps": 12}
    saved = {}
    for minutes, every in ((0.0, 1), (1.0, 2), (10**6, 2), (1e-3, 0)):
        workdir = tmp_path / str(minutes)
        monkeypatch.setattr(loop, "MAX_PENDING", 5)
        more = {"checkpoint.every_minutes": minutes, "log.every_steps": every}
        assert train(line(), config_of(**settings | more), workdir)
        saved[minutes] = checkpoints_of(workdir)
    assert saved[0.0] == saved[10**6] == [12], "never, and not within so few"
    assert saved[1.0][-1] == 12 and 2 < len(saved[1.0]) < 6 and all(step % 2 == 0 for step in saved[1.0])
    assert saved[1e-3] == [5, 10, 12], "without a log, whenever losses are read"
