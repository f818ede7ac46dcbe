"""The training loop on the smallest of jobs, a line through points: what it saves, refuses and stops at."""

import json
import os
import signal
import time
from dataclasses import replace
from itertools import repeat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from whole_runs import QUICK, checkpoints_of, shrunk_lcd

from lcm_jax.training import loop
from lcm_jax.training.logging import ProgressReport
from lcm_jax.training.loop import Job, RunError, check_workdir, train

X = np.linspace(-1, 1, 8, dtype=np.float32)


def config_of(**more):
    return shrunk_lcd("a teacher that is never read", **QUICK | more)


def line(**more) -> Job:
    def loss(params, target, frozen, batch, draws):
        total = jnp.mean(jnp.square(params["slope"] * batch["x"] - batch["y"]))
        return total, {"loss": total}

    parts = {
        "title": "line", "init": lambda: {"slope": jnp.float32(0)}, "frozen": {}, "draw": lambda rng, batch: None,
        "loss": loss, "example": {"x": X, "y": X}, "batches": lambda step: repeat({"x": X, "y": 3 * X}),
        "preview": lambda ema, path: {}, "finish": lambda ema, seconds: None,
    }  # fmt: skip
    return Job(**parts | more)


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint(tmp_path):
    points = iter([{"x": X, "y": 3 * X}, {"x": X, "y": np.nan * X}])
    job = line(batches=lambda step: points)
    with pytest.raises(RunError, match=r"step 2: .*loss is nan.*last good checkpoint"):
        train(job, config_of(**{"train.steps": 30}), tmp_path)
    assert checkpoints_of(tmp_path) == [1]


def out_of_memory(rng, batch):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 64.0GiB.\nmore lines")


def no_kernel(rng, batch):
    raise NotImplementedError("Unsupported sequence length Q 4096, KV 77.")


def a_setting(rng, batch):
    raise ValueError("objective.distance is 'l3'; choose l2 or huber")


@pytest.mark.parametrize(
    "draw, message",
    [
        (
            out_of_memory,
            r"^the line step cannot be traced for 1 x cpu: .*64.0GiB.; lower train.batch_size.*remat=True$",
        ),
        (no_kernel, r"^the line step cannot be traced for 1 x cpu: NotImplementedError: .*KV 77.; use .*dtype=float32"),
        (a_setting, r"^the line step cannot be traced for 1 x cpu: objective.distance is 'l3'; choose l2 or huber$"),
    ],
)
def test_a_step_that_cannot_be_traced_is_one_line_and_writes_nothing(draw, message, tmp_path):
    def never(step):
        raise AssertionError("no data is read before the step is compiled")

    with pytest.raises(RunError, match=message) as caught:
        train(line(draw=draw, batches=never), config_of(), tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_step_that_cannot_be_compiled_is_one_line_and_writes_nothing(tmp_path):
    """A custom call that no compiler has."""
    call = jax.ffi.ffi_call("a_kernel_that_is_not_there", jax.ShapeDtypeStruct((), jnp.float32))
    job = line(loss=lambda params, target, frozen, batch, draws: (params["slope"] * jax.lax.stop_gradient(call()), {}))
    with pytest.raises(RunError, match=r"^the line step cannot be compiled for 1 x cpu: .*; use --config.train.dtype"):
        train(job, config_of(), tmp_path / "run")
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
    job = line()
    raise_signal = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    if moment == "while it draws samples":
        job = line(preview=lambda ema, path: raise_signal() or {})
        stops_at = 2
    else:
        read, stops_at = loop._read, 1
        monkeypatch.setattr(loop, "_read", lambda *a: raise_signal() or read(*a))
    assert not train(job, config, tmp_path)
    assert checkpoints_of(tmp_path) == [stops_at]


def test_a_finished_run_knows_its_seconds_and_what_it_began_from(tmp_path):
    def slow(step):
        for batch in line().batches(step):
            time.sleep(1)
            yield batch

    taken = []
    job = line(batches=slow, finish=lambda ema, seconds: taken.append(seconds), origin={"teacher": "1" * 64})
    for _ in range(2):
        assert train(job, config_of(), tmp_path)
    assert taken[0] >= 2 and taken[1] >= 2, "what earlier processes of the run have taken counts"
    with pytest.raises(RunError, match="was begun with other weights: teacher changed since"):
        train(replace(job, origin={"teacher": "0" * 64}), config_of(), tmp_path)


def test_progress_tells_speed_loss_and_time_left(capsys):
    progress = ProgressReport(total=100, done=0, batch_size=8, title="lcd")
    progress.update(40, {"loss": 0.25, "steps_per_second": 0.5})
    progress.close()
    assert capsys.readouterr().out == "lcd 40/100  loss 0.25  0.50 steps/s  4 pictures/s  2:00 left\n"
