"""docs/performance.py: tables and fits from the benchmark's JSON."""

import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location("performance_page", ROOT / "docs" / "performance.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(side: str, batch: int, steps: int, size: int, ms: float, **more) -> dict:
    case = {"case": f"sample, {steps} steps, batch {batch}", "side": side, "suite": "sample", "part": "", "vae": "own"}
    case |= {"batch": batch, "steps": steps, "size": size, "dtype": "float32", "mode": "jit", "first_s": 4.0}
    return case | {"ms": ms, "ms_min": ms, "ms_max": ms} | more


@pytest.fixture
def file(tmp_path):
    rows = [row("lcm_jax", 1, steps, 64, 3.0 + 5.0 * steps) for steps in (1, 2, 4)]
    rows += [row("lcm_jax", 1, 4, size, 23.0 * (size / 64) ** 2.4) for size in (128, 256)]
    rows += [row("diffusers", 1, 4, 64, 46.0, ratio=2.0, ratio_min=1.5, ratio_max=2.5)]
    rows += [{"case": "LCD step", "side": "lcm_jax", "suite": "train", "error": "there is | no memory"}]
    results = {"model": "shapes-lcm", "device": "cpu", "cores": 2, "versions": {"jax": "0.10.2"}, "date": "2026-11-27"}
    path = tmp_path / "figures.json"
    path.write_text(json.dumps(results | {"commit": "abc1234", "command": "python -m x", "rows": rows}))
    return path


def test_tables_fits_and_plot(page, file, tmp_path, capsys):
    page.main([str(file), f"--plot={tmp_path / 'growth.png'}"])
    text = capsys.readouterr().out
    assert text.startswith("shapes-lcm on cpu, 2 cores; jax 0.10.2; 2026-11-27, commit abc1234; `python -m x`\n")
    assert "| case | side | first run, s | ms (range) | x time (range) |" in text  # without empty columns
    assert "| sample, 4 steps, batch 1 | diffusers (jit) | 4.0 | 46.0 (46.0 to 46.0) | 2.00 (1.50 to 2.50) |" in text
    assert "| LCD step | lcm_jax | failed | there is / no memory |  |" in text
    assert "| sample, lcm_jax, batch 1, 64 pixels wide | 3 ms + 5 ms for each step | steps: 1, 2, 4 | 0% |" in text
    assert "| sample, lcm_jax, 4 steps, batch 1 | time grows with pixels^1.20 |" in text
    assert Image.open(tmp_path / "growth.png").size[0] > 800


def test_files_that_cannot_be_used(page, tmp_path):
    (tmp_path / "list.json").write_text("[]")
    for name in ("missing.json", "list.json"):
        with pytest.raises(SystemExit, match=rf"error: .*{name} is not a file of lcm_jax.benchmark"):
            page.main([str(tmp_path / name)])


def test_nothing_to_plot(page, file, tmp_path, capsys):
    results = json.loads(file.read_text())
    file.write_text(json.dumps(results | {"rows": results["rows"][:2]}))
    with pytest.raises(SystemExit, match="no three rows that differ in steps, batch or size alone"):
        page.main([str(file), f"--plot={tmp_path / 'growth.png'}"])
