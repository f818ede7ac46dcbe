"""Studies: a grid of small runs from the command to its table and figure, killed and resumed, and mistakes."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_model
from ml_collections import ConfigDict
from PIL import Image

from lcm_jax import config_files, recipes, study
from lcm_jax.errors import Interrupted, RunError
from lcm_jax.evaluation import report
from lcm_jax.evaluation.diversity import Diversity
from lcm_jax.studies import grid, plan
from lcm_jax.training import loop

BASE = """
from pathlib import Path
from typing import Any
from whole_runs import QUICK, shrunk_lcd

def get_config():
    config = shrunk_lcd(Path({teacher!r}), **QUICK)
    config.report.teacher = {{"ddim": (1,)}}
    return config
"""
STUDY = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({{
        "base": {base!r},
        "overrides": {{"objective": {{"backward_simulation": 0.0}}}},
        "grid": {{"student": {{"guidance_embedding_init": ("zero", "normal")}}}},
        "design": "product",
        "figure": {{"x": "run", "lines": "steps", "metrics": ("verifier", "frechet"), "steps": (1, 2)}},
    }})
"""
SAMPLING = {"guidance_scales": (2.0, 4.0), "steps": (1, 2), "captions": 3, "images_per_caption": 2, "batch_size": 6}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[str, str]:
    """The files of a base config, of a tiny teacher, and of a study of it."""
    folder = tmp_path_factory.mktemp("studies")
    teacher = tiny_model.write(folder / "teacher", unet=tiny_model.SHALLOW)
    base, config = folder / "base.py", folder / "study.py"
    base.write_text(BASE.format(teacher=str(teacher)))
    config.write_text(STUDY.format(base=str(base)))
    return str(base), str(config)


@pytest.fixture
def call(monkeypatch):
    """The command in this process, without its exit code."""

    def run(*arguments: str) -> None:
        forget()
        monkeypatch.setattr(sys, "argv", ["study", *arguments])
        monkeypatch.setattr(study.command, "configure_jax", lambda: None)
        study.parse(sys.argv)
        study.study()

    def forget() -> None:
        study.FLAGS.unparse_flags()
        for name in list(study.FLAGS):
            study.FLAGS[name].unparse()
            if name.startswith("config."):  # a key's flag belongs to the config that was loaded
                delattr(study.FLAGS, name)

    yield run
    forget()


NAMES = ["guidance_embedding_init=zero", "guidance_embedding_init=normal"]


def leave_results(folder: Path, frechet: float) -> None:
    """Write what a complete run leaves, as far as a study reads it."""
    figures = {"verifier": 0.5, "tasks": {"counting": 0.5}, "frechet": frechet, "intervals": {"verifier": [0.4, 0.6]}}
    rows = [
        {"model": model, "sampler": sampler, "steps": steps} | figures
        for model, sampler, steps in (("teacher", "ddim", 1), ("student", "lcm", 1), ("student", "lcm", 2))
    ]
    result = report.nest(rows) | report.environment() | {"captions": 6, "guidance_scale": 8.0}
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(result | {"seconds": {"training": 2.0, "report": 1.0}}))
    (folder / "export").mkdir()


def test_a_study_resumes_and_is_drawn(files, call, tmp_path, monkeypatch, capsys):
    """With the training left out: `test_killed_runs` has what a run itself resumes by."""
    workdir = tmp_path / "study"
    arguments, trained = (f"--config={files[1]}", f"--workdir={workdir}"), []

    def train(task, config, folder):
        trained.append(folder.name)
        if len(trained) == 2:
            raise Interrupted("interrupted at step 1 of 2")
        leave_results(folder, frechet=float(len(trained)))
        return True

    monkeypatch.setattr(loop, "train", train)
    with pytest.raises(Interrupted):
        call(*arguments)
    printed = capsys.readouterr().out
    assert "2 runs, 0 of them complete" in printed and "1 of 2 runs complete; about " in printed
    table = (workdir / "report.md").read_text()
    assert f"| {NAMES[0]} | 125 | 8 | lcm | 2 | 50.0% [40.0%, 60.0%] | 1.00 |" in table and NAMES[1] not in table
    call(*arguments, "--dry_run")
    assert capsys.readouterr().out == f"complete  {workdir / NAMES[0]}\nto do     {workdir / NAMES[1]}\n"

    call(*arguments)
    assert "2 runs, 1 of them complete" in capsys.readouterr().out and trained == [NAMES[0], NAMES[1], NAMES[1]]
    stored = json.loads((workdir / "report.json").read_text())
    assert stored["runs"] == [2, 2] and stored["updates"] == 2 and stored["training_seconds"] == 4.0
    labels = [("teacher", 1), *((name, steps) for name in NAMES for steps in (1, 2))]
    assert [(row["run"], row["steps"]) for row in stored["rows"]] == labels
    assert stored["rows"][-1]["student.guidance_embedding_init"] == "normal" and stored["rows"][-1]["frechet"] == 3.0
    with Image.open(workdir / "figure.png") as figure:
        assert figure.width > 800 and len(np.unique(np.asarray(figure.convert("L")))) > 50
    call(*arguments)
    assert "2 runs, 2 of them complete" in capsys.readouterr().out and len(trained) == 3, (
        "its results are written again"
    )

    call(*arguments, "--config.grid.student.guidance_embedding_init=('normal',)", "--dry_run")  # the same study
    with pytest.raises(
        RunError, match="was created with another study: overrides.objective.backward_simulation is 0.0"
    ):
        call(*arguments, "--config.overrides.objective.backward_simulation=0.5")
    (workdir / NAMES[0] / "report.json").write_text("{")
    with pytest.raises(RunError, match="report.json is damaged .*; restore it, or delete it, and the same command"):
        call(*arguments)
    (workdir / "config.json").write_text("{}")
    with pytest.raises(RunError, match="is the folder of a run; use another one for a study$"):
        call(*arguments)


def test_a_model_is_sampled_once_at_each_guidance_scale(files, tmp_path):
    grid = {"student": {"guidance_embedding_init": ("zero",)}}
    study = load(files[1], grid=grid, sampling=SAMPLING | {"metrics": ("verifier",)})
    study.figure = ConfigDict({"x": "guidance_scale", "lines": "steps", "metrics": ("diversity",), "steps": (1, 2)})
    chosen = plan.make_plan(study, tmp_path)
    leave_results(tmp_path / NAMES[0], 1.0)
    (tmp_path / NAMES[0] / "export").rmdir()
    unet = tiny_model.SHALLOW | {"time_cond_proj_dim": 256}
    tiny_model.write(tmp_path / NAMES[0] / "export", unet=unet, scheduler="LCMScheduler")
    rows = chosen.rows(chosen.runs)
    assert [(row["guidance_scale"], row["steps"]) for row in rows] == [(2.0, 1), (2.0, 2), (4.0, 1), (4.0, 2)]
    assert all(row["diversity"] > 0 and "verifier" in row["intervals"] for row in rows)
    assert rows[0]["diversity"] != rows[2]["diversity"], "the student has w as its input"
    stored = tmp_path / NAMES[0] / "guidance" / "4.json"
    before = stored.stat().st_mtime_ns
    chosen.write(NAMES[:1])
    assert stored.stat().st_mtime_ns == before and "| diversity |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "figure.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_study_of_real_runs_is_killed_within_one_and_resumed(files, call, tmp_path, monkeypatch, capsys):
    workdir, arguments = tmp_path / "study", (f"--config={files[1]}", f"--workdir={tmp_path / 'study'}")

    def make_task(config, folder: Path):
        """The task of a run; the second run is interrupted after its first update."""
        task = recipes.find_recipe(config)(config, folder)

        def batches(first: int):
            for number, batch in enumerate(task.make_batches(first), first):
                if number == 1:
                    raise KeyboardInterrupt
                yield batch

        return replace(task, make_batches=batches) if folder.name == NAMES[1] else task

    with monkeypatch.context() as patch:
        patch.setattr(recipes, "make_task", make_task)
        with pytest.raises(Interrupted):
            call(*arguments)
    made = (workdir / NAMES[0] / "report.json").stat().st_mtime_ns
    capsys.readouterr()
    call(*arguments)
    printed = capsys.readouterr().out
    assert f"run {NAMES[0]}" not in printed and f"resumed {workdir / NAMES[1]} at step 1" in printed
    assert (workdir / NAMES[0] / "report.json").stat().st_mtime_ns == made
    rows = {(row["run"], row["steps"]): row for row in json.loads((workdir / "report.json").read_text())["rows"]}
    for name in NAMES:
        own = json.loads((workdir / name / "report.json").read_text())["student"]["lcm"]["2"]
        assert rows[name, 2]["frechet"] == own["frechet"] and rows[name, 2]["intervals"] == own["intervals"]


def load(file: str, **changes) -> Any:
    """The config of a study with other values at its top."""
    config = config_files.load_file(file)
    with config.unlocked():
        for name, value in changes.items():
            config[name] = ConfigDict(value) if isinstance(value, dict) else value
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": "shape"}, "^base shape is neither a file nor a bundled config; use one of .*shapes"),
        ({"base": "shapes_vae", "overrides": {}, "grid": {}}, "^run run: base shapes_vae has no report of a student; "),
        ({"base": "lcd:sd3"}, "^the model is 'sd3'; choose one of sd15"),
        (
            {"grid": {"train": {"ema_rat": (0.5,)}}},
            "^grid.train.ema_rat is not a key of .*; did you mean train.ema_rate?",
        ),
        ({"grid": {"train": {"ema_rate": 0.5}}}, "^grid.train.ema_rate 0.5 is not supported; use a tuple of values"),
        ({"grid": {"train": {"ema_rate": ()}}}, r"^grid.train.ema_rate \(\) is not supported"),
        ({"grid": {"train": {"ema_rate": (0.5, 0.5)}}}, "^grid.train.ema_rate has 0.5 twice; use it once$"),
        ({"grid": {"train": {"ema_rate": ("a",)}}}, "^grid.train.ema_rate 'a' is not supported; use a float, as"),
        ({"grid": {"train": {"ema_rate": (1.5,)}}}, "^run ema_rate=1.5: train.ema_rate 1.5 is not supported; use a"),
        ({"overrides": {"train": {"stps": 3}}}, "^overrides.train.stps is not a key of .*; did you mean train.steps"),
        ({"design": "random"}, "^design 'random' is not supported; use product or one_at_a_time$"),
        ({"colour": "red"}, "^colour is not a key of a study; use base, overrides, grid, design, figure, sampling$"),
        ({"sampling": SAMPLING | {"steps": (9,)}}, "^run .*: sampling.steps has 9, and a student samples in at"),
        (
            {"sampling": SAMPLING | {"guidance_scales": (0.5,)}},
            "^sampling.guidance_scales .* is not supported; use num",
        ),
        ({"sampling": SAMPLING | {"guidance_scales": ()}}, "^sampling.guidance_scales is empty; use a tuple"),
        ({"sampling": SAMPLING | {"images": 3}}, "^sampling.images is not a setting of Sampling"),
    ],
)
def test_a_mistake_is_one_line_before_any_work(changes, message, files, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        plan.make_plan(load(files[1], **changes), tmp_path / "study")
    assert "\n" not in str(caught.value) and not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"x": "objective.solver"},
            "^figure.x 'objective.solver' is not supported; use run or student.guidance_embedding_init or skip",
        ),
        ({"metrics": ("fid",)}, "^figure.metrics 'fid' is not supported; use verifier or frechet$"),
        ({"steps": (1, 4)}, "^figure.steps has 4, and no run is sampled in so many steps; remove it$"),
    ],
)
def test_a_figure_of_what_no_run_has_is_one_line(changes, message, files, tmp_path):
    config = load(files[1])
    config.figure.update(changes)
    with pytest.raises(ValueError, match=message):
        plan.make_plan(config, tmp_path / "study")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir=W"], "^--config is missing; use --config=study_solver"),
        (["--config=study_solver"], "^--workdir is missing; use --config"),
        (["--config=study_solver", "--config.grid.objective.solvr=3", "--workdir=W"], 'solvr is not .*mean "solver"'),
        (["--config=study", "--workdir=W"], "^--config=study is neither a file nor a bundled config"),
        (["--config=shapes", "--workdir=W"], "^the config has no overrides; copy it from a bundled study"),
    ],
)
def test_a_mistake_in_the_command_is_one_line(arguments, message, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value) and not any(tmp_path.iterdir())


def test_the_runs_of_a_grid():
    axes = {"objective.solver": ("ddim", "dpm++"), "train.ema_rate": (0.95, 0.0, 0.999943)}
    names = [run.name for run in grid.make_runs(axes, "product")]
    assert len(names) == 6 and names[0] == "solver=ddim,ema_rate=0.95" and names[-1] == "solver=dpm++,ema_rate=0.999943"
    runs = grid.make_runs(axes, "one_at_a_time")
    assert [run.name for run in runs] == ["default", "solver=dpm++", "ema_rate=0", "ema_rate=0.999943"]
    assert runs[1].settings == {"objective.solver": "dpm++", "train.ema_rate": 0.95}
    assert [run.name for run in grid.make_runs({}, "product")] == ["run"]
    same = {"a.steps": (1,), "b.steps": ((1, 2),)}
    assert [run.name for run in grid.make_runs(same, "product")] == ["a.steps=1,b.steps=_1__2_"]


@pytest.mark.parametrize(("name", "runs"), [("study_solver", 15), ("study_ema", 6), ("study_guidance", 1)])
def test_every_run_of_a_bundled_study_is_supported(name, runs, tmp_path):
    planned = plan.make_plan(config_files.load(name), tmp_path)
    assert len(planned.runs) == len({each.folder for each in planned.runs}) == runs
    assert {each.config.objective.num_ddim_steps for each in planned.runs} >= {50}, "k = 20, as published"


def test_diversity_is_the_mean_distance_between_images_of_a_caption():
    values = np.array([[0.0, 0.0], [3.0, 4.0], [9.0, 9.0], [1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    metric = Diversity(lambda images: np.asarray(images, float))
    prompts = ["a", "a", "alone", "b", "b", "b"]
    rows = metric.measure(values, prompts)
    assert metric.result(rows)["diversity"] == pytest.approx((5 + (1 + 1 + 2) / 3) / 2, rel=1e-5)
    shuffled = {name: each[::-1] for name, each in rows.items()}
    assert metric.result(shuffled) == metric.result(rows)
    with pytest.raises(ValueError, match="^diversity needs two images of a caption; use more images per caption$"):
        metric.result({name: each[:1] for name, each in rows.items()})
