"""`python -m lcm_jax.benchmark`: both sides at tiny size, and its runner with sides that fail, differ or are late."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_model
from whole_runs import ROOT

from lcm_jax.benchmarks import cases, compare, random_model, report, runner, sides, start
from lcm_jax.benchmarks.cases import Case, Selection


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model.write(tmp_path_factory.mktemp("models") / "teacher", unet=tiny_model.SHALLOW)


def benchmark(*arguments: object, **more: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} | more
    command = [sys.executable, "-m", "lcm_jax.benchmark", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


# ---- the two sides --------------------------------------------------------------------------------------------------


def test_both_sides_are_timed(model, tmp_path):
    """As a user runs it, in processes: one program for any number of steps, and nothing is left behind."""
    pytest.importorskip("diffusers")
    file, temporary = tmp_path / "figures.json", tmp_path / "temporary"
    temporary.mkdir()
    arguments = ("--suite=sample", "--batch=2", "--steps=1,2", "--repeats=2", f"--json={file}", "--peer=diffusers")
    done = benchmark(f"--model={model}", *arguments, TMPDIR=str(temporary))
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(file.read_text())
    peaks, rows = results["rows"][:4], results["rows"][4:]
    assert peaks[0]["case"] == "matmul 2048 x 2048" and peaks[0]["flops"] == 2 * 2048**3
    assert peaks[2]["case"] == "copy of 256 MB" and peaks[2]["bytes"] == 2 * 256e6
    assert results["peak"] == {
        "tflops": max(row["tflops"] for row in peaks[:2]),
        "gb_per_s": max(row["gb_per_s"] for row in peaks[2:]),
    }
    assert [(row["case"], row["side"]) for row in rows] == [
        (f"sample, {steps}, batch 2", side) for steps in ("1 step", "2 steps") for side in ("lcm_jax", "diffusers")
    ]
    for row in rows:
        assert "error" not in row, row
        assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"] and row["runs"] == 2 and row["first_s"] > 0
        assert row["images_per_s"] == pytest.approx(2000 / row["ms"], rel=1e-2)
        assert 0 < row["share_of_peak"] < 2 and row["share_of_copy"] > 0 and 0.1 < row["peak_gb"] < 10
        assert row["difference"] < 0.003 and row["size"] == 64
        assert ("ratio" in row) == (row["side"] == "diffusers")
    assert rows[0]["flops"] == rows[1]["flops"] > 1e6 and rows[2]["flops"] > rows[0]["flops"]
    assert results["command"].startswith("python -m lcm_jax.benchmark --model=") and results["cores"] == os.cpu_count()
    assert results["versions"].keys() == {"jax", "torch", "diffusers"} and results["device"] == "cpu"
    table = done.stdout.split("┏")[1]
    assert "sample, 2 steps, batch 2" in table and "diffusers (" in table and "failed" not in table
    assert "warning" not in done.stderr.lower() and not list(temporary.iterdir())


def outputs_of_both(case: Case, folder: Path) -> list[tuple[dict, dict]]:
    """Return (outputs, facts) of both sides, in this process, after another run each."""
    pytest.importorskip("diffusers")
    from lcm_jax.benchmarks import diffusers_peer, ours

    made = []
    for side in (ours, diffusers_peer):
        prepared = side.prepare(case, folder)
        outputs = {name: np.asarray(value) for name, value in prepared.outputs().items()}
        prepared.run()
        assert prepared.peak_bytes() > 1e8
        made.append((outputs, prepared.facts))
    return made


@pytest.mark.parametrize("part", ["lcd", pytest.param("lora", marks=pytest.mark.slow)])  # 20 s on two cores
def test_both_sides_train_with_the_same_gradients(model, tmp_path, part):
    """Loss, norm of the gradient and of the updated parameters, of the same batch and the same random numbers."""
    case = Case("train", str(model), 2, 0, 0, "float32", part=part)
    (ours, facts), (theirs, more) = outputs_of_both(case, tmp_path)
    assert ours.keys() == {"loss", "gradient_norm", "parameter_norm"} and ours["gradient_norm"] > 1e-4
    assert compare.difference(ours, theirs)[1] < 1e-4
    assert (
        facts["flops"] > 1e6
        and facts["bytes"] > 1e5
        and facts["size"] == 64
        and more["mode"] in ("eager", "channels_last")
    )


@pytest.mark.parametrize("vae", cases.VAES)
def test_both_sides_decode_to_the_same_images(model, tmp_path, vae):
    random_model.main(str(model), "float32", tmp_path / "models", ["tiny_vae"])
    case = Case("decode", str(model), 1, 0, 32, "float32", vae)
    (ours, facts), (theirs, _) = outputs_of_both(case, tmp_path)
    assert ours["images"].shape == (1, 32, 32, 3) and ours["images"].std() > 0.01 and facts["size"] == 32
    assert compare.difference(ours, theirs)[1] < 1e-4


def test_random_models_are_whole(model, tmp_path, monkeypatch):
    """Those of full size, with the configs of a small model."""
    from lcm_jax.weights.model import open_model

    configs = dict(open_model(model).configs)
    configs["text_encoder"] = configs["text_encoder"] | {"vocab_size": 1000}
    monkeypatch.setitem(random_model.FAMILIES, "sd15", configs)
    random_model.main("sd15", "bfloat16", tmp_path, ["teacher"])
    tensors = open_model(tmp_path / "teacher").tensors["unet"]
    kernel = np.asarray(tensors["mid_block.resnets.0.conv1.weight"])
    assert kernel.dtype.name == "bfloat16" and kernel.astype(np.float32).std() == pytest.approx(144**-0.5, rel=0.1)
    assert (np.asarray(tensors["conv_norm_out.weight"]) == 1).all()


# ---- the runner, with sides that are quick --------------------------------------------------------------------------


@pytest.fixture
def run(model, monkeypatch):
    """Return run(behavior) -> results without the peaks, in which both sides are processes of benchmark_side.py."""
    plan = cases.plan
    monkeypatch.setattr(cases, "plan", lambda *arguments: [c for c in plan(*arguments) if c.suite != "peak"])
    for name in sides.MODULES:
        monkeypatch.setitem(sides.MODULES, name, "benchmark_side")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    monkeypatch.setattr(runner, "has_accelerator", lambda: False)

    def run(behavior="", suites=("decode",), row_limit=60.0, limit=60.0, repeats=3, json_file=None, **more):
        monkeypatch.setenv("FAKE_SIDE", behavior)
        limits = {"row_limit": row_limit, "limit": limit, "json_file": json_file}
        return runner.run(Selection(suites, str(model), **more), peer="diffusers", repeats=repeats, **limits)

    return run


def test_turns(run, tmp_path, capsys):
    results = run(json_file=str(tmp_path / "a.json"), suites=("sample",), batches=(3,), steps=(1, 4))
    assert json.loads((tmp_path / "a.json").read_text()) == results
    ours, theirs, *_ = results["rows"]
    assert ours["ms"] == pytest.approx(20, abs=15) and theirs["runs"] == ours["runs"] == 3
    assert theirs["ratio_min"] <= theirs["ratio"] <= theirs["ratio_max"] and theirs["ratio"] == pytest.approx(
        2, abs=0.9
    )
    assert theirs["flops"] == ours["flops"] and ours["first_s"] == pytest.approx(0.1, abs=0.09)
    assert [row["steps"] for row in results["rows"]] == [1, 1, 4, 4] and ours["peak_gb"] == 1
    report.show(results)
    printed = capsys.readouterr().out
    assert "sample, 4 steps, batch 3" in printed and "fake 1.0" in printed


@pytest.mark.parametrize(
    "behavior, ours, theirs",
    [
        ("output=1.2", "the images of the two sides differ by", "the images of the two sides differ by"),
        ("output=nan", "the images of the two sides differ by inf, and 0.01 is allowed", "differ by inf"),
        ("fail=prepare", "ValueError: there are no weights", "not run, since lcm_jax has failed"),
        ("fail=run", None, "MemoryError: too large"),
    ],
)
def test_a_row_that_fails_contains_its_reason(run, behavior, ours, theirs):
    """One side that fails leaves the other one; outputs that differ fail both, and nothing is timed."""
    for row, message in zip(run(behavior)["rows"], (ours, theirs), strict=True):
        if message is None:
            assert "error" not in row and row["ms"] > 0
        else:
            assert message in row["error"] and "ms" not in row, row
            assert report.summary(row) == f"failed: {row['error']}"


def test_the_time_limits(run):
    late = run("sleep=30", row_limit=2.0)["rows"]
    assert {row["error"] for row in late} == {"the time limit was exceeded; raise --row_limit or --limit"}
    assert {row["error"] for row in run(limit=0.0)["rows"]} == {"not run: --limit was reached"}
    few = run("sleep=0.3", row_limit=5.0, repeats=1000)["rows"]
    assert all(0 < row["runs"] < 20 for row in few)


def test_the_difference_of_outputs():
    x = {"images": np.arange(10.0), "loss": np.float32(2.0)}
    assert compare.difference(x, x) == ("images", 0.0) and compare.difference({}, {}) == ("", 0.0)
    assert compare.difference(x, x | {"loss": np.float32(2.5)}) == ("loss", 0.25)
    assert compare.difference(x, x | {"images": np.arange(10.0) + 1}) == (
        "images",
        pytest.approx(1 / np.arange(10).std()),
    )
    for other in (x | {"images": np.arange(9.0)}, {"loss": x["loss"]}, x | {"loss": np.float32(np.nan)}):
        assert compare.difference(x, other)[1] == np.inf


# ---- starting, and reading data -------------------------------------------------------------------------------------


def test_starting_is_timed(run, monkeypatch):
    """--help and imports, of which the slowest and the peer's are timed too."""
    monkeypatch.setattr(start, "COMMANDS", ("sample", "benchmark"))
    monkeypatch.setattr(
        cases,
        "plan",
        lambda *_: [Case("start", "shapes-lcm", 1, 0, 0, "float32", part=part) for part in ("help", "import")],
    )
    monkeypatch.setattr(start, "time_process", lambda arguments, *_: 0.2 if "lcm_jax.sample" in arguments else 0.1)
    helps, imports, peer = run(suites=("start",))["rows"]
    assert helps["case"] == "--help, slowest command" and helps["ms"] == 200 and helps["runs"] == 3
    assert helps[
        "note"
    ] == "slowest of 2: lcm_jax.sample" and "first run 0.2 s, then 200.0 ms (slowest" in report.summary(helps)
    assert (imports["side"], peer["side"], peer["ratio"]) == ("lcm_jax", "diffusers", 1.0)


def test_a_process_that_fails_or_is_late(tmp_path):
    for code, limit, message in (("raise OSError('no file')", 30.0, "OSError: no file"), ("input()", 0.0, sides.LATE)):
        with pytest.raises(sides.SideError, match=message):
            start.time_process(["-c", code], start.time.monotonic() + limit, {})
    assert (
        start.time_process(["-c", "import os; assert os.environ['A'] == '1'"], start.time.monotonic() + 30, {"A": "1"})
        > 0
    )


@pytest.mark.slow
def test_the_first_image_of_a_process(model, tmp_path):
    """65 s on two cores: cold and warm, of both sides."""
    file = tmp_path / "figures.json"
    done = benchmark(f"--model={model}", "--suite=start", "--repeats=1", "--peer=diffusers", f"--json={file}")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [row["side"] for row in rows] == ["lcm_jax", "diffusers", "lcm_jax", "lcm_jax", "diffusers"]
    assert rows[0]["case"] == "process to first image, 4 steps" and rows[0]["first_s"] > 1e-3 * rows[0]["ms"] > 0.5
    assert all(row["ms"] < 5000 for row in rows[2:]) and "slowest of 8" in rows[2]["note"]


def test_the_input_pipeline_is_timed(tmp_path):
    """Without a peer and a matrix product, from files that are deleted; decoding takes more than reading a cache."""
    file, files = tmp_path / "figures.json", tmp_path / "files"
    files.mkdir()
    done = benchmark("--suite=data", "--batch=2", "--repeats=1", f"--json={file}", TMPDIR=str(files))
    assert done.returncode == 0, done.stdout + done.stderr
    prompts, tokens, images = rows = json.loads(file.read_text())["rows"]
    assert [row["case"] for row in rows] == [f"{name}, 8 batches of 2" for name in cases.INPUTS.values()]
    assert 100_000 < prompts["bytes_per_image"] < 64 * 64 * 8 * 2 + 77 * 768 * 2 + 1000
    assert tokens["bytes_per_image"] < 64 * 64 * 8 * 2 + 1000 and images["bytes_per_image"] > 50_000
    assert 0 < tokens["cores"] < images["cores"] == pytest.approx(0.164 * images["cpu_ms"], rel=0.05, abs=0.01)
    assert prompts["images_per_s"] == pytest.approx(16_000 / prompts["ms"], rel=1e-2)
    assert "cores feed an accelerator that needs 164 images/s" in done.stdout and not list(files.iterdir())


# ---- options --------------------------------------------------------------------------------------------------------


def test_the_cases_of_each_model():
    full = cases.plan(Selection(["all"], "sd15"), accelerator=True)
    assert full[0] == Case("peak", "sd15", 1, 0, 8192, "bfloat16", part="matmul")
    assert [case.name for case in full[1:]] == [
        "copy of 2048 MB",
        "sample, 4 steps, batch 8, 512 x 512",
        "sample, 4 steps, batch 1, 512 x 512",
        "sample, 1 step, batch 1, 512 x 512",
        "sample, 4 steps, batch 1, 512 x 512, tiny VAE",
        "decode, batch 8, 512 x 512",
        "LCD step, batch 64, 512 x 512, remat",
        "LCM-LoRA step, batch 64, 512 x 512, remat",
        "process to first image, 4 steps, 512 x 512",
        "--help, slowest command",
        "import",
        *(f"{name}, 8 batches of 64" for name in cases.INPUTS.values()),
    ]
    assert all((case.size, case.dtype) == (512, "bfloat16") for case in full[2:7])
    assert len({case.group for case in full[:2]}) == len({case.group for case in full[3:5]}) == 1  # one process each
    assert [case.name for case in cases.plan(Selection(["train"], "sdxl"), accelerator=True)[2:]] == [
        "LCM-LoRA step, batch 8, 1024 x 1024, remat"
    ]
    chosen = Selection(["train", "sample"], "shapes-lcm", [3], [2, 8], [32, 64], "bfloat16", objectives=["lcd"])
    assert [case.name for case in cases.plan(chosen, accelerator=False)[2:]] == [
        *("LCD step, batch 3, 32 x 32", "LCD step, batch 3, 64 x 64"),
        *(f"sample, {n} steps, batch 3, {size} x {size}" for size in (32, 64) for n in (2, 8)),
    ]
    small = cases.plan(Selection(["sample"], "shapes-lcm"), accelerator=False)[2:]
    assert [(case.batch, case.steps) for case in small] == [(16, 4), (1, 4), (1, 1)]
    assert cases.Case(**json.loads(full[1].to_json())) == full[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"suites": ["sampel"]}, "--suite 'sampel' is not supported; use all, sample, decode, train, start, data"),
        ({"suites": []}, "--suite '' is not supported; use all"),
        ({"model": "sd3"}, "--model 'sd3' is not supported; use shapes-lcm, sd15, sdxl, or a model folder"),
        ({"dtype": "float64"}, "--dtype 'float64' is not supported; use float32, float16, bfloat16"),
        ({"vaes": ["taesd"]}, "--vae 'taesd' is not supported; use own, tiny"),
        ({"objectives": ["lcf"]}, "--objective 'lcf' is not supported; use lcd, lora"),
        ({"batches": [8, 0]}, "--batch 0 is not supported; use positive numbers"),
        ({"sizes": [0]}, "--size 0 is not supported; use positive numbers"),
    ],
)
def test_what_is_not_supported(arguments, message):
    with pytest.raises(ValueError, match=message):
        Selection(**{"suites": ["sample"], "model": "sd15"} | arguments)


def test_a_mistake_is_one_line():
    done = benchmark("--batch=8,x")
    assert done.returncode == 1 and done.stderr == "error: --batch 'x' is not a whole number; use numbers such as 1,8\n"


def test_the_commit_of_the_results(monkeypatch):
    assert runner.commit() is None or len(runner.commit().removesuffix("-dirty")) >= 7
    monkeypatch.setenv("PATH", "")
    if shutil.which("git") is None:
        assert runner.commit() is None
