"""Records of a run: where its time goes, what its devices do, the loss by timestep, traces, Weights & Biases."""

import json
import sys
from itertools import repeat
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from whole_runs import QUICK, shrunk_lcd

from lcm_jax import cost, main, peaks
from lcm_jax.errors import RunError
from lcm_jax.objectives.by_timestep import loss_by_timestep
from lcm_jax.profiling.trace import open_profile
from lcm_jax.training import meter as meters
from lcm_jax.training.loop import TrainTask, train

X = np.linspace(-1, 1, 8, dtype=np.float32)
T = np.array([0, 249, 250, 600, 601, 602, 100, 400], np.int32)  # none from 750 up


def losses_of(slope, batch, draws):
    losses = jnp.square(slope * batch["x"] - batch["y"])
    return losses.mean(), {"loss": losses.mean()} | loss_by_timestep(losses, jnp.asarray(T), 1000)


def run(workdir, *, profile=(None, None), skipped=dict, **settings) -> list[dict[str, float]]:
    """Train a line through points for four updates; return the records."""
    task = TrainTask(
        title="line",
        objective=SimpleNamespace(draw=lambda rng, latents: None, loss=losses_of),
        bind=lambda params, target, frozen: params["slope"],
        prepare=lambda params, frozen, batch, draws: batch,
        params={"slope": jax.ShapeDtypeStruct((), jnp.float32)},
        frozen={},
        load_params=lambda: {"slope": np.float32(0)},
        load_frozen=dict,
        latents=lambda batch: jax.ShapeDtypeStruct((8,), jnp.float32),
        batch={"x": X, "y": X},
        make_batches=lambda step: repeat({"x": X, "y": 3 * X}),
        write_preview=lambda ema, frozen, path: {},
        on_complete=lambda ema, frozen, seconds: None,
        weight_digests=dict,
        skipped=skipped,
    )
    settings = {"train.steps": 4, "log.every_steps": 2, "checkpoint.every_steps": 4} | settings
    assert train(task, shrunk_lcd("a teacher that is never read", **QUICK | settings), workdir, *profile)
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_record_has_times_rates_memory_and_the_loss_by_timestep(tmp_path):
    counts = iter([{}, {"ImageError": 1}, {"ImageError": 3, "OSError": 1}])
    first, last = (line for line in run(tmp_path, skipped=lambda: next(counts)) if "loss" in line)
    for line in (first, last):
        assert line["step_seconds"] > 0 and line["data_seconds"] >= 0 and line["memory_gb"] > 0.05
        np.testing.assert_allclose(
            line["steps_per_second"] * (line["step_seconds"] + line["data_seconds"]), 1, rtol=1e-4
        )
        np.testing.assert_allclose(line["images_per_second"], 8 * line["steps_per_second"], rtol=1e-4)
        assert line["learning_rate"] > 0 and "mfu" not in line, "the peak of a CPU is not published"
        assert {name for name in line if "/" in name and "skipped" not in name} == {
            "loss/t0-249",
            "loss/t250-499",
            "loss/t500-749",
        }
        shares = np.array([3, 2, 3]) / 8
        by_timestep = [line["loss/t0-249"], line["loss/t250-499"], line["loss/t500-749"]]
        np.testing.assert_allclose(shares @ by_timestep, line["loss"], rtol=1e-5)
    assert "checkpoint_seconds" in last and "checkpoint_seconds" not in first
    assert (first["skipped"], first["skipped/ImageError"]) == (1, 1)
    assert (last["skipped"], last["skipped/ImageError"], last["skipped/OSError"]) == (3, 2, 1), "since the last record"


def test_waiting_and_checkpoints_are_apart_from_the_updates(monkeypatch):
    now = iter([0.0, 10.0, 14.0, 20.0, 20.0, 100.0, 110.0, 110.0])
    monkeypatch.setattr(meters.time, "monotonic", lambda: next(now))
    device = SimpleNamespace(
        device_kind="NVIDIA H100 80GB HBM3", process_index=0, memory_stats=lambda: {"peak_bytes_in_use": 7e9}
    )
    meter = meters.Meter(32, [device, device])
    with meter.waiting():
        pass
    for _ in range(2):
        meter.count(int(989e12))
    rates = meter.read()
    expected = {"steps_per_second": 0.1, "images_per_second": 3.2, "step_seconds": 8, "data_seconds": 2, "mfu": 0.05}
    assert rates == expected | {"tflops_per_second": pytest.approx(98.9), "memory_gb": 7.0}
    meter.restart()  # at 100
    meter.count(0)
    assert meter.read()["step_seconds"] == 10


def test_a_profile_is_written_or_its_absence_reported(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(peaks, "measure", lambda dtypes: peaks.Peaks(dict.fromkeys(dtypes, 1e12), 1e11))
    folder = tmp_path / "profile"
    run(tmp_path / "a", profile=(folder, (2, 3)))
    profile = open_profile(folder)
    assert profile.runs == 2 and "jit_step" in [module for module, _ in profile.programs]
    run(tmp_path / "b", profile=(tmp_path / "rest", None))
    assert open_profile(tmp_path / "rest").runs == 2, "from the third update to the end of the run"
    run(tmp_path / "c", profile=(tmp_path / "none", (7, 9)))
    output = capsys.readouterr().out
    assert f"a profile is in {folder}; python -m lcm_jax.profile {folder} prints it" in output
    assert "no profile was written: this process ran no update 7" in output
    with pytest.raises(ValueError, match=f"--profile={folder} is not an empty folder; use a new one"):
        run(tmp_path / "d", profile=(folder, None))
    assert not (tmp_path / "d").exists()


def test_a_run_that_resumes_within_the_profiled_updates_has_no_profile():
    lines, calls = [], []
    tracer = SimpleNamespace(start=lambda: calls.append("start"), stop=lambda runs: f"profile of {runs}")
    for first, line in [(2, "profile of 2"), (3, "no profile was written: this process ran no update 2")]:
        steps = meters.ProfiledSteps(tracer, (2, 3), lines.append)
        for step in range(first, 6):
            steps.before(step, state=jnp.ones(()))
            steps.after(step, metrics=jnp.ones(()))
        steps.close()
        assert lines.pop() == line and not lines
    assert calls == ["start"]

    def fail(runs):
        raise ValueError("host.xplane.pb has no kernels")

    steps = meters.ProfiledSteps(SimpleNamespace(start=lambda: None, stop=fail), (1, 1), lines.append)
    steps.before(1, state=jnp.ones(()))
    steps.after(1, metrics=jnp.ones(()))
    assert lines == ["no profile was written: host.xplane.pb has no kernels"], "training goes on"


def test_profiled_updates_need_a_folder():
    with pytest.raises(ValueError, match="--profile is missing; use the folder that the profile of --profile_steps is"):
        main.parse(["main", "--config=shapes", "--workdir=w", "--profile_steps=1:2"])
    main.FLAGS["profile_steps"].value = None


@pytest.mark.parametrize("text", ["10", "0:3", "5:4", "a:b", "1:2:3", ":"])
def test_a_wrong_range_of_updates_is_an_error(text):
    with pytest.raises(ValueError, match=f"--profile_steps '{text}' is not supported; use the first and the last one"):
        main.parse(["main", "--config=shapes", "--workdir=w", f"--profile_steps={text}"])
    main.FLAGS["profile_steps"].value = None


def test_scalars_go_to_weights_and_biases_too(tmp_path, monkeypatch):
    calls = []
    service = SimpleNamespace(
        log=lambda scalars, step: calls.append((step, scalars)), finish=lambda: calls.append("finished")
    )
    wandb = SimpleNamespace(init=lambda **arguments: calls.append(arguments) or service)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    lines = [line for line in run(tmp_path / "run", **{"log.wandb": "mine"}) if "loss" in line]
    begun, *logged, finished = calls
    assert (begun["project"], begun["name"], begun["resume"]) == ("mine", "run", None) and finished == "finished"
    assert (tmp_path / "run" / "wandb.txt").read_text() == begun["id"] + "\n"
    assert begun["config"]["log"]["wandb"] == "mine"
    logged = [(step, scalars) for step, scalars in logged if "loss" in scalars]
    assert [step for step, _ in logged] == [line["step"] for line in lines] == [2, 4]
    np.testing.assert_allclose(logged[0][1]["loss"], lines[0]["loss"], rtol=1e-5)

    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(
        RunError, match=r"log.wandb is 'mine', and wandb is not installed; pip install 'lcm_jax\[wandb\]'"
    ):
        run(tmp_path / "other", **{"log.wandb": "mine"})


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(16)(jnp.tanh(nn.Dense(32)(x)))


class Chain(nn.Module):
    block: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x += self.block(name=f"block_{i}")(x)
        return x


@pytest.mark.parametrize("argument", [0, 1], ids=["of the parameters", "of the input"])
def test_flops_without_recomputed_activations(argument):
    x = jnp.ones((4, 16))
    params = Chain(Block).init(jax.random.key(0), x)

    def count(block, recomputed):
        loss = lambda params, x: jnp.sum(jnp.square(Chain(block).apply(params, x)))  # noqa: E731
        return cost.count_flops(jax.jit(jax.grad(loss, argument)).trace(params, x).jaxpr.jaxpr, recomputed)

    plain = count(Block, True)
    assert count(Block, False) == count(nn.remat(Block), False) == plain < count(nn.remat(Block), True)


def test_published_peaks():
    assert cost.peak_flops("TPU v5 lite") == 197e12 and cost.peak_flops("TPU v5") == 459e12
    assert cost.peak_flops("NVIDIA A100-SXM4-80GB") == 312e12 and cost.peak_flops("cpu") is None
