"""An exported generator runs in a process without this package, and gives the same bits as the pipeline."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import tiny_model
from PIL import Image
from safetensors import safe_open

from lcm_jax.pipeline import Pipeline
from lcm_jax.weights.errors import ModelError

PROMPTS = ["a red circle above a blue square", "a green cross"]
# run.py as a user starts it, where importing this package fails.
WITHOUT = "import runpy, sys; sys.modules['lcm_jax'] = None; runpy.run_path(sys.argv.pop(1), run_name='__main__')"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return Pipeline.from_pretrained(
        tiny_model.write(tmp_path_factory.mktemp("models") / "model", unet=tiny_model.SHALLOW)
    )


@pytest.fixture(scope="module")
def exported(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "teacher"
    pipe.export(folder, batch_size=2, size=(32, 16), steps=2, guidance_scale=3.0, sampler="lcm")
    return folder


def run_alone(folder, cwd, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # As conftest.py has it here: a CPU that is split into several devices rounds differently.
    environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_NUM_CPU_DEVICES": "8"}
    command = [sys.executable, "-c", WITHOUT, str(folder / "run.py"), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def test_it_runs_alone_and_gives_the_same_bits(pipe, exported, tmp_path):
    done = run_alone(exported, tmp_path, *(f"--prompt={prompt}" for prompt in PROMPTS), "--seed=5")
    assert done.returncode == 0, done.stderr
    expected = pipe(PROMPTS, 2, 3.0, seed=5, height=32, width=16, sampler="lcm").images
    for name, image in zip(("image.png", "image-1.png"), expected, strict=True):
        np.testing.assert_array_equal(Image.open(tmp_path / name), image)
    long = run_alone(exported, tmp_path, f"--prompt={'a green cross ' * 12}", "--output=long.png")
    assert long.returncode == 1 and re.fullmatch(
        r"prompt 'a green cross .*' has \d+ tokens; use at most 20, begin and end included\n", long.stderr
    )
    again = run_alone(exported, tmp_path, f"--prompt={PROMPTS[0]}")
    assert again.returncode == 1 and again.stderr == "image.png exists already; use another --output\n"


def test_the_folder_describes_itself(pipe, exported):
    about = json.loads((exported / "export.json").read_text())
    assert (about["batch_size"], about["height"], about["width"], about["num_inference_steps"]) == (2, 32, 16, 2)
    assert about["sampler"] == "lcm" and about["guidance_scale"] == 3.0 and about["negative_prompt"]
    assert (
        about["platforms"] == ["cpu"] and about["programs"]["images.stablehlo"]["inputs"]["token_ids"] == "int32[2,20]"
    )
    with safe_open(exported / "parameters.safetensors", "np") as file:
        kernel = file.get_tensor("unet.conv_in.kernel")
    np.testing.assert_array_equal(kernel, pipe.params["unet"]["conv_in"]["kernel"])
    names = {path.name for path in exported.iterdir()}
    assert names == {
        "export.json",
        "images.stablehlo",
        "noise.stablehlo",
        "parameters.safetensors",
        "run.py",
        "table.safetensors",
        "tokenizer.json",
    }


def test_what_an_export_cannot_be_is_named(pipe, exported, tmp_path):
    before = sorted(exported.iterdir())
    with pytest.raises(ModelError, match="teacher exists already; use another folder"):
        pipe.export(exported)
    assert sorted(exported.iterdir()) == before
    for arguments, message in (
        ({"platforms": ["gpu"]}, "platforms has 'gpu'; use cpu, cuda, rocm, tpu"),
        ({"batch_size": 0}, "batch_size is 0; use 1 or more"),
        ({"steps": 2.5}, "steps is 2.5; use an integer"),
        ({"size": 30}, "height and width are 30 and 30; use multiples of 4"),
        ({"sampler": "foo"}, "sampler is 'foo'; choose"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.export(tmp_path / "other", **arguments)
    assert not list(tmp_path.iterdir())
