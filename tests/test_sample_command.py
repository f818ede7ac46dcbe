"""`python -m lcm_jax.sample`, as a process of its own."""

import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import reference_controlnet
import reference_pipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import load_file, save_file

import lcm_jax
from lcm_jax import sample
from lcm_jax.conversion import convert
from lcm_jax.sampling import png

ROOT = Path(__file__).resolve().parent.parent
STEPS = "--num_inference_steps=2"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    reference_pipeline.build(folder / "tokenizer", "lcm").save_pretrained(folder / "student")
    return folder / "student"


def run(*arguments, stdin=None):
    command = [sys.executable, "-m", "lcm_jax.sample", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, input=stdin)


@pytest.fixture
def here(monkeypatch, capfd):
    """The command within this process: (exit code, stdout, stderr)."""
    interrupt = signal.getsignal(signal.SIGINT)  # which the command ignores once it has been interrupted

    def run_here(*arguments):
        for name in sample.FLAGS:
            sample.FLAGS[name].unparse()
        monkeypatch.setattr(sys, "argv", ["sample", *map(str, arguments)])
        code = 0
        try:
            sample.run()
        except SystemExit as end:
            code = end.code
        out, err = capfd.readouterr()
        if isinstance(code, str):  # which Python prints, and ends with 1
            code, err = 1, err + code
        return code, out, err

    yield run_here
    signal.signal(signal.SIGINT, interrupt)


def fails(result, *parts):
    """It says what is wrong in a line or two, without a traceback."""
    assert result.returncode != 0
    lines = result.stderr.strip().splitlines()
    assert 1 <= len(lines) <= 2, result.stderr
    for part in parts:
        assert part in result.stderr, result.stderr


def test_pictures_of_every_prompt_once(model, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a blue square\n\na red square\n")
    output = tmp_path / "new" / "pictures"
    arguments = [f"--model={model}", "--prompt=a red circle", f"--prompts_file={prompts}", STEPS, f"--output={output}"]
    result = run(*arguments, "--grid", "--seed=3", "--batch_size=2")
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"3/3 images  [\d.]+ images/s  0:00 left\n", result.stderr), result.stderr
    assert sorted(path.name for path in output.iterdir()) == ["000.png", "001.png", "002.png", "grid.png"]
    assert all(part in result.stdout for part in ["3 images in", "images/s", str(output / "002.png")])

    pipe = lcm_jax.Pipeline.from_pretrained(model)
    expected = pipe(["a red circle", "a blue square", "a red square"], num_inference_steps=2, seed=3).images
    pictures = [Image.open(output / f"00{i}.png") for i in range(3)]
    for ours, theirs in zip(pictures, expected, strict=True):
        assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1
    assert Image.open(output / "grid.png").size == (48, 16)

    # Again into the same folder: refused before anything is loaded or touched.
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    fails(run(*arguments, "--seed=4"), "000.png exists already", "--overwrite")
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_an_image_is_repeated_from_its_png(here, model, tmp_path):
    """The third of two prompts with two images each, in a batch of three; prompts come from a pipe."""
    arguments = [f"--model={model}", "--prompts_file=-", STEPS, "--guidance_scale=3.5", "--clip_skip=1", "--seed=7"]
    prompts = "a red circle, (above)\n\na blue square\n"
    made = run(*arguments, "--num_images_per_prompt=2", "--batch_size=3", f"--output={tmp_path / 'a'}", stdin=prompts)
    assert made.returncode == 0, made.stderr
    source = tmp_path / "a" / "002.png"
    settings = png.read(source)
    assert (settings.prompt, settings.number, settings.row, settings.batch_size) == ("a blue square", 2, 2, 3)
    assert (settings.seed, settings.guidance_scale, settings.num_inference_steps) == (7, 3.5, 2)
    assert (settings.width, settings.clip_skip, settings.sampler, settings.dtype) == (16, 1, "lcm", "float32")
    assert (settings.model, settings.device, settings.jax) == (str(model), "cpu", jax.__version__)
    with Image.open(source) as opened:
        assert opened.info["parameters"] == (
            "a blue square\nSteps: 2, Sampler: LCM, CFG scale: 3.5, Seed: 7, Size: 16x16, Model: student, "
            f"Clip skip: 2, Version: lcm_jax {lcm_jax.__version__}"
        )

    code, out, err = here(f"--from_png={source}", f"--output={tmp_path / 'b'}")
    assert code == 0 and f"identical to {source}" in out and "warning" not in err, err
    assert (tmp_path / "b" / "000.png").read_bytes() == source.read_bytes()
    assert len(list((tmp_path / "b").iterdir())) == 1

    # Flags beside it override, here with other weights; three images more begin where it was.
    other = Path(shutil.copytree(model, tmp_path / "other"))
    file = next((other / "unet").glob("*.safetensors"))
    save_file({key: tensor * 2 for key, tensor in load_file(file).items()}, file)
    more = [f"--model={other}", "--prompt=a blue circle", "--num_images_per_prompt=3", f"--output={tmp_path / 'c'}"]
    code, out, err = here(f"--from_png={source}", *more)
    changed = "prompt is 'a blue circle', was 'a blue square'; model is '"
    assert code == 0 and err.startswith(f"warning: the image may differ from {source}: {changed}")
    assert err.count("; fingerprint is '") == 1
    made = [png.read(tmp_path / "c" / f"00{i}.png") for i in range(3)]
    assert [each.number for each in made] == [2, 3, 4] and [each.row for each in made] == [2, 0, 1]


def test_an_image_that_is_made_from_another_is_repeated(here, model, tmp_path):
    photo, output = tmp_path / "photo.png", tmp_path / "a"
    Image.effect_noise((16, 16), 50).convert("RGB").save(photo)
    arguments = [f"--model={model}", "--prompt=a (red:1.2) circle", "--prompt_weights", STEPS, f"--output={output}"]
    assert here(*arguments, f"--image={photo}", "--strength=0.5")[0] == 0
    settings = png.read(output / "000.png")
    assert settings.image is not None and settings.image.path == str(photo) and settings.strength == 0.5
    assert settings.prompt_weights and settings.mask_image is None
    code, out, _ = here(f"--from_png={output / '000.png'}", f"--output={tmp_path / 'b'}")
    assert code == 0 and f"identical to {output / '000.png'}" in out

    photo.unlink()
    code, _, err = here(f"--from_png={output / '000.png'}", f"--output={tmp_path / 'c'}")
    assert code == 1 and "photo.png" in err and len(err.splitlines()) == 1


def test_a_controlnet_and_another_autoencoder(here, model, tmp_path):
    edges = reference_controlnet.image()
    edges.save(tmp_path / "edges.png")
    unet = json.loads((model / "unet" / "config.json").read_text())
    known = inspect.signature(reference_controlnet.diffusers.ControlNetModel.__init__).parameters
    unet = {name: value for name, value in unet.items() if name in known}
    reference_controlnet.build(unet).save_pretrained(tmp_path / "net")
    vae = Path(shutil.copytree(model / "vae", tmp_path / "vae"))
    file = next(vae.glob("*.safetensors"))
    save_file({key: tensor * np.float32(1.1) for key, tensor in load_file(file).items()}, file)
    control, output = f"--control={tmp_path / 'net'}:{tmp_path / 'edges.png'}:0.5", tmp_path / "a"
    code, _, err = here(f"--model={model}", "--prompt=a red circle", control, f"--vae={vae}", f"--output={output}")
    assert code == 0, err

    pipe = lcm_jax.Pipeline.from_pretrained(model, vae=vae, controlnet=tmp_path / "net")
    arguments = {"control_image": edges, "controlnet_conditioning_scale": 0.5}
    expected = np.asarray(pipe("a red circle", **arguments).images[0], int)
    with Image.open(output / "000.png") as opened:
        assert np.abs(np.asarray(opened, int) - expected).max() <= 1
    settings = png.read(output / "000.png")
    assert settings.controls[0].model == str(tmp_path / "net") and settings.controls[0].scale == 0.5
    assert (settings.vae, settings.num_inference_steps) == (str(vae), pipe.preset.num_inference_steps)
    code, out, _ = here(f"--from_png={output / '000.png'}", f"--output={tmp_path / 'b'}")
    assert code == 0 and f"identical to {output / '000.png'}" in out

    for text in ("net", "net:", ":edges.png", "net:edges.png:much", "a:b:c:1"):
        code, _, err = here(f"--model={model}", "--prompt=a", f"--control={text}", f"--output={tmp_path / 'c'}")
        assert (code, err) == (
            1,
            f"error: control {text!r} is not supported; use MODEL:IMAGE, or MODEL:IMAGE:SCALE with a number",
        )


def test_settings_of_another_program(here, model, tmp_path):
    info = PngInfo()
    info.add_text(
        "parameters", "a red circle\nSteps: 2, Sampler: LCM, CFG scale: 2, Seed: 5, Size: 32x16, Model: dream"
    )
    Image.new("RGB", (32, 16)).save(tmp_path / "theirs.png", pnginfo=info)
    code, _, err = here(f"--from_png={tmp_path / 'theirs.png'}", f"--output={tmp_path / 'a'}")
    assert code == 1 and "'dream'" in err and len(err.splitlines()) == 1
    code, _, err = here(f"--from_png={tmp_path / 'theirs.png'}", f"--model={model}", f"--output={tmp_path / 'a'}")
    assert (
        code == 0 and err == f"warning: {tmp_path / 'theirs.png'} was made by another program; the image will differ\n"
    )
    settings = png.read(tmp_path / "a" / "000.png")
    assert (settings.prompt, settings.seed, settings.width, settings.height) == ("a red circle", 5, 32, 16)

    for name, message in [("none.png", "none.png"), ("grid.png", "grid.png: the file has no settings")]:
        png.write(Image.new("RGB", (8, 8)), tmp_path / "grid.png")
        code, _, err = here(f"--from_png={tmp_path / name}", f"--output={tmp_path / 'b'}")
        assert code == 1 and message in err and len(err.splitlines()) == 1


def test_a_reader_that_goes_away_costs_no_image(here, model, tmp_path, monkeypatch):
    """As `... 2>&1 | head -1`; the file of prompts is as Windows writes it."""
    prompts, output = tmp_path / "prompts.txt", tmp_path / "new"
    prompts.write_bytes("a red circle\r\na größer circle".encode("utf-16"))
    for name in ("stdout", "stderr"):
        reader, writer = os.pipe()
        os.close(reader)
        monkeypatch.setattr(sys, name, os.fdopen(writer, "w"))
    code, _, _ = here(f"--model={model}", f"--prompts_file={prompts}", "--batch_size=1", STEPS, f"--output={output}")
    assert code == 0 and sorted(path.name for path in output.iterdir()) == ["000.png", "001.png"]


def test_ctrl_c_is_one_line_and_keeps_what_is_written(here, model, tmp_path, monkeypatch):
    make = lcm_jax.Pipeline.__call__

    def interrupted(self, prompts, **arguments):
        if arguments["first"] == 2:
            raise KeyboardInterrupt
        return make(self, prompts, **arguments)

    monkeypatch.setattr(lcm_jax.Pipeline, "__call__", interrupted)
    arguments = [f"--model={model}", "--prompt=a red circle", STEPS, "--num_images_per_prompt=3", "--batch_size=1"]
    code, _, error = here(*arguments, f"--output={tmp_path / 'new'}")
    assert (code, error) == (130, f"interrupted: 2 of 3 images are in {tmp_path / 'new'}\n")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["000.png", "001.png"]


def test_a_full_device_is_a_line_that_says_what_to_lower(here, model, tmp_path, monkeypatch):
    def full(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 40000000000000 bytes.\nStack:")

    monkeypatch.setattr(lcm_jax.Pipeline, "__call__", full)
    code, _, error = here(f"--model={model}", "--prompt=a red circle", f"--output={tmp_path / 'new'}")
    remedy = "lower --batch_size, --height or --width, or use --dtype=bfloat16"
    assert (code, error) == (1, f"error: out of memory (40000.00 GB); {remedy}")


def test_weights_with_nan_write_no_image(here, model, tmp_path):
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    file = next((broken / "unet").glob("*.safetensors"))
    tensors = load_file(file)
    tensors["conv_in.bias"][0] = np.nan
    save_file(tensors, file)
    code, out, error = here(f"--model={broken}", "--prompt=a red circle", STEPS, f"--output={tmp_path / 'new'}")
    assert (code, out) == (1, "") and len(error.splitlines()) == 1
    assert f"error: {broken}: conv_in.bias of the unet contains NaN or infinity" in error
    assert not (tmp_path / "new").exists()


def test_what_is_no_text_is_named(here, tmp_path):
    (tmp_path / "latin.txt").write_bytes("größer\n".encode("latin-1"))
    for arguments, message in [
        (f"--prompts_file={tmp_path / 'latin.txt'}", f"error: {tmp_path / 'latin.txt'} is not UTF-8 (invalid start"),
        ("--prompt=caf\udce9", "error: --prompt is 'caf\\udce9', which is not valid Unicode at character 3; use UTF-8"),
    ]:
        code, _, error = here(arguments, f"--output={tmp_path / 'new'}")
        assert code == 1 and error.startswith(message) and len(error.splitlines()) == 1


def test_a_platform_that_is_not_there_is_one_line(tmp_path):
    command = [sys.executable, "-m", "lcm_jax.sample", "--prompt=a", f"--output={tmp_path / 'new'}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "tpu"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    fails(result, "error: JAX_PLATFORMS=tpu names devices that JAX does not find", "found: cpu; unset JAX_PLATFORMS")


def test_commands_can_be_imported_in_one_process():
    """Their flags have the same names."""
    code = (
        "from lcm_jax import benchmark, convert, main, sample\n"
        "sample.FLAGS(['', '--output=a']); convert.FLAGS(['', '--output=b', '--dry_run'])\n"
        "print(sample.OUTPUT.value, convert.OUTPUT.value, convert.DRY_RUN.value, main.DRY_RUN.default)"
    )
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert imported.stdout == "a b True False\n", imported.stderr


def test_pictures_with_loras(model, tmp_path):
    """FILE:WEIGHT and FILE, with a comma between them, are what the pipeline makes of the two."""
    key = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        down, up = rng.normal(size=(2, 16)).astype(np.float32), rng.normal(size=(16, 2)).astype(np.float32)
        save_file({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}, tmp_path / f"{name}.safetensors")
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    output = tmp_path / "pictures"
    arguments = [f"--model={model}", "--prompt=a red circle", STEPS, f"--output={output}"]
    result = run(*arguments, f"--lora={files[0]}:-0.5,{files[1]}")
    assert result.returncode == 0, result.stderr
    assert "with one at -0.5" in result.stdout and "with two at 1" in result.stdout

    pipe = lcm_jax.Pipeline.from_pretrained(model)
    plain = np.asarray(pipe("a red circle", num_inference_steps=2).images[0], int)
    pipe.load_lora(files[0], -0.5)
    pipe.load_lora(files[1])
    expected = np.asarray(pipe("a red circle", num_inference_steps=2).images[0], int)
    found = np.asarray(Image.open(output / "000.png"), int)
    assert np.abs(found - expected).max() <= 1 < np.abs(found - plain).max()

    before = (output / "000.png").read_bytes()
    assert [(each.file.path, each.weight) for each in png.read(output / "000.png").loras] == [
        (str(files[0]), -0.5),
        (str(files[1]), 1.0),
    ]
    for lora, parts in [
        (f"{files[0]}:much", ["'much' is not a number", "LORA:WEIGHT"]),
        (f"{files[0]},{files[0]}:2", ["'one' is loaded already"]),
        (tmp_path / "none.safetensors", ["none.safetensors"]),
    ]:
        fails(run(*arguments, "--overwrite", f"--lora={lora}"), *parts)
    assert (output / "000.png").read_bytes() == before


@pytest.mark.parametrize(
    ("damage", "parts"),
    [("cut short", ["unet", "truncated"]), ("another shape", ["! conv_in.bias [3], which should be [8]"])],
)
def test_a_damaged_model_is_named(damage, parts, model, tmp_path):
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    file = next((broken / "unet").glob("*.safetensors"))
    if damage == "cut short":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        save_file(load_file(file) | {"conv_in.bias": np.zeros(3, np.float32)}, file)
    fails(run(f"--model={broken}", "--prompt=a red circle", STEPS, f"--output={tmp_path / 'new'}"), *parts)
    assert not (tmp_path / "new").exists()


def test_help_ends_with_an_example_and_needs_no_jax():
    result = run("--help")
    assert result.returncode == 0
    last = result.stdout.strip().splitlines()[-9:]
    assert "python -m lcm_jax.sample --model=shapes-lcm" in last[0] and "--num_inference_steps=4" in last[1]
    assert "--lora=style.safetensors:0.8,other.safetensors" in last[2]
    assert "--image=photo.png --mask_image=mask.png" in last[4]
    assert "--control=path/to/a/controlnet:edges.png:0.8" in last[6]
    assert "--from_png=images/000.png" in last[8]
    assert "1 to 50" not in result.stdout and "shapes-lcm: 8" in result.stdout
    code = "import sys, lcm_jax, lcm_jax.sample; print('jax' in sys.modules, lcm_jax.__version__)"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert imported.stdout == f"False {lcm_jax.__version__}\n"


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--promt=a"], ["'promt'", "Did you mean: prompt"]),
        (["--prompt=a"], ["--output is missing"]),
        (["--output=new"], ["no prompts", "--prompt="]),
        (["--prompt=a", "--output=new", "--sampler=heun"], ["heun", "lcm"]),
        (["--prompt=a", "--output=new", "more"], ["'more'"]),
        (["--prompt=a", "--output=new", "--prompts_file=nowhere.txt"], ["nowhere.txt"]),
        (["--prompt=a", "--output=new", "--image=nowhere.png"], ["nowhere.png"]),
        (["--prompt=a", "--output=new", "--strength=0.5"], ["strength is 0.5 and there is no image to start from"]),
        (["--prompt=a", "--output=new", "--model=shapes-lmc"], ["'shapes-lmc'", "did you mean 'shapes-lcm'"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_mistakes_are_one_line(arguments, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(run(*arguments), *parts)
    assert not list(tmp_path.iterdir())


def test_what_is_no_model_is_refused_in_one_line(model, here, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "empty.ckpt").touch()
    save_file({"encoder.weight": np.zeros(3, np.float32)}, tmp_path / "unknown.safetensors")
    convert(model, tmp_path / "m.safetensors", "ldm", log=lambda line: None)
    for name, part in [
        ("", "has no model_index.json; use the top folder of a model"),
        ("empty.ckpt", "empty.ckpt is truncated"),
        ("unknown.safetensors", "looked for"),
        ("m.safetensors", "has no tokenizer; pass a sd1 model in diffusers layout as base (--base)"),
    ]:
        code, _, err = here(f"--model={tmp_path / name}", "--prompt=a", f"--output={tmp_path / 'pictures'}")
        assert code == 1 and part in err and len(err.splitlines()) == 1, err
    assert not (tmp_path / "pictures").exists()


def test_it_draws_without_torch(model, tmp_path):
    code = "import sys; sys.modules['torch'] = None; from lcm_jax import sample; sample.run()"
    command = [sys.executable, "-c", code, f"--model={model}", "--prompt=a red circle", STEPS, f"--output={tmp_path}"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert result.returncode == 0 and (tmp_path / "000.png").is_file(), result.stderr


@pytest.mark.parametrize("steps", [0, 51])
def test_a_number_of_steps_that_is_not_possible(model, tmp_path, steps):
    output = tmp_path / "pictures"
    fails(
        run(f"--model={model}", "--prompt=a", f"--output={output}", f"--num_inference_steps={steps}"),
        f"num_inference_steps is {steps}",
        "1 to 50",
    )
    assert not output.exists()
