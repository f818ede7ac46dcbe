"""Metrics that merge, rows of any plan, reports of any rows, and the command that compares models."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import rich.console
import tiny_model
from evaluating import calling
from PIL import Image

from lcm_jax.data import shapes
from lcm_jax.evaluation import report
from lcm_jax.evaluation.bootstrap import intervals
from lcm_jax.evaluation.evaluate import Column, concatenate, evaluate, make_resources, measure_batches
from lcm_jax.evaluation.frechet import frechet_distance, moments
from lcm_jax.evaluation.metrics import METRICS, make_metrics
from lcm_jax.evaluation.verifier import score
from lcm_jax.recipes.evaluation import open_output

RECORDS = [shapes.Shapes("test", 24)[i] for i in range(24)]
CAPTIONS = [record["caption"] for record in RECORDS]
IMAGES = np.stack([record["image"] for record in RECORDS])
IMAGES[::3] = IMAGES[1::3]  # a third of them shows something else
REAL = [{"image": image, "caption": caption} for image, caption in zip(IMAGES, CAPTIONS, strict=True)]

WITHOUT_WEIGHTS = ("verifier", "frechet", "classifier")  # metrics that need no published weights


def colors(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), 16, -1, 3).mean(2).reshape(len(images), -1)


@pytest.fixture
def metrics():
    return make_metrics(WITHOUT_WEIGHTS, make_resources(colors, REAL, len(REAL), 3 * REAL, 10))


@pytest.mark.parametrize("name", WITHOUT_WEIGHTS)
@pytest.mark.parametrize("splits", [(12,), (1, 3, 20), tuple(range(1, 24))])
def test_a_metric_of_parts_is_that_of_all(name, splits, metrics):
    metric = metrics[name]
    whole = metric.measure(IMAGES, CAPTIONS)
    ends = zip((0, *splits), (*splits, len(IMAGES)), strict=True)
    merged = concatenate([metric.measure(IMAGES[first:last], CAPTIONS[first:last]) for first, last in ends])
    jax.tree.map(lambda some, all: np.testing.assert_allclose(some, all, rtol=1e-12), merged, whole)
    result = metric.result(merged)
    assert result.keys() == metric.columns.keys() and isinstance(result[next(iter(metric.columns))], float)
    scores = metric.scores(merged)
    assert scores is None or scores.shape == (len(IMAGES),)
    low, high = intervals(metric.result, merged, result, 20)[next(iter(metric.columns))]
    assert low <= result[next(iter(metric.columns))] + 1e-6 and low < high


def test_intervals_cover_the_mean_and_the_distance_as_often_as_they_say():
    """Of means by hand: 95% of the intervals of 200 samples cover the mean; their width is that of the normal's."""
    rng = np.random.default_rng(0)
    samples = rng.random((200, 100)) < 0.7
    ranges = [
        intervals(lambda rows: {"share": float(rows.mean())}, s, {"share": float(s.mean())}, 200) for s in samples
    ]
    covered = [low <= 0.7 <= high for low, high in (each["share"] for each in ranges)]
    assert 0.9 <= np.mean(covered) <= 0.99
    assert 0.16 < np.mean([each["share"][1] - each["share"][0] for each in ranges]) < 0.2
    # Of a distance, which repeated images make larger: the figure is within its interval all the same.
    reference = moments(rng.normal(size=(500, 20)))
    distance = lambda rows: {"distance": frechet_distance(moments(rows), reference)}  # noqa: E731
    rows = rng.normal(size=(60, 20))
    value = distance(rows)
    low, high = intervals(distance, rows, value, 50)["distance"]
    assert low < value["distance"] < high
    assert np.mean([distance(rows[rng.integers(60, size=60)])["distance"] for _ in range(20)]) > high


def test_metrics_with_the_same_measure_share_its_rows():
    calls = []

    def measure(images, prompts):
        calls.append(len(images))
        return np.ones(len(images))

    resources = make_resources(colors, REAL, len(REAL), REAL, 10)
    a, b = (SimpleNamespace(measure=resources.once("ones", lambda: measure)) for _ in range(2))
    rows = measure_batches([(IMAGES[:20], CAPTIONS[:20]), (IMAGES[20:], CAPTIONS[20:])], {"a": a, "b": b})
    assert calls == [20, 4] and rows["a"] is rows["b"] and rows["a"].shape == (24,)
    assert resources.reference_rows(measure) is resources.reference_rows(measure) and calls == [20, 4, 10, 10, 4]


def test_metrics_have_columns_of_their_own():
    columns = [column for metric in METRICS.values() for column in metric.columns]
    assert len(columns) == len(set(columns)) and not {*report.LABELS, *report.SPEED} & set(columns)


def test_real_images_are_at_distance_0_and_the_verifier_is_its_score(metrics):
    draw = lambda sampler, steps: [(IMAGES[:20], 1.5), (IMAGES[20:], 0.5)]  # noqa: E731
    (row,) = evaluate(draw, {"ddim": (7,), "euler": ()}, CAPTIONS, metrics)
    assert (row["sampler"], row["steps"], row["images_per_s"]) == ("ddim", 7, 12.0) and row["frechet"] < 1e-8
    expected = score(IMAGES, CAPTIONS)
    assert row["verifier"] == round(expected["overall"], 4) < 1 and row["tasks"].keys() == expected["tasks"].keys()
    with pytest.raises(ValueError, match="ddim 7 gave 24 images for 25 prompts"):
        list(evaluate(draw, {"ddim": (7,)}, [*CAPTIONS, CAPTIONS[0]], {}))


class Brightness:
    """A metric as a newcomer would add it."""

    columns = {"brightness": Column("bright", ".3f")}
    note = "Brightness is the mean of all values."
    sources = None
    packages = {}
    resamplings = 10
    lower_is_better = False

    @classmethod
    def create(cls, resources):
        return cls()

    def measure(self, images, prompts):
        return np.array([image.mean() for image in images])

    def result(self, rows):
        return {"brightness": rows.mean() / 255}

    def scores(self, rows):
        return rows


def test_a_new_metric_is_a_class_and_a_line_of_the_table(monkeypatch):
    monkeypatch.setitem(METRICS, "brightness", Brightness)
    chosen = make_metrics(["brightness"], make_resources(colors, REAL, len(REAL), 3 * REAL, 10))
    draw = lambda sampler, steps: [(np.full((2, 8, 8, 3), 51, np.uint8), 0.1)]  # noqa: E731
    rows = [{"model": "any"} | row for row in evaluate(draw, {"ddim": (1, 2)}, ["a", "b"], chosen)]
    told = report.describe(chosen)
    assert report.line(rows[0], report.columns_of(told)) == "any ddim 1: 20.0 images/s, bright 0.200 [0.200, 0.200]"
    content = {"models": report.nest(rows), "captions": 2, "guidance_scale": 8.0, "device": "cpu"} | told
    text = report.markdown(json.loads(json.dumps(content)))
    assert "# any\n" in text and "| any | ddim | 2 | 0.200 [0.200, 0.200] | 20.0 |" in text
    assert text.endswith(f"{Brightness.note} {report.INTERVALS}\n")
    assert "erifier" not in text and "Frechet" not in text


def test_a_report_gives_its_rows_back():
    rows = [
        {"model": model, "sampler": sampler, "steps": steps, "tasks": {"counting": 0.5}, "images_per_s": 2.0}
        for model, sampler in [("teacher", "ddim"), ("teacher", "euler"), ("student", "lcm")]
        for steps in (8, 1)
    ]
    assert report.rows_of(json.loads(json.dumps(report.nest(rows)))) == rows
    assert report.rows_of({"models": report.nest(rows)}) == rows
    assert [heading for heading, _ in report.cells(rows[0], report.columns_of({}))][-2:] == ["images/s", "counting"], (
        "groups come last"
    )


@pytest.mark.parametrize(("width", "last"), [(140, "color attribution"), (80, "images/s")])
def test_a_narrow_terminal_has_no_groups_and_no_cut_figures(width, last, monkeypatch, capsys):
    monkeypatch.setattr(report, "Console", lambda **_: rich.console.Console(width=width))
    row = {"verifier": 0.9861, "tasks": dict.fromkeys(shapes.TASKS, 1.0), "frechet": 12.1, "images_per_s": 20.7}
    models = report.nest([{"model": "shapes-lcm", "sampler": "lcm", "steps": 4} | row])
    report.show({"models": models, "captions": 6, "guidance_scale": 8.0})
    printed = capsys.readouterr().out
    assert "98.6%" in printed and "12.10" in printed and last.split()[-1] in printed and "…" not in printed
    assert ("position" in printed) == (last == "color attribution")


@pytest.fixture
def call(monkeypatch):
    yield from calling(monkeypatch)


def test_models_are_compared_and_an_interrupted_report_goes_on(call, tmp_path, capsys, monkeypatch):
    model, output = tiny_model.write(tmp_path / "model", unet=tiny_model.SHALLOW), tmp_path / "report"
    small = [f"--config.report.{key}={value}" for key, value in (("prompts", 7), ("reference", 6), ("batch_size", 4))]
    arguments = [f"--model={model}", f"--config.autoencoder={model}", *small, f"--output={output}"]
    call(*arguments, "--plan=ddim:2,1")
    printed = capsys.readouterr().out
    assert f"1/2  {model} ddim 2: " in printed and "; about 0:" in printed
    assert "7 held-out captions, compared with 6 held-out images of shapes" in " ".join(printed.split())
    stored = json.loads((output / "report.json").read_text())
    figures = stored["models"][str(model)]["ddim"]
    assert list(figures) == ["2", "1"] and figures["1"]["frechet"] > 0 and len(figures["1"]["tasks"]) == 6
    low, high = figures["1"]["intervals"]["frechet"]
    assert (
        low <= figures["1"]["frechet"] <= high
        and figures["1"]["intervals"]["tasks"].keys() == figures["1"]["tasks"].keys()
    )
    assert {"images_per_s", "latency_p50_s", "latency_p95_s", "peak_memory_gb", "tflop_per_image"} < figures["1"].keys()
    assert figures["2"]["tflop_per_image"] > figures["1"]["tflop_per_image"] > 0
    assert stored["settings"]["report"]["prompts"] == stored["captions"] == 7 and "device" in stored
    text = (output / "report.md").read_text()
    assert f"| {model} | ddim | 1 |" in text and stored["notes"]["frechet"] in text and report.INTERVALS in text
    for name in ("quality.png", next((output / "extremes").iterdir()).relative_to(output)):
        with Image.open(output / name) as drawn:
            assert drawn.width > 500 and np.std(np.asarray(drawn.convert("L"))) > 5

    # The same command shows it; another one is refused, as is one beside it.
    call(*arguments, "--plan=ddim:2,1")
    assert "this evaluation is complete" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"has an evaluation with config.report.seed 2, and now it is 3; use another --o"
    ):
        call(*arguments, "--plan=ddim:2,1", "--config.report.seed=3")
    with pytest.raises(ValueError, match="has an evaluation with dtype float32, and now it is bfloat16"):
        call(*arguments, "--plan=ddim:2,1", "--config.report.seed=2", "--dtype=bfloat16")

    # After a mistake in the settings, by which nothing was made, others may follow.
    empty = tmp_path / "empty"
    for wrong in ("^fid_flavour 'foo'", "^fid_flavour 'fuu'"):
        flavour = wrong.split("'")[1]
        with pytest.raises(ValueError, match=wrong):
            call(*arguments[:-1], f"--output={empty}", "--plan=ddim:1", "--metrics=fid", f"--fid_flavour={flavour}")

    # Killed while it made the second row: what is there is not made again, and the figures are the same.
    row = next((output / "images").iterdir()) / "ddim-1"
    for path in (
        output / "report.json",
        next((output / "rows").iterdir()) / "ddim-1.json",
        *list(row.glob("*.png"))[:3],
    ):
        path.unlink()
    before = {path: path.stat().st_mtime_ns for path in (output / "images").rglob("*.png")}
    call(*arguments, "--plan=ddim:2,1", "--config.report.seed=2", "--dtype=float32")
    assert "1/2" in (printed := capsys.readouterr().out) and "measured before" in printed
    after = {path: path.stat().st_mtime_ns for path in (output / "images").rglob("*.png")}
    assert len(after) == 14 == len(before) + 3 and all(after[path] == time for path, time in before.items())
    again = json.loads((output / "report.json").read_text())["models"][str(model)]["ddim"]
    speeds = {*report.SPEED}
    for n in ("1", "2"):
        assert {k: v for k, v in again[n].items() if k not in speeds} == {
            k: v for k, v in figures[n].items() if k not in speeds
        }

    # What is overwritten is the evaluation, and no more.
    (output / "keep.txt").write_text("mine")
    assert open_output(output, {"models": {}}, overwrite=True) is None
    assert sorted(path.name for path in output.iterdir()) == ["keep.txt", "lock", "settings.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan=foo:1"], "^--plan=foo:1: sampler 'foo' is not supported; use one of lcm, tcd, ddim"),
        (["--plan=ddim"], "^--plan=ddim is not supported; use SAMPLER:STEPS, such as ddim:8,50$"),
        (["--plan=ddim:4,x"], "^--plan=ddim:4,x is not supported"),
        (["--plan=ddim:4", "--plan=ddim:8"], "^--plan=ddim:8: sampler 'ddim' is given twice"),
        (["--plan=ddim:4", "--model=shapes-lcm"], "^--plan: no model supports sampler 'ddim'; remove it"),
        (["--plan=lcm:9", "--model=shapes-lcm"], "^shapes-lcm cannot sample by this plan: .*9"),
        (["--model=shapes", "--model=shapes"], "^--model=shapes is given twice"),
        (["--model=shape"], "did you mean 'shapes'"),
        (["--config.data.size=62", "--model=shapes"], "^data.size 62 is not supported by shapes; use a multiple of 4$"),
        (["--config.data.source=tra"], "^data.source 'tra' is not supported; use "),
        (["--config.data.source=tar"], "^metrics 'verifier' is not supported for data.source 'tar', as it judges capt"),
        (["--config.metrics=('fed',)"], "^metrics 'fed' is not supported; use verifier or frechet or "),
        (["--metrics=frechet,frechet"], "^metrics .* has 'frechet' twice; use it once"),
        (["--reference=somewhere"], "^--reference is of --images, which is not given; add it"),
        (["--weights_dir=nowhere"], "^--weights_dir=nowhere is not a folder"),
        (["--output=setup.cfg"], "^--output=setup.cfg is a file; use a folder$"),
        (["--config.report.prompts=1"], "^report.prompts 1 is not supported; use a whole number of at least 2$"),
        (["--config.report.promts=1"], "^--config.report.promts is not a config key; Did you mean"),
        (["--config=eval/none"], "eval/none is neither a file nor a bundled config; use one of .*eval/shapes"),
        (["--config=shapes"], "^the config has no autoencoder; copy it from a bundled config"),
    ],
)
def test_a_mistake_is_one_line_before_any_work(arguments, message, call):
    with pytest.raises(ValueError, match=message) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
