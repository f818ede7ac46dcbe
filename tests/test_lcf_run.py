"""Whole runs of latent consistency fine-tuning, from any kind of LCM, and what it refuses."""

import json

import jax
import numpy as np
import pytest
import tiny_model
from folders import write_folder
from whole_runs import load_config, shrunk

from lcm_jax.conversion import convert
from lcm_jax.pipeline import Pipeline
from lcm_jax.recipes import make_task
from lcm_jax.training.loop import train
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.model import open_model

LCM = tiny_model.SHALLOW | {"time_cond_proj_dim": 256}
TURBO = {"scheduler": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing", "prediction_type": "epsilon"}


@pytest.fixture(scope="module")
def lcm(tmp_path_factory):
    return tiny_model.write(tmp_path_factory.mktemp("models") / "lcm", unet=LCM, scheduler="LCMScheduler")


def run(config, workdir) -> bool:
    return train(make_task(config, workdir), config, workdir)


def test_an_lcm_learns_a_folder_of_images_and_resumes(lcm, tmp_path, capsys):
    settings = {"data.source": "folder", "data.folder": write_folder(tmp_path / "images"), "data.held_out": 6}
    settings |= {"report.reference": 6, "metrics": ("frechet",)}
    config = shrunk("lcf:shapes", lcm, **settings)
    config.train.steps = 1
    assert run(config, tmp_path / "first")
    config.train.steps = 2
    assert run(config, tmp_path / "whole")

    export = tmp_path / "whole" / "export"
    student, before = Pipeline.from_pretrained(export), Pipeline.from_pretrained(lcm)
    assert student.configs["scheduler"]["original_inference_steps"] == 40
    same = jax.tree.map(np.array_equal, student.params, before.params)
    assert all(jax.tree.leaves([same["vae"], same["text_encoder"]])) and not all(jax.tree.leaves(same["unet"]))
    report = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert report["init"]["lcm"].keys() == report["student"]["lcm"].keys() == {"1"}
    assert "| init | lcm | 1 |" in (tmp_path / "whole" / "report.md").read_text()
    images = student("a circle", 1, seed=3, output_type="np").images
    assert images.shape == (1, 64, 64, 3)

    # A run is an LCM as well; the single file has no tokenizer and takes it from `base`.
    again = shrunk("lcf:shapes", tmp_path / "whole", **settings)
    make_task(again, tmp_path / "again")
    convert(lcm, tmp_path / "lcm.safetensors", "ldm", log=lambda _: None)
    alone = shrunk("lcf:shapes", tmp_path / "lcm.safetensors", **settings)
    with pytest.raises(ModelError, match="no tokenizer.*--config.base"):
        make_task(alone, tmp_path / "again")
    alone.base = str(lcm)
    unet = make_task(alone, tmp_path / "again").load_params()["unet"]
    for ours, theirs in zip(jax.tree.leaves(unet), jax.tree.leaves(before.params["unet"]), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_model_without_guidance_input_is_trained_at_its_one_weight(tmp_path, capsys):
    init = tiny_model.write(tmp_path / "init", unet=tiny_model.SHALLOW, **TURBO)
    settings = {"train.steps": 1, "data.cache": str(tmp_path / "latents")}
    assert run(shrunk("lcf:shapes", init, **settings), tmp_path / "run")
    says = "has no input for the guidance weight: it is trained at the one weight"
    assert says in capsys.readouterr().out
    student = open_model(tmp_path / "run" / "export")
    assert student.configs["scheduler"]["_class_name"] == "LCMScheduler"
    assert student.configs["unet"].get("time_cond_proj_dim") is None
    assert student.index is not None and student.index["_class_name"] == "StableDiffusionPipeline"
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (
        "guidance scale 1.0 (init), 1.0 (student)" in (tmp_path / "run" / "report.md").read_text() and "init" in report
    )
    # by its LCMScheduler, such a model is an LCM, as one is that has an LCM-LoRA merged in
    make_task(shrunk("lcf:shapes", tmp_path / "run" / "export", **settings), tmp_path / "again")
    assert says in capsys.readouterr().out


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
