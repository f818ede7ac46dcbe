"""configs/lcd.py: the published settings, and each of its models in small, from shards to an exported student."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import reference_families
from PIL import Image
from shards import write_shards
from whole_runs import load_config, shrunk_published

from lcm_jax import main
from lcm_jax.models.families import FAMILIES
from lcm_jax.models.stable_diffusion import StableDiffusion, frozen_dtype
from lcm_jax.pipeline import Pipeline
from lcm_jax.recipes import RECIPES
from lcm_jax.training.loop import train
from lcm_jax.training.step import make_loss

diffusers = pytest.importorskip("diffusers")

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("sd15", "sd21", "sd21-768", "sdxl", "ssd1b")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    return write_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The real command in this process: its flags, a config file and `main`."""

    def call(name: str, teacher: Path, shards: str, workdir: Path) -> None:
        (tmp_path / "shrunk.py").write_text(
            f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\nimport whole_runs\n"
            f"get_config = lambda name: whole_runs.shrunk_published(name, {str(teacher)!r}, {shards!r})\n"
        )
        config = f"--config={tmp_path / 'shrunk.py'}:{name}"
        monkeypatch.setattr("sys.argv", ["main", config, f"--workdir={workdir}"])
        main.main()

    yield call
    main.FLAGS.unparse_flags()


def test_the_published_settings():
    """METHOD's table: what the paper and the public scripts trained with."""
    for name in NAMES:
        config, paper = load_config("lcd", name), name.startswith("sd21")
        assert config.family in FAMILIES and config.objective.num_ddim_steps == 50
        assert (config.train.steps, config.train.ema_rate) == ((100_000, 0.999943) if paper else (1000, 0.95))
        assert config.optimizer.learning_rate == (8e-6 if paper else 1e-6)
        assert config.objective.distance == ("l2" if paper else "huber") and config.train.dtype == "bfloat16"
        expected = (2, 14) if paper else (5, 15) if name == "sd15" else (3, 15)
        assert (config.objective.w_min, config.objective.w_max) == expected
        latents = FAMILIES[name]["unet"]["sample_size"]
        assert config.data.size == 8 * latents, "the size that the teacher was trained on"
    assert [load_config("lcd", name).train.batch_size for name in ("sd21", "sd21-768")] == [72, 16]
    with pytest.raises(ValueError, match="'sd3'; choose one of sd15, sd21"):
        load_config("lcd", "sd3")


@pytest.fixture
def teacher_of(tmp_path, monkeypatch):
    def write(name: str) -> Path:
        monkeypatch.setitem(reference_families.FAMILIES, name, reference_families.PUBLISHED[name])
        (tmp_path / "tokenizers").mkdir()
        reference_families.build(tmp_path / "tokenizers", name).save_pretrained(tmp_path / "teacher")
        return tmp_path / "teacher"

    return write


@pytest.mark.parametrize("name", ["sd15", "sd21", "sd21-768", "ssd1b"])
def test_each_model_in_small_trains_two_steps_from_shards(name, teacher_of, shards, tmp_path):
    config = shrunk_published(name, teacher_of(name), shards)
    steps = []
    task = RECIPES["lcd"](config, tmp_path / "run")
    task = replace(task, write_preview=lambda *_: {}, on_complete=lambda ema, frozen, seconds: steps.append(seconds))
    assert train(task, config, tmp_path / "run") and len(steps) == 1
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == [1, 2] and all(np.isfinite(line["loss"]) for line in trained)
    assert trained[0]["gradient_norm"] > 0


def test_a_model_in_small_from_shards_to_a_student(teacher_of, command, shards, tmp_path, capsys):
    teacher = teacher_of("sdxl")
    command("sdxl", teacher, shards, tmp_path / "run")
    output = capsys.readouterr().out
    assert "24 records in 2 shards" in output
    assert "00.tar" in output or "01.tar" in output, "the damaged record was reported"

    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == [1, 2] and all(np.isfinite(line["loss"]) for line in trained)
    assert trained[0]["gradient_norm"] > 0 and [line["step"] for line in lines if "frechet@1" in line] == [0, 2]
    for picture in ("000002.png", "final.png"):
        assert (tmp_path / "run" / "samples" / picture).stat().st_size > 500
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["captions"] == 2
    for figures in (report["teacher"]["ddim"]["2"], report["student"]["lcm"]["1"]):
        assert figures.keys() == {"frechet", "intervals", "images_per_s", "latency_p50_s", "latency_p95_s"}, (
            "nothing judges these pictures"
        )
        assert figures["frechet"] >= 0
    text = (tmp_path / "run" / "report.md").read_text()
    assert "| model | sampler | steps | Frechet | images/s |" in text and "verifier" not in text

    student, taught = Pipeline.from_pretrained(tmp_path / "run" / "export"), Pipeline.from_pretrained(teacher)
    assert student.configs["unet"]["time_cond_proj_dim"] == 256 and student.sampler == "lcm"
    kept = [n for n in student.params if n != "unet"]
    assert kept == [n for n in taught.params if n != "unet"] and len(kept) == 3
    for network in kept:
        same = jax.tree.map(np.array_equal, student.params[network], taught.params[network])
        assert all(jax.tree.leaves(same)), f"{network} is the teacher's"
    assert Image.open(tmp_path / "run" / "samples" / "final.png").size == (110 + 2 * 16, 2 * 16)


def test_a_step_that_encodes_equals_one_from_a_cache(teacher_of, tmp_path):
    """SDXL: the same draws and the same loss, dropped prompts included, and the sizes come as (height, width)."""
    given = ("sdxl", teacher_of("sdxl"), write_shards(tmp_path / "shards", damaged=-1))
    config = shrunk_published(*given, **{"train.dtype": "float32"})
    task = RECIPES["lcd"](config, tmp_path / "run")
    frozen = task.load_frozen()
    batch = next(task.make_batches(0))
    assert batch["image"].shape == (4, 16, 16, 3) and batch["image"].dtype == np.uint8
    assert batch["token_ids"].shape[:2] == (4, 2)
    assert batch["time_ids"][:, [0, 1, 2, 4, 5]].tolist() == [[24, 40, 0, 16, 16]] * 4
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        name: (x.shape, x.dtype) for name, x in task.batch.items()
    }, "what is read is what the step is compiled for"

    cached = RECIPES["lcd"](shrunk_published(*given, **{"data.encode": "cache"}), tmp_path)
    assert cached.encode_data is not None and task.encode_data is None
    cached.encode_data()
    held = cached.load_frozen()
    assert held.keys() == {"unet", "vae", "empty_prompt"} and held["empty_prompt"].keys() == {"context", "pooled"}
    stored = next(cached.make_batches(0))
    for ours, abstract in ((held, cached.frozen), (stored, cached.batch)):
        assert jax.tree.map(lambda x: (x.shape, x.dtype), ours) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    np.testing.assert_array_equal(stored["time_ids"], batch["time_ids"])
    model = StableDiffusion.from_configs(Pipeline.from_pretrained(config.teacher).configs)
    moments = jax.jit(model.encode)(frozen["vae"], batch["image"] / np.float32(127.5) - 1)
    np.testing.assert_allclose(np.float32(stored["moments"]), moments, rtol=2**-8, atol=1e-6)

    draws = task.objective.draw(jax.random.key(3), task.latents(task.batch))
    draws = draws._replace(keep_prompt=np.array([True, False, True, True]))
    params = task.load_params()
    online = jax.jit(task.prepare)(params, frozen, batch, draws)
    read = jax.jit(cached.prepare)(params, held, stored, draws)
    for name in ("context", "pooled", "time_ids"):
        for mine, theirs in zip((read.prompt, read.empty), (online.prompt, online.empty), strict=True):
            np.testing.assert_allclose(getattr(mine, name), getattr(theirs, name), rtol=2**-8, atol=1e-6)
        np.testing.assert_array_equal(getattr(read.prompt, name)[1], getattr(read.empty, name)[1])
    losses = [
        jax.jit(make_loss(each.objective, each.bind, each.prepare))(params, params, *given, draws)[0]
        for each, given in ((task, (frozen, batch)), (cached, (held, stored)))
    ]
    np.testing.assert_allclose(*losses, rtol=2e-3)


def test_a_frozen_network_that_holds_half_precision_computes_the_same(teacher_of, tmp_path):
    """Bit for bit: it casts its matrices before each use, and its norms keep float32."""
    pipe = Pipeline.from_pretrained(teacher_of("sdxl"), "bfloat16")
    full = jax.tree.map(lambda p: np.asarray(p, np.float32), pipe.params)
    cast = frozen_dtype("bfloat16")
    half = jax.tree.map(lambda p: p.astype(cast(p)), full)
    rng = np.random.default_rng(0)
    z, t = rng.standard_normal((2, 8, 8, 4)).astype(np.float32), np.array([999, 19])
    ids, sizes = pipe.tokenize(["a red circle", ""]), np.full((2, 6), 16, np.float32)

    @jax.jit
    def everything(params):
        context = pipe.model.encode_prompt(params, ids, sizes)
        image = z[:, :, :, :3]
        return context, pipe.model.denoise(params["unet"], z, t, context), pipe.model.encode(params["vae"], image)

    assert {leaf.dtype.name for leaf in jax.tree.leaves(half["unet"])} == {"bfloat16", "float32"}
    jax.tree.map(np.testing.assert_array_equal, everything(full), everything(half))
