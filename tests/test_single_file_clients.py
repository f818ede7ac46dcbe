"""Single files and their real client: diffusers' from_single_file loads what the command writes, pictures agree.

diffusers tells the family of a file by keys and widths that only a model in its full size has (a text of width 1024 in
2.x, the second encoder's tenth layer in XL), and then fetches that family's configs. A small model names its own with
`config=`, a folder: here one without weights, so that every number comes from the file. What diffusers tells of files
in full size is tested by their shapes, in test_single_file.py.
"""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference_families
from numbered_noise import draw_noise
from reference_families import PROMPTS, to_torch
from reference_single_file import SMALL, build
from transformers import CLIPTokenizer

import lcm_jax
from lcm_jax.data import tokenizer as tokenizers

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

ROOT = Path(__file__).resolve().parent.parent
LATENTS = (2, 8, 12, 4)
SIZE = {"height": 64, "width": 96}
DDIM = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
SCHEDULERS = {
    "sd1": diffusers.DDIMScheduler(**reference_families.SCHEDULE, **DDIM),
    "sd2": diffusers.DDIMScheduler(**reference_families.SCHEDULE, **DDIM, prediction_type="v_prediction"),
    "sdxl": diffusers.EulerDiscreteScheduler(**reference_families.SCHEDULE, timestep_spacing="leading", steps_offset=1),
}
KINDS = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}


def small(folder: Path, family: str) -> diffusers.DiffusionPipeline:
    """A random pipeline with the levels, layers and kinds of blocks of the family's published models."""
    torch.manual_seed(0)
    text = {"vocab_size": 1000, "max_position_embeddings": reference_families.LENGTH, "eos_token_id": 2}
    networks = {
        name: build(config | (text if name.startswith("text") else {})).eval() for name, config in SMALL[family].items()
    }
    tokenizers.build(reference_families.WORDS, folder / "first", model_max_length=reference_families.LENGTH)
    parts = networks | {
        "tokenizer": CLIPTokenizer.from_pretrained(str(folder / "first")),
        "scheduler": SCHEDULERS[family],
    }
    if family == "sdxl":
        second = CLIPTokenizer.from_pretrained(str(folder / "first"), pad_token="!")
        pipe = diffusers.StableDiffusionXLPipeline(**parts, tokenizer_2=second, add_watermarker=False)
    else:
        pipe = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    return pipe


@pytest.fixture(scope="module", params=SCHEDULERS)
def model(request, tmp_path_factory):
    """(diffusers' pipeline, the folder it wrote, that folder without weights, the single file of it that we wrote)"""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = small(folder, request.param)
    theirs.save_pretrained(folder / "model")
    shutil.copytree(folder / "model", folder / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    file = folder / "model.safetensors"
    convert(folder / "model", file)
    return theirs, folder / "model", folder / "configs", file


def convert(source: Path, target: Path, *more: str, to: str = "ldm") -> None:
    command = ["-m", "lcm_jax.convert", f"--input={source}", f"--output={target}", f"--format={to}", *more]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def warnings_of_diffusers(caplog):
    """What its loggers say: of missing keys or ones left over, among others."""
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    yield lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    logger.removeHandler(caplog.handler)


def assert_same_weights(found, expected):
    found, expected = found.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


def test_diffusers_loads_the_whole_file(model, warnings_of_diffusers):
    theirs, folder, configs, file = model
    loaded = type(theirs).from_single_file(str(file), config=str(configs), local_files_only=True)
    assert warnings_of_diffusers() == []
    names = {"unet", "vae", "text_encoder", "text_encoder_2"} & set(theirs.components)
    for name in names:
        assert_same_weights(getattr(loaded, name), getattr(theirs, name))

    loaded.set_progress_bar_config(disable=True)
    latents, _ = draw_noise(3, 2, 1, LATENTS[1:])
    arguments = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"} | SIZE
    expected = loaded(PROMPTS, latents=to_torch(latents), **arguments).images
    found = lcm_jax.Pipeline.from_pretrained(folder)(PROMPTS, latents=np.asarray(latents), **arguments).images
    assert found.shape == expected.shape == (2, 64, 96, 3) and np.std(found) > 0.01
    assert np.abs(expected - found).max() * 255 <= 2


def test_diffusers_loads_the_folder_that_a_file_became(model, tmp_path, warnings_of_diffusers):
    theirs, folder, _, file = model
    convert(file, tmp_path / "folder", f"--base={folder}", to="diffusers")
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "folder")
    assert warnings_of_diffusers() == []
    public = lambda pipe: {k: v for k, v in pipe.scheduler.config.items() if k[0] != "_"}  # noqa: E731
    assert type(loaded) is type(theirs) and public(loaded) == public(theirs)
    for name in {"unet", "vae", "text_encoder", "text_encoder_2"} & set(theirs.components):
        assert_same_weights(getattr(loaded, name), getattr(theirs, name))


@pytest.mark.parametrize("component", KINDS)
def test_diffusers_loads_a_component_of_its_own(model, component, tmp_path, warnings_of_diffusers):
    theirs, folder, configs, file = model
    convert(folder, tmp_path / "part.safetensors", f"--component={component}")
    for each in (file, tmp_path / "part.safetensors"):
        loaded = KINDS[component].from_single_file(
            str(each), config=str(configs), subfolder=component, local_files_only=True
        )
        assert_same_weights(loaded, getattr(theirs, component))
    assert warnings_of_diffusers() == []
