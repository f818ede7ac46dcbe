"""Whole runs of latent consistency fine-tuning, from any kind of LCM, and what it refuses."""

import json

import jax
import numpy as np
import pytest
import tiny_model
from folders import write_folder
from running import run, run_until, run_without_images, trace_loss
from whole_runs import load_config, shrunk

from lcm_jax.conversion import convert
from lcm_jax.pipeline import Pipeline
from lcm_jax.recipes import make_task
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.model import open_model

LCM = tiny_model.SHALLOW | {"time_cond_proj_dim": 256}
TURBO = {"scheduler": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing", "prediction_type": "epsilon"}
NO_GUIDANCE = "has no input for the guidance weight: it is trained at the one weight"


@pytest.fixture(scope="module")
def lcm(tmp_path_factory):
    return tiny_model.write(tmp_path_factory.mktemp("models") / "lcm", unet=LCM, scheduler="LCMScheduler")


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key in ours:
        np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)


def test_an_lcm_learns_a_folder_of_images_and_resumes_exactly(lcm, tmp_path, capsys):
    settings = {"data.source": "folder", "data.folder": write_folder(tmp_path / "images"), "data.held_out": 6}
    settings |= {"report.reference": 6, "metrics": ("frechet",), "data.cache": str(tmp_path / "latents")}
    config = shrunk("lcf:shapes", lcm, **settings)
    run_until(config, tmp_path / "run", 1)
    capsys.readouterr()
    assert run_without_images(config, tmp_path / "run")
    printed = capsys.readouterr().out
    assert f"resumed {tmp_path / 'run'} at step 1" in printed and NO_GUIDANCE not in printed
    student, before = open_model(tmp_path / "run"), open_model(lcm)
    assert student.configs["scheduler"]["original_inference_steps"] == 40
    trained, stored = student.tensors["unet"], before.tensors["unet"]
    assert all(not np.array_equal(trained[key], stored[key]) for key in stored)

    # The same LCM as a single file has no tokenizer and takes it from `base`: the same run, bit-exact, at once.
    convert(lcm, tmp_path / "lcm.safetensors", "ldm", log=lambda _: None)
    alone = shrunk("lcf:shapes", tmp_path / "lcm.safetensors", **settings)
    with pytest.raises(ModelError, match="no tokenizer.*set --config.base to it, or convert"):
        make_task(alone, tmp_path / "whole")
    alone.base = str(lcm)
    assert run_without_images(alone, tmp_path / "whole")
    whole = open_model(tmp_path / "whole")  # which has no export: the rest is that file's and its base's
    assert whole.name.endswith("the EMA target at step 2") and whole.tokenizer == lcm / "tokenizer"
    assert_same(whole.tensors["unet"], student.tensors["unet"])
    grids = {each.configs["scheduler"]["original_inference_steps"] for each in (whole, student)}
    assert grids == {config.objective.num_ddim_steps}

    # A run is an LCM as well, and one that began from it too.
    task = make_task(shrunk("lcf:shapes", tmp_path / "whole", **settings), tmp_path / "again")
    assert task.weight_digests().keys() == {"init's unet", "init's vae", "init's text_encoder"}
    begun = json.loads((tmp_path / "whole" / "config.json").read_text())
    (tmp_path / "whole" / "config.json").write_text(json.dumps(begun | {"init": str(tmp_path / "whole")}))
    with pytest.raises(ModelError, match="whole and .*whole began from each other") as error:
        open_model(tmp_path / "whole")
    assert "pass it as base (--base)" in str(error.value)
    assert_same(open_model(tmp_path / "whole", base=lcm).tensors["unet"], whole.tensors["unet"])


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")  # it has steps_offset 0
def test_a_model_without_guidance_input_is_trained_at_its_one_weight(tmp_path, capsys):
    init = tiny_model.write(tmp_path / "init", unet=tiny_model.SHALLOW, **TURBO)
    settings = {"train.steps": 1, "data.cache": str(tmp_path / "latents"), "metrics": ("frechet",)}
    assert run(shrunk("lcf:shapes", init, **settings), tmp_path / "run")
    assert NO_GUIDANCE in capsys.readouterr().out
    export = tmp_path / "run" / "export"
    student = Pipeline.from_pretrained(export)
    assert student.configs["scheduler"]["_class_name"] == "LCMScheduler" and student.sampler == "lcm"
    assert student.configs["unet"].get("time_cond_proj_dim") is None
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["guidance_scales"] == {"init": 1.0, "student": 1.0}
    assert report["init"]["lcm"].keys() == report["student"]["lcm"].keys() == {"1"}
    assert "| init | lcm | 1 |" in (tmp_path / "run" / "report.md").read_text()
    assert (tmp_path / "run" / "samples" / "final.png").stat().st_size > 1000
    before = Pipeline.from_pretrained(init)
    same = jax.tree.map(np.array_equal, student.params, before.params)
    assert all(jax.tree.leaves([same["vae"], same["text_encoder"]])) and not all(jax.tree.leaves(same["unet"]))

    # By its LCMScheduler, such a model is an LCM, as one is that has an LCM-LoRA merged in. Adapters of it are LCF too.
    again = shrunk("lcf:shapes", export, **settings)
    with again.unlocked():
        again.lora = shrunk("lcm_lora:shapes", export).lora
    task = make_task(again, tmp_path / "again")
    assert NO_GUIDANCE in capsys.readouterr().out
    trace_loss(task)
    assert task.params.keys() == {"lora"} and "unet" in task.frozen

    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    client = diffusers.DiffusionPipeline.from_pretrained(export)
    assert type(client) is diffusers.StableDiffusionPipeline
    client.set_progress_bar_config(disable=True)
    latents = np.random.default_rng(3).standard_normal((1, 16, 16, 4)).astype(np.float32)
    arguments = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "np"}
    theirs = client("a red circle", latents=torch.tensor(latents.transpose(0, 3, 1, 2)), **arguments).images
    ours = student("a red circle", latents=latents, **arguments).images
    assert np.abs(theirs - ours).max() * 255 <= 2 and np.std(ours) > 0.01


def test_models_of_the_wrong_kind_are_named(lcm, tmp_path):
    teacher = tiny_model.write(tmp_path / "teacher", unet=tiny_model.SHALLOW)
    with pytest.raises(
        ValueError, match="init '.*teacher' is not a latent consistency model: .*DDIMScheduler; distill"
    ):
        make_task(shrunk("lcf:shapes", teacher), tmp_path / "run")
    for name in ("lcm_lora:shapes", "shapes_style_lora", "finetune:shapes"):
        with pytest.raises(ValueError, match="teacher '.*lcm' is .*a latent consistency model; "):
            make_task(shrunk(name, lcm), tmp_path / "run")
    fine = shrunk("finetune:shapes", teacher)
    with fine.unlocked():
        fine.objective.prediction_type = "epsilon"
    with pytest.raises(ValueError, match="objective.prediction_type is not supported for fine-tuning"):
        make_task(fine, tmp_path / "run")
    with pytest.raises(ValueError, match="'sd3' is not supported; use shapes, sd15, sdxl"):
        load_config("lcf", "sd3")
    assert not (tmp_path / "run").exists()
