"""The convert command in a process of its own, on tiny models."""

import json
import os
import resource
import shutil
import subprocess
import sys
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_model
from safetensors.numpy import load_file, save_file

from lcm_jax.weights import diffusers_folder as folders

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model.write(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def single(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("files") / "model.safetensors"
    done = convert(f"--input={model}", f"--output={path}", "--format=ldm")
    assert done.returncode == 0, done.stderr
    assert "sd1" in done.stdout and "unet: " in done.stdout and "parameters, float32, sha256" in done.stdout
    return path


# The command again and again, without the imports: its flags would be in the way of other commands in this process.
RESIDENT = """
import contextlib, io, json, sys
from absl import flags
from lcm_jax import convert

for line in sys.stdin:
    for flag in flags.FLAGS.flags_by_module_dict()["lcm_jax.convert"]:
        flag.unparse()
    sys.argv, code = ["convert", *json.loads(line)], None
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            convert.run()
        except SystemExit as end:
            code = end.code
    if isinstance(code, str):
        code, text = 1, code
        err.write(text)
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""
process: subprocess.Popen | None = None


def start() -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", RESIDENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def resident():
    global process
    process = start()
    yield
    process.stdin.close()
    assert process.wait(60) == 0


def convert(*arguments: str) -> SimpleNamespace:
    process.stdin.write(json.dumps(arguments) + "\n")
    process.stdin.flush()
    code, out, err = json.loads(process.stdout.readline())
    return SimpleNamespace(returncode=code or 0, stdout=out, stderr=err)


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    networks = folders.networks_of(folders.read_index(folder))
    return {f"{n}/{k}": v for n in networks for k, v in folders.read_component(folder, n)[1].items()}


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and a[key].tobytes() == b[key].tobytes(), key


def test_folder_to_file_to_folder_is_the_same_bits(model, single, tmp_path):
    assert "model.diffusion_model.input_blocks.0.0.weight" in load_file(single)
    done = convert(f"--input={single}", f"--output={tmp_path / 'again'}", "--format=diffusers", f"--base={model}")
    assert done.returncode == 0, done.stderr
    assert_same(tensors_of(model), tensors_of(tmp_path / "again"))
    again = convert(f"--input={tmp_path / 'again'}", f"--output={tmp_path / 'again.safetensors'}", "--format=ldm")
    assert again.returncode == 0, again.stderr
    assert_same(load_file(single), load_file(tmp_path / "again.safetensors"))


def test_a_pickled_checkpoint_gives_the_same_bits(single, tmp_path):
    torch = pytest.importorskip("torch")
    state = {key: torch.from_numpy(value) for key, value in load_file(single).items()}
    torch.save({"state_dict": state, "global_step": 3}, tmp_path / "model.ckpt")
    done = convert(f"--input={tmp_path / 'model.ckpt'}", f"--output={tmp_path / 'm.safetensors'}", "--format=ldm")
    assert done.returncode == 0, done.stderr
    assert_same(load_file(single), load_file(tmp_path / "m.safetensors"))


def test_one_component_in_half_precision(model, tmp_path):
    target = tmp_path / "unet.safetensors"
    done = convert(f"--input={model}", f"--output={target}", "--format=ldm", "--component=unet", "--dtype=float16")
    assert done.returncode == 0, done.stderr
    tensors = load_file(target)
    assert {value.dtype.name for value in tensors.values()} == {"float16"}
    assert all(key.startswith("model.diffusion_model.") for key in tensors)


def test_a_dry_run_says_what_it_found_and_writes_nothing(single, tmp_path):
    done = convert(f"--input={single}", "--dry_run")
    assert done.returncode == 0 and "sd1" in done.stdout and "text_encoder: " in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays(model, tmp_path):
    target = tmp_path / "model.safetensors"
    target.write_bytes(b"mine")
    done = convert(f"--input={model}", f"--output={target}", "--format=ldm")
    assert done.returncode == 1 and "exists already" in done.stderr and target.read_bytes() == b"mine"
    done = convert(f"--input={model}", f"--output={target}", "--format=ldm", "--overwrite")
    assert done.returncode == 0 and len(load_file(target)) > 100
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input=nowhere", "--output=W/a.safetensors", "--format=ldm"], "there is no model 'nowhere'"),
        (["--input=M", "--output=W/a.ckpt", "--format=ldm"], "must end in .safetensors"),
        (["--input=M", "--output=W/a.safetensors", "--format=ldm", "--component=lora"], "it has unet, vae"),
        (["--input=S", "--output=W/a", "--format=diffusers"], "has no tokenizer: name a sd1 model"),
        (["--input=M", "--output=W/a", "--format=onnx"], "diffusers|ldm"),
        (["--input=M", "--format=ldm"], "--output is missing"),
        (["--input=U", "--output=W/a", "--format=diffusers"], "looked for"),
        (["--input=O", "--output=W/o.safetensors", "--format=ldm", "--dtype=float16"], "1 tensors overflow in float16"),
    ],
)
def test_a_mistake_is_an_error_and_writes_nothing(arguments, message, model, single, tmp_path):
    (tmp_path / "out").mkdir()
    save_file({"encoder.weight": np.zeros(3, np.float32)}, tmp_path / "unknown.safetensors")
    places = {"=M": model, "=S": single, "=U": tmp_path / "unknown.safetensors", "=W": tmp_path / "out"}
    if "--input=O" in arguments:
        tensors = load_file(single)
        tensors["model.diffusion_model.out.2.bias"] = tensors["model.diffusion_model.out.2.bias"] + np.float32(1e6)
        places["=O"] = tmp_path / "large.safetensors"
        save_file(tensors, places["=O"])
    for mark, place in places.items():
        arguments = [a.replace(mark, f"={place}", 1) if a.startswith(("--input", "--output")) else a for a in arguments]
    done = convert(*arguments)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_the_guidance_input_of_a_student_survives(tmp_path):
    student = tmp_path / "student.safetensors"
    done = convert("--input=shapes-lcm", f"--output={student}", "--format=ldm")
    assert done.returncode == 0, done.stderr
    done = convert(f"--input={student}", f"--output={tmp_path / 'back'}", "--format=diffusers", "--base=shapes-lcm")
    assert done.returncode == 0, done.stderr
    assert_same(tensors_of(folders.locate("shapes-lcm")), tensors_of(tmp_path / "back"))
    config = json.loads((tmp_path / "back" / "unet" / "config.json").read_text())
    assert config["time_cond_proj_dim"] == 256


# ---- LoRA -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def style(model, tmp_path) -> Path:
    """A LoRA in kohya's naming for every attention of the model's UNet, alpha 2 at rank 4."""
    rng = np.random.default_rng(0)
    tensors = {}
    for key, weight in folders.read_component(model, "unet")[1].items():
        if ".attn" in key and key.endswith(".weight"):
            name = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
            tensors[f"{name}.lora_down.weight"] = rng.normal(size=(4, weight.shape[1])).astype(np.float16)
            tensors[f"{name}.lora_up.weight"] = rng.normal(size=(weight.shape[0], 4)).astype(np.float16)
            tensors[f"{name}.alpha"] = np.asarray(2.0, np.float16)
    assert tensors
    save_file(tensors, tmp_path / "style.safetensors", {"ss_output_name": "style"})
    return tmp_path / "style.safetensors"


def test_a_lora_to_the_other_naming_and_back_is_the_same_bits(model, style, tmp_path):
    peft, again = tmp_path / "peft.safetensors", tmp_path / "again.safetensors"
    done = convert(f"--input={style}", f"--output={peft}", "--format=lora-peft", f"--base={model}")
    assert done.returncode == 0, done.stderr
    assert "a LoRA" in done.stdout and "modules of rank 4" in done.stdout and "read it back" in done.stdout
    assert all(key.startswith("unet.") for key in load_file(peft))
    done = convert(f"--input={peft}", f"--output={again}", "--format=lora-kohya")
    assert done.returncode == 0, done.stderr
    assert_same(load_file(style), load_file(again))


def test_a_lora_is_merged_at_its_weight(model, style, tmp_path):
    merged = tmp_path / "merged"
    done = convert(f"--input={model}", f"--output={merged}", "--format=diffusers", f"--merge={style}:0.5")
    assert done.returncode == 0, done.stderr
    assert f"merging {style} at 0.5" in done.stdout
    before, after, lora = tensors_of(model), tensors_of(merged), load_file(style)
    for key, weight in before.items():
        name = "lora_unet_" + key.removeprefix("unet/").removesuffix(".weight").replace(".", "_")
        if key.startswith("unet/") and f"{name}.alpha" in lora:
            up, down = (lora[f"{name}.lora_{side}.weight"].astype(np.float64) for side in ("up", "down"))
            np.testing.assert_allclose(after[key], weight + 0.5 * 2 / 4 * up @ down, rtol=1e-4, atol=1e-5)
        else:
            assert after[key].tobytes() == weight.tobytes(), key


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--input={style}", "--format=lora-peft"), "name the model it belongs to with --base"),
        (("--input={style}", "--format=lora-peft", "--base=shapes"), "a text of width 16, the model to 128"),
        (("--input={style}", "--format=ldm", "--base={model}"), "is a LoRA: write it with --format=lora-kohya"),
        (("--input={model}", "--format=lora-peft"), "is for LoRAs"),
        (("--input={model}", "--format=ldm", "--merge={style}:much"), "'much' is no number; write FILE or FILE:WEIGHT"),
    ],
)
def test_mistakes_with_a_lora_are_errors(model, style, tmp_path, arguments, message):
    output = tmp_path / "out.safetensors"
    done = convert(f"--output={output}", *(each.format(style=style, model=model) for each in arguments))
    assert done.returncode == 1 and message in done.stderr and not output.exists(), done.stderr
    assert "Traceback" not in done.stderr
