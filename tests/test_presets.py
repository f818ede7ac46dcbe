"""Presets: read from every format, kept by every conversion, made from the config of a run, and any JSON an error."""

import json
from dataclasses import replace

import numpy as np
import pytest
import small_lora
import tiny_model
from odd_values import VALUES
from safetensors.numpy import load_file, save_file

from lcm_jax.conversion import convert
from lcm_jax.weights import diffusers_folder as folders
from lcm_jax.weights import lora as loras
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.layout import needed_files
from lcm_jax.weights.model import open_model
from lcm_jax.weights.preset import METADATA, Preset, adapter_preset, default_preset, run_preset

OWN = Preset("lcm", 2, 5.5, (4.0, 8.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tiny_model.write(tmp_path_factory.mktemp("models") / "model", unet=tiny_model.SHALLOW)
    folders.write_json(folder / "preset.json", OWN.to_json())
    return folder


def silent(*arguments, **options):
    return convert(*arguments, **options, log=lambda _: None)


def test_conversions_keep_it(folder, tmp_path):
    # Every format is written once and read once.
    plain = tiny_model.write(tmp_path / "plain", unet=tiny_model.SHALLOW)
    silent(folder, tmp_path / "model.safetensors", "ldm")
    silent(tmp_path / "model.safetensors", tmp_path / "orbax", "orbax", base=plain)
    silent(tmp_path / "orbax", tmp_path / "again", "diffusers")
    assert open_model(tmp_path / "again").preset == OWN
    assert json.loads((tmp_path / "again" / "preset.json").read_text())["guidance_range"] == [4.0, 8.0]
    # A part that does not sample has none; a model without one is not given one.
    silent(folder, tmp_path / "vae.safetensors", "ldm", component="vae")
    assert open_model(tmp_path / "vae.safetensors").preset is None
    silent(plain, tmp_path / "other", "diffusers")
    assert open_model(tmp_path / "other").preset is None and not (tmp_path / "other" / "preset.json").exists()


def test_a_base_supplies_it_unless_the_kind_of_model_changes(folder, tmp_path):
    plain = tiny_model.write(tmp_path / "plain", unet=tiny_model.SHALLOW)
    silent(plain, tmp_path / "plain.safetensors", "ldm")
    assert open_model(tmp_path / "plain.safetensors", base=folder).preset == OWN
    student = tiny_model.SHALLOW | {"time_cond_proj_dim": 8}
    lcm = tiny_model.write(tmp_path / "lcm", unet=student, scheduler="LCMScheduler")
    silent(lcm, tmp_path / "lcm.safetensors", "ldm")
    assert open_model(tmp_path / "lcm.safetensors", base=folder).preset is None


def test_a_lora_keeps_it_and_gives_it_to_what_it_is_merged_with(folder, tmp_path):
    unet = open_model(folder).tensors["unet"]
    key = next(key for key in unet if key.endswith("attn2.to_k.weight"))
    down, up = np.ones((2, unet[key].shape[1]), np.float32), np.ones((unet[key].shape[0], 2), np.float32)
    lora = loras.LoRA({"unet": {key.removesuffix(".weight"): loras.Update(down, up, None)}}, OWN.to_metadata())
    tensors, metadata = loras.to_peft(lora)
    save_file(tensors, tmp_path / "peft.safetensors", metadata)
    silent(tmp_path / "peft.safetensors", tmp_path / "kohya.safetensors", "lora-kohya")
    silent(tmp_path / "kohya.safetensors", tmp_path / "again.safetensors", "lora-peft", base=folder)
    assert loras.open_lora(tmp_path / "again.safetensors").preset == OWN
    plain = tiny_model.write(tmp_path / "plain", unet=tiny_model.SHALLOW)
    silent(plain, tmp_path / "merged", "diffusers", merge=[str(tmp_path / "kohya.safetensors")])
    assert open_model(tmp_path / "merged").preset == OWN
    assert small_lora.example().preset is None
    save_file(tensors, tmp_path / "bad.safetensors", metadata | {METADATA: "[1]"})
    with pytest.raises(ModelError, match=r"bad.safetensors: metadata lcm_jax.preset contains \[1\], not a preset"):
        loras.open_lora(tmp_path / "bad.safetensors")


def test_the_hub_is_asked_for_it():
    names = ["model_index.json", "preset.json", "scheduler/scheduler_config.json", "README.md"]
    assert needed_files("org/name", names) == names[:3]


WRONG = [
    ([], r"preset.json contains \[\], not a JSON object"),
    ({}, "preset.json has no sampler; add it, or remove the preset"),
    ({"sampler": "foo"}, "preset.json: sampler='foo' is not supported; use one of lcm"),
    ({"sampler": ["lcm"]}, r"sampler=\['lcm'\] is not supported"),
    ({"num_inference_steps": 0}, "num_inference_steps=0 is not supported; use a whole number of at least 1"),
    ({"num_inference_steps": True}, "num_inference_steps=True is not supported"),
    ({"guidance_scale": float("nan")}, "guidance_scale=nan is not supported; use a number of at least 1"),
    ({"guidance_scale": 0.5}, "guidance_scale=0.5 is not supported"),
    ({"guidance_scale": 9}, r"guidance_scale=9 is outside guidance_range=\(4.0, 8.0\); use a number in it"),
    ({"guidance_range": [8.0, 4.0]}, r"guidance_range=\(8.0, 4.0\) is not supported; use two numbers"),
    ({"guidance_range": [4.0]}, r"guidance_range=\(4.0,\) is not supported"),
    ({"guidance_range": "4"}, "guidance_range='4' is not supported"),
    ({"steps": 4}, "preset.json: 'steps' is not a setting of a preset; use sampler, num_inference_steps"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_wrong_file_is_named_with_its_value(change, message, folder, tmp_path):
    content = OWN.to_json() | change if change else change
    (tmp_path / "preset.json").write_text(json.dumps(content))
    for name in ("model_index.json", "unet", "vae", "text_encoder", "scheduler", "tokenizer"):
        (tmp_path / name).symlink_to(folder / name)
    with pytest.raises(ModelError, match=message):
        open_model(tmp_path)


def test_any_json_is_a_preset_or_one_line(folder, tmp_path):
    silent(folder, tmp_path / "model.safetensors", "ldm")
    for key in OWN.to_json():
        for value in VALUES:
            text = json.dumps(OWN.to_json() | {key: value})
            for read in (
                lambda: Preset.from_json(json.loads(text), "preset.json"),  # noqa: B023
                lambda: Preset.from_metadata({METADATA: text}),  # noqa: B023
            ):
                try:
                    assert isinstance(read(), Preset)
                except ModelError as error:
                    assert len(str(error).splitlines()) == 1 and len(str(error)) < 300 and key in str(error)
    for text in ("", "nul", "[" * 100_000, '{"a": 1} 2'):
        with pytest.raises(ModelError, match="metadata lcm_jax.preset is not valid JSON"):
            Preset.from_metadata({METADATA: text})
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "bad.safetensors", {METADATA: "3"})
    with pytest.raises(ModelError, match="bad.safetensors: metadata lcm_jax.preset contains 3, not a preset"):
        open_model(tmp_path / "bad.safetensors", base=folder)


def test_a_model_without_one_has_that_of_its_kind():
    teacher = {"unet": {}, "scheduler": {"_class_name": "PNDMScheduler"}}
    guided = {"unet": {"time_cond_proj_dim": 256}, "scheduler": {"_class_name": "LCMScheduler"}}
    turbo = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
    assert default_preset(teacher) == Preset(None, 50, 7.5)
    assert default_preset(teacher | {"text_encoder_2": {}}) == Preset(None, 50, 5.0)
    assert default_preset(guided) == Preset(None, 4, 8.0)
    assert default_preset(guided | {"scheduler": teacher["scheduler"]}) == Preset("lcm", 4, 8.0)
    assert default_preset(guided | {"unet": {}}) == Preset(None, 4, 1.0)
    assert default_preset(teacher | {"scheduler": turbo}) == Preset(None, 1, 1.0)


def test_a_run_s_config_says_it():
    config = {"objective": {"name": "lcd", "w_min": 3, "w_max": 7.0}, "teacher": "shapes"}
    config["sample"] = {"student_steps": [1, 2, 4, 8], "guidance_scale": 8.0}
    assert run_preset(config, True, OWN) == Preset("lcm", 4, 8.0, (4.0, 8.0))
    for steps, chosen in (((1, 2), 2), ((8, 16), 8), ((), 4)):
        config["sample"] = {"student_steps": steps, "guidance_scale": 2.5}
        assert run_preset(config, True, None) == Preset("lcm", chosen, 4.0, (4.0, 8.0)), "the nearest that is trained"
    assert run_preset(config, False, OWN) == adapter_preset(config) == Preset("lcm", 4, 1.0)
    assert run_preset(config | {"objective": {"name": "diffusion"}}, False, OWN) == OWN, "fine-tuning"
    assert adapter_preset(config | {"objective": {"name": "diffusion"}}) is None
    scratch = {"objective": {"name": "diffusion"}, "sample": {"steps": 25, "guidance_scale": 2.5}}
    assert run_preset(scratch, False, None) == Preset(None, 25, 2.5)


def test_it_reads_well():
    assert str(OWN) == "sampler lcm, 2 steps, guidance scale 5.5 (4 to 8)"
    assert str(replace(OWN, sampler=None, num_inference_steps=1, guidance_range=None)) == (
        "the scheduler's sampler, 1 step, guidance scale 5.5"
    )
