"""`python -m lcm_jax.benchmark` at tiny size, both sides, and rows that fail."""

import json
import os
import subprocess
import sys

import pytest
import tiny_model
from whole_runs import ROOT

from lcm_jax.benchmarks import cases
from lcm_jax.benchmarks.cases import Case


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model.write(tmp_path_factory.mktemp("models") / "teacher", unet=tiny_model.SHALLOW)


def benchmark(*arguments: object, **more: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} | more
    command = [sys.executable, "-m", "lcm_jax.benchmark", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_both_sides_are_timed(model, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    file = tmp_path / "figures.json"
    arguments = ("--peer=diffusers", "--batch=2", "--steps=1", "--repeats=2", f"--json={file}")
    done = benchmark(f"--model={model}", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(file.read_text())
    peak, *rows = results["rows"]
    assert peak["case"] == "matmul 2048 x 2048" and peak["share_of_peak"] == 1 and peak["flops"] == 2 * 2048**3
    assert [(row["case"], row["side"]) for row in rows] == [
        ("sample, 1 step, batch 2", "lcm_jax"),
        ("sample, 1 step, batch 2", "diffusers"),
        ("LCD step, batch 2", "lcm_jax"),
        ("LCD step, batch 2", "diffusers"),
    ]
    for row in rows:
        assert "error" not in row, row
        assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"] and row["runs"] == 2 and row["first_s"] > 0
        assert row["images_per_s"] == pytest.approx(2000 / row["ms"], rel=1e-2)
        assert 0 < row["share_of_peak"] < 1 and 0.1 < row["peak_gb"] < 10
        assert ("ratio" in row) == (row["side"] == "diffusers")
    assert rows[0]["flops"] == rows[1]["flops"] > 1e6 and rows[2]["flops"] == rows[3]["flops"] > rows[0]["flops"]
    table = done.stdout.split("┏")[1]
    assert "LCD step, batch 2" in table and "diffusers (eager)" in table and "failed" not in table


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


def test_a_row_that_fails_contains_its_reason(model, tmp_path):
    """Of two suites one cannot run: the other is timed, and the exit code is that of a success."""
    config = model / "unet" / "config.json"
    student = tmp_path / "student"
    subprocess.run(["cp", "-r", model, student], check=True)
    (student / "vae" / "config.json").write_text(json.dumps(json.loads(config.read_text())))
    done = benchmark(f"--model={student}", "--suite=sample", "--batch=1", "--repeats=1")
    assert done.returncode == 0, done.stderr
    assert "sample, 4 steps, batch 1, lcm_jax: failed: " in done.stdout and "AutoencoderKL config" in done.stdout
    late = benchmark(f"--model={model}", "--suite=sample", "--batch=1", "--repeats=1", "--row_limit=0.1")
    assert late.returncode == 1 and "the time limit was exceeded; raise --row_limit or --limit" in late.stdout


def test_the_cases_of_each_model():
    full = cases.plan(["sample", "train"], "sd15", [], [], None, accelerator=True)
    assert full[0] == Case("matmul", "sd15", 1, 0, 8192, "bfloat16")
    assert [case.name for case in full[1:]] == [
        "sample, 4 steps, batch 8",
        "sample, 4 steps, batch 1",
        "sample, 1 step, batch 1",
        "LCD step, batch 16, remat",
        "LCD step, batch 32, remat",
    ]
    assert all((case.size, case.dtype) == (512, "bfloat16") for case in full[1:])
    chosen = cases.plan(["train", "sample"], "shapes-lcm", [3], [2, 8], "bfloat16", accelerator=False)
    assert [case.name for case in chosen[1:]] == [
        "LCD step, batch 3",
        "sample, 2 steps, batch 3",
        "sample, 8 steps, batch 3",
    ]
    assert cases.Case(**json.loads(full[1].to_json())) == full[1]
    assert [(case.suite, case.input, case.batch) for case in cases.plan(["data"], "sd15", [], [], None, False)] == [
        ("data", name, 64) for name in cases.INPUTS
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((["sampel"], "sd15", [], [], None), "--suite 'sampel' is not supported; use sample, train, data"),
        ((["train"], "sd3", [], [], None), "--model 'sd3' is not supported; use sd15, shapes-lcm, or a model folder"),
        ((["train"], "sd15", [], [], "int8"), "--dtype 'int8' is not supported; use float32, bfloat16, float16"),
        ((["train"], "sd15", [0], [], None), "--batch and --steps below 1 are not supported"),
    ],
)
def test_what_is_not_supported(arguments, message):
    with pytest.raises(ValueError, match=message):
        cases.check(*arguments)


def test_a_mistake_is_one_line():
    done = benchmark("--batch=8,x")
    assert done.returncode == 1 and done.stderr == "error: --batch 'x' is not a whole number; use numbers such as 1,8\n"
