"""Whole runs of small models to what they leave behind, and mistakes in the command."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_model
from tensorboardX.proto import event_pb2
from whole_runs import QUICK, ROOT, SHRUNK, load_config, shrunk_lcd

from lcm_jax.conversion import convert
from lcm_jax.pipeline import Pipeline
from lcm_jax.recipes import RECIPES, make_task
from lcm_jax.training.logging import read_previews
from lcm_jax.training.loop import RunError, train
from lcm_jax.training.step import make_loss
from lcm_jax.weights import diffusers_folder as folders
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.model import open_model
from lcm_jax.weights.preset import Preset


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return tiny_model.write(tmp_path_factory.mktemp("models") / "teacher", unet=tiny_model.SHALLOW)


def run(config, workdir: Path) -> bool:
    return train(make_task(config, workdir), config, workdir)


def board(folder: Path) -> dict[tuple[int, str], float]:
    """The scalars of TensorBoard's event files, by step and name."""
    found = {}
    for file in folder.iterdir():
        data, at = file.read_bytes(), 0
        while at < len(data):  # a record: its length, a checksum of four bytes, itself, another checksum
            length = int.from_bytes(data[at : at + 8], "little")
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            found |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
            at += 16 + length
    return found


def test_a_distillation_leaves_a_student_and_a_report(teacher, tmp_path, capsys):
    config = shrunk_lcd(teacher, **QUICK)
    config.sample.every_steps, config.checkpoint.best = 1, "frechet@2"
    assert run(config, tmp_path / "run")
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert set(report["teacher"]) == {"ddim", "dpmsolver++"} and set(report["student"]["lcm"]) == {"1", "2"}
    for figures in [*report["teacher"]["ddim"].values(), *report["student"]["lcm"].values()]:
        assert 0 <= figures["verifier"] <= 1 and len(figures["tasks"]) == 6
        assert figures["frechet"] >= 0 and figures["images_per_s"] > 0
    composition = report["composition"]
    assert composition["captions"] == 1 and composition["teacher"]["ddim"].keys() == {"2"}
    assert composition["student"]["lcm"].keys() == {"1", "2"} and 0 <= composition["student"]["lcm"]["2"] <= 1
    assert "no training image has, 1 captions: teacher ddim 2" in (tmp_path / "run" / "report.md").read_text()
    assert report["versions"]["jax"] == jax.__version__ and report["device"] and len(report["config_digest"]) == 64
    assert "| teacher | ddim | 2 |" in (tmp_path / "run" / "report.md").read_text()
    previews = read_previews(tmp_path / "run")
    assert [each["step"] for each in previews] == [0, 1, 2]
    best = min(previews, key=lambda each: each["frechet@2"])
    assert report["checkpoints"] == {
        "figure": "frechet@2",
        "folder": str(tmp_path / "run" / "best"),
        "best": {"step": best["step"], "value": best["frechet@2"]},
        "last": {"step": 2, "value": previews[-1]["frechet@2"]},
    }
    assert f"at step {best['step']} ({tmp_path / 'run' / 'best'}); last: " in printed
    assert "Best frechet@2 of the previews: " in (tmp_path / "run" / "report.md").read_text()
    # Of its previews and the w that it was distilled for; an LCM of this kind is sampled in 4 steps, or what is near.
    preset = Preset("lcm", 2, config.sample.guidance_scale, (config.objective.w_min + 1, config.objective.w_max + 1))
    assert open_model(tmp_path / "run" / "export").preset == open_model(tmp_path / "run").preset == preset
    opened = open_model(tmp_path / "run" / "best")
    assert opened.name.endswith(f"the EMA target at step {best['step']}") and "unet" in opened.tensors
    assert (tmp_path / "run" / "curve.png").stat().st_size > 1000
    for name in ("000000.png", "000001.png", "000002.png", "final.png"):
        assert (tmp_path / "run" / "samples" / name).stat().st_size > 1000
    scalars = board(tmp_path / "run" / "tensorboard")
    for line in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()):
        for name in line.keys() - {"step"}:
            np.testing.assert_allclose(scalars[line["step"], name], line[name], rtol=1e-5)
    figures = {f"{name}@{n}" for name in ("verifier", "frechet") for n in (1, 2)}
    assert {"loss", "images_per_second", "preview_seconds", *figures} <= {name for _, name in scalars}

    student = Pipeline.from_pretrained(tmp_path / "run" / "export")
    assert student.configs["scheduler"]["_class_name"] == "LCMScheduler"
    assert student.configs["unet"]["time_cond_proj_dim"] == 256
    assert np.abs(student.params["unet"]["time_embedding"]["cond_proj"]["kernel"]).max() > 0, "w was learnt"
    taught = Pipeline.from_pretrained(teacher)
    for name in ("vae", "text_encoder"):
        same = jax.tree.map(np.array_equal, student.params[name], taught.params[name])
        assert all(jax.tree.leaves(same)), f"{name} is the teacher's"

    capsys.readouterr()
    assert run(config, tmp_path / "run"), "a finished run may be started again"
    assert "this run is complete" in capsys.readouterr().out
    export = (tmp_path / "run" / "export").stat().st_mtime_ns
    config.report.update({"guidance_scale": 2.0, "teacher": {"ddim": (1,)}, "student": {"lcm": (1,)}})
    config.sample.student_steps = ()
    task = make_task(config, tmp_path / "run")
    frozen = task.load_frozen()
    task.on_complete(
        {"unet": student.params["unet"]}, frozen, 1.0
    )  # other settings of the report: a new one, of the same export
    assert f"report.guidance_scale is 8.0 in {tmp_path / 'run' / 'report.json'} and 2.0" in capsys.readouterr().out
    again = json.loads((tmp_path / "run" / "report.json").read_text())
    assert again["guidance_scale"] == 2.0 and again["settings"]["prompts"] == 6 and again != report
    assert (tmp_path / "run" / "export").stat().st_mtime_ns == export
    (tmp_path / "run" / "report.json").write_text("{")
    with pytest.raises(RunError, match="report.json is damaged .*delete it, and the same command makes it again"):
        task.on_complete({}, frozen, 1.0)
    (tmp_path / "run" / "report.json").unlink()
    tokenizer = (teacher / "tokenizer").rename(teacher / "elsewhere")
    with pytest.raises(RunError, match="tokenizer is gone, .*; put it back, and run the same command: the checkpoints"):
        task.on_complete({"unet": student.params["unet"]}, frozen, 1.0)
    tokenizer.rename(teacher / "tokenizer")
    refused = main("--config=configs/shapes.py", f"--workdir={tmp_path / 'run'}")
    assert refused.returncode == 1 and len(refused.stderr.strip().splitlines()) <= 2
    assert "was created with a different config: data.cache" in refused.stderr

    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    client = diffusers.LatentConsistencyModelPipeline.from_pretrained(tmp_path / "run" / "export")
    client.set_progress_bar_config(disable=True)
    latents = np.random.default_rng(3).standard_normal((1, 16, 16, 4)).astype(np.float32)
    arguments = {"num_inference_steps": 1, "guidance_scale": 4.0, "output_type": "np"}
    prompt = "a red circle above a blue square"
    theirs = client(prompt, latents=torch.tensor(latents.transpose(0, 3, 1, 2)), **arguments).images
    ours = student(prompt, latents=latents, **arguments).images
    assert np.abs(theirs - ours).max() * 255 <= 2 and np.std(ours) > 0.01


def test_a_teacher_is_trained_on_a_trained_autoencoder(tmp_path):
    vae = load_config("shapes_vae")
    vae.update_from_flattened_dict(
        SHRUNK
        | QUICK
        | {"vae.block_out_channels": (8, 8, 8), "vae.norm_num_groups": 4, "sample.every_steps": 2, "sample.images": 4}
    )
    assert run(vae, tmp_path / "vae")
    exported = json.loads((tmp_path / "vae" / "export" / "vae" / "config.json").read_text())
    assert exported["scaling_factor"] not in (1.0, 0.18215) and (tmp_path / "vae" / "samples" / "000002.png").exists()

    vae.init = str(tmp_path / "vae" / "export")
    begun = RECIPES["autoencoder"](vae, tmp_path / "more").load_params()
    stored = folders.read_component(tmp_path / "vae" / "export", "vae")[1]
    assert stored["decoder.conv_in.bias"].tolist() == begun["decoder"]["conv_in"]["bias"].tolist()
    vae.vae.block_out_channels = (8, 8, 16)
    with pytest.raises(ModelError, match="the weights do not fit the network"):
        RECIPES["autoencoder"](vae, tmp_path / "more").load_params()

    config = load_config("shapes_teacher")
    config.update_from_flattened_dict(
        SHRUNK
        | QUICK
        | {
            "autoencoder": str(tmp_path / "vae" / "export"),
            "unet.block_out_channels": (16,),
            "unet.down_block_types": ("CrossAttnDownBlock2D",),
            "unet.up_block_types": ("CrossAttnUpBlock2D",),
            "unet.norm_num_groups": 4,
            "text_encoder.hidden_size": 16,
            "text_encoder.num_hidden_layers": 1,
            "sample.every_steps": 2,
            "sample.prompts": 6,
            "sample.steps": 2,
            "sample.batch_size": 6,
        }
    )
    assert run(config, tmp_path / "teacher")
    pipe = Pipeline.from_pretrained(tmp_path / "teacher" / "export")
    assert pipe("a red circle", num_inference_steps=2).images[0].size == (64, 64)
    tensors = open_model(tmp_path / "teacher" / "export").tensors
    assert {tensor.dtype.name for tensor in tensors["unet"].values()} == {"float16"}
    lines = [json.loads(line) for line in (tmp_path / "teacher" / "metrics.jsonl").read_text().splitlines()]
    assert {"verifier@2", "verifier/counting@2"} <= lines[-1].keys() and (tmp_path / "teacher/curve.png").exists()
    assert (tmp_path / "vae" / "curve.png").exists()


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"data.size": 62}, "data.size 62 is not supported; use a multiple of 4"),
        ({"train.batch_size": 12, "mesh.data": 8}, "train.batch_size 12 is not a multiple"),
        ({"train.batch_size": 64}, "the data has 32 records, fewer than train.batch_size 64"),
        ({"objective.distance": "l3"}, "objective.distance 'l3' is not supported; use l2 or huber"),
        ({"objective.backward_simulation": 0.01}, "objective.backward_simulation 0.01 is less than one example"),
        ({"objective.guidance_schedule": ((0, 0.0), (1000, 7.0))}, "guidance_schedule .*1000.* timesteps in 0..999"),
        ({"objective.guidance_schedule": ((300, 7.0), (300, 4.5))}, "guidance_schedule .* rising timesteps"),
        ({"objective.guidance_schedule": (300, 7.0)}, "objective.guidance_schedule .*pairs"),
        ({"objective.guidance_schedule": (("300", 7.0),)}, "guidance_schedule .*'300'.* is not supported; use numbers"),
        ({"objective.num_ddim_steps": 7}, "num_ddim_steps is 7, which does not divide"),
        ({"optimizer.name": "sgd"}, "optimizer.name is 'sgd'; choose adamw, muon or adafactor"),
        ({"optimizer.schedule": "linear"}, "optimizer.schedule is 'linear'"),
    ],
)
def test_a_mistake_in_a_config_does_not_claim_the_workdir(mistake, message, teacher, tmp_path):
    with pytest.raises((RunError, ValueError), match=message):
        run(shrunk_lcd(teacher, **mistake), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists() and not (tmp_path / "run" / "checkpoints").exists()


def test_the_width_of_the_guidance_input_is_free(teacher, tmp_path):
    task = RECIPES["lcd"](shrunk_lcd(teacher, **{"student.guidance_embedding_dim": 64}), tmp_path / "run")
    assert len(task.weight_digests()["teacher's unet"]) == 64, "by which a run knows its teacher again"
    loaded = task.load_params(), task.load_frozen()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), loaded)
    assert shapes == (task.params, task.frozen), "what is loaded is what the step is compiled for"
    assert task.params["unet"]["time_embedding"]["cond_proj"]["kernel"].shape[0] == 64
    draws = jax.eval_shape(lambda key: task.objective.draw(key, task.latents(task.batch)), jax.random.key(0))
    loss = make_loss(task.objective, task.bind, task.prepare)
    assert jax.eval_shape(loss, task.params, task.params, task.frozen, task.batch, draws)[0].shape == ()


def test_the_guidance_input_begins_at_zero_or_with_the_spread_of_the_public_scripts(teacher, tmp_path):
    def load(**more) -> np.ndarray:
        task = RECIPES["lcd"](shrunk_lcd(teacher, **more), tmp_path / "run")
        return np.asarray(task.load_params()["unet"]["time_embedding"]["cond_proj"]["kernel"])

    normal = {"student.guidance_embedding_init": "normal"}
    assert not load().any()
    np.testing.assert_allclose(load(**normal).std(), (3 * 256) ** -0.5, rtol=0.05)
    np.testing.assert_array_equal(load(**normal), load(**normal))
    assert (load(**normal) != load(**normal, **{"train.seed": 1})).any()


def test_what_cannot_be_a_teacher_is_refused(tmp_path):
    config = load_config("shapes")
    config.teacher = "shapes-lcm"
    with pytest.raises(ValueError, match="teacher 'shapes-lcm' is already a latent consistency model; use its own"):
        RECIPES["lcd"](config, Path())
    convert("shapes", tmp_path / "a.safetensors", "ldm")
    config.teacher = str(tmp_path / "a.safetensors")
    with pytest.raises(
        ModelError, match="has no tokenizer; .*: set --config.base to it, or convert .* to a folder by lcm_jax.convert"
    ):
        RECIPES["lcd"](config, Path())


@pytest.mark.parametrize(("key", "value"), [("data.encode", "cache"), ("data.size", 30)])
def test_what_an_autoencoder_cannot_be_trained_on_is_refused(key, value):
    config = load_config("shapes_vae")
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=f"^{key} {value!r} is not supported"):
        RECIPES["autoencoder"](config, Path())


def test_the_main_job_reports_on_both_samplers_at_every_number_of_steps():
    report = load_config("shapes").report.to_dict()
    planned = {sampler: steps for sampler, steps in report["teacher"].items() if steps}
    assert planned == {"ddim": (1, 2, 4, 8, 50), "dpmsolver++": (1, 2, 4, 8, 50)}
    assert report["student"] == {"lcm": (1, 2, 4, 8)}


def main(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "lcm_jax.main", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=120
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/shapes.py", "--workdir=W", "--config.train.stps=3"], 'Did you mean "steps"'),
        (
            ["--config=configs/shapes.py", "--workdir=W", "--config.train.pace=3"],
            "--config.train.pace is not a config key; see",
        ),
        (["--config=configs/none.py", "--workdir=W"], "configs/none.py"),
        (["--config=configs/shapes.py", "--workdir=W", "--config.train.steps=few"], "few"),
        (["--config=configs/shapes.py"], "--workdir"),
        (["--config=configs/shapes.py", "--workdir=W", "--config.teacher=shape"], "did you mean 'shapes'?"),
        (["--config=configs/shapes.py", "--workdir=W", "--config.teacher=configs"], "model_index.json"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(arguments, message, tmp_path):
    done = main(*(a.replace("=W", f"={tmp_path / 'run'}") for a in arguments))
    assert done.returncode != 0
    assert message in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2
    assert not (tmp_path / "run").exists()
