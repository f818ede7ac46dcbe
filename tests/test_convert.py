"""The convert command in a process of its own, on tiny models."""

import json
import os
import shutil
import subprocess
import sys
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tiny_model
from safetensors.numpy import load_file, save_file

from lcm_jax import conversion
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.pipeline import Pipeline
from lcm_jax.training.checkpoint import Checkpoints
from lcm_jax.training.state import create_state
from lcm_jax.weights import diffusers_folder as folders
from lcm_jax.weights import layout, trees
from lcm_jax.weights.errors import ModelError

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
from lcm_jax import convert

for line in sys.stdin:
    convert.FLAGS.unparse_flags()
    for name in convert.FLAGS:
        convert.FLAGS[name].unparse()
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
        [sys.executable, "-c", RESIDENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )


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
    networks = layout.networks_of(layout.read_index(folder))
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


@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".pth", ".bin"])
def test_a_pickled_checkpoint_gives_the_same_bits(single, tmp_path, ending):
    torch = pytest.importorskip("torch")
    state = {key: torch.from_numpy(value) for key, value in load_file(single).items()}
    source = tmp_path / f"model{ending}"
    torch.save({"state_dict": state, "global_step": 3}, source)
    done = convert(f"--input={source}", f"--output={tmp_path / 'm.safetensors'}", "--format=ldm")
    assert done.returncode == 0, done.stderr
    assert_same(load_file(single), load_file(tmp_path / "m.safetensors"))


def test_text_encoder_and_autoencoder_without_a_unet_need_a_base(model, single, tmp_path):
    file, out = tmp_path / "m.safetensors", tmp_path / "out"
    tensors = {key: value for key, value in load_file(single).items() if not key.startswith("model.diffusion_model.")}
    save_file(tensors | {"odd.a": np.zeros(1), "odd.b": np.zeros(1)}, file)
    done = convert(f"--input={file}", f"--output={out}", "--format=diffusers")
    assert done.returncode == 1 and "has no unet; pass a model in diffusers layout that has them" in done.stderr
    done = convert(f"--input={file}", f"--output={out}", "--format=diffusers", f"--base={model}")
    assert_done(done)
    assert "left out, as no network has a place for 2 tensors: odd (2)" in done.stdout
    assert_same(tensors_of(model), tensors_of(out))


def test_one_component_in_half_precision(model, tmp_path):
    target = tmp_path / "unet.safetensors"
    done = convert(f"--input={model}", f"--output={target}", "--format=ldm", "--component=unet", "--dtype=float16")
    assert done.returncode == 0, done.stderr
    tensors = load_file(target)
    assert tensors.pop("v_pred").size == 0
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
    for name in ("diffusers", "orbax"):
        done = convert(f"--input={model}", f"--output={model}", f"--format={name}")
        assert done.returncode == 1 and "exists already" in done.stderr and "pass --overwrite" in done.stderr
    done = convert(f"--input={model}", f"--output={target}", "--format=ldm", "--overwrite")
    assert done.returncode == 0 and len(load_file(target)) > 100
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input=nowhere", "--output=W/a.safetensors", "--format=ldm"], "there is no model 'nowhere'"),
        (["--input=M", "--output=W/a.ckpt", "--format=ldm"], "does not end in .safetensors"),
        (["--input=M", "--output=W/a.safetensors", "--format=ldm", "--component=lora"], "use one of unet, vae"),
        (["--input=S", "--output=W/a", "--format=diffusers"], "has no tokenizer; pass a sd1 model"),
        (["--input=M", "--output=W/a", "--format=onnx"], "diffusers|ldm"),
        (["--input=M", "--format=ldm"], "--output is missing"),
        (["--input=U", "--output=W/a", "--format=diffusers"], "looked for"),
        (["--input=O", "--output=W/o.safetensors", "--format=ldm", "--dtype=float16"], "1 tensor overflows in float16"),
        (["--input=M", "--output=W/a.safetensors", "--format=ldm", "--ema"], "has one set of weights; use --ema"),
        (["--input=M", "--output=W/a.safetensors", "--format=ldm", "--noema"], "has one set of weights; use --ema"),
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
    assert_same(tensors_of(layout.locate("shapes-lcm")), tensors_of(tmp_path / "back"))
    config = json.loads((tmp_path / "back" / "unet" / "config.json").read_text())
    assert config["time_cond_proj_dim"] == 256


# ---- what a base gives, and what it does not ------------------------------------------------------------------------


def json_of(folder: Path, part: str) -> dict:
    return json.loads((folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")).read_text())


def unmarked(file: Path, target: Path) -> Path:
    """A file as most are: without the key that tells that it predicts velocity."""
    tensors = load_file(file)
    assert tensors.pop("v_pred").size == 0
    save_file(tensors, target)
    return target


@pytest.mark.parametrize("first", ["ldm", "orbax"])
def test_what_is_given_or_told_wins_over_the_base_and_the_base_over_a_guess(first, single, model, tmp_path):
    noise = Path(shutil.copytree(model, tmp_path / "noise"))
    scheduler = json_of(noise, "scheduler") | {"prediction_type": "epsilon"}
    (noise / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    sources = {"told": single, "silent": unmarked(single, tmp_path / "silent.safetensors")}
    if first == "orbax":
        for name, source in sources.items():
            sources[name] = tmp_path / f"{name} orbax"
            assert_done(convert(f"--input={source}", f"--output={sources[name]}", "--format=orbax"))
    cases = [
        ("told", noise, [], "v_prediction", 0.5),
        ("silent", model, [], "v_prediction", 0.5),
        ("told", model, ["--prediction_type=epsilon", "--scaling_factor=0.25"], "epsilon", 0.25),
        ("silent", noise, ["--prediction_type=v_prediction"], "v_prediction", 0.5),
    ]
    for source, base, more, predicts, scale in cases[: 2 if first == "orbax" else 4]:
        arguments = [f"--input={sources[source]}", f"--output={tmp_path / 'out'}", "--format=diffusers", "--overwrite"]
        done = convert(*arguments, f"--base={base}", *more)
        assert_done(done)
        assert f"sd1, predicts {predicts}\n" in done.stdout, "what it says is what it writes"
        assert json_of(tmp_path / "out", "scheduler")["prediction_type"] == predicts
        assert json_of(tmp_path / "out", "vae")["scaling_factor"] == scale
        assert_same(tensors_of(tmp_path / "out"), tensors_of(model))


def test_a_file_of_stable_diffusion_2_is_told_what_it_predicts_where_it_matters(model, tmp_path):
    base = Path(shutil.copytree(model, tmp_path / "base"))
    text = json_of(base, "text_encoder") | {"hidden_act": "gelu"}  # which makes it one of these
    (base / "text_encoder" / "config.json").write_text(json.dumps(text))
    file, again, out = tmp_path / "sd2.safetensors", tmp_path / "again.safetensors", tmp_path / "out"
    assert_done(convert(f"--input={base}", f"--output={file}", "--format=ldm"))
    unmarked(file, file)
    done = convert(f"--input={file}", f"--output={again}", "--format=ldm")
    assert_done(done)
    assert "sd2, prediction type unknown" in done.stdout
    assert_same(load_file(file), load_file(again))
    assert_done(convert(f"--input={file}", f"--output={out}", "--format=diffusers", f"--base={base}"))
    assert json_of(out, "scheduler") == json_of(base, "scheduler")
    done = convert(f"--input={file}", f"--output={tmp_path / 'orbax'}", "--format=orbax")
    assert done.returncode == 1 and "prediction_type is needed" in done.stderr and not (tmp_path / "orbax").exists()
    arguments = [f"--input={file}", f"--output={tmp_path / 'orbax'}", "--format=orbax", "--prediction_type=epsilon"]
    assert_done(convert(*arguments))


def test_one_network_takes_the_place_of_the_bases(model, tmp_path):
    student = state_at(7, model)
    config = {**tiny_model.UNET, "_class_name": "UNet2DConditionModel", "time_cond_proj_dim": 24}
    folders.write_component(tmp_path, "unet", config, student.params["unet"])
    done = convert(f"--input={tmp_path / 'unet'}", f"--output={tmp_path / 'out'}", "--format=diffusers")
    assert done.returncode == 1 and "contains only a unet; pass its model as base (--base)" in done.stderr
    arguments = [f"--input={tmp_path / 'unet'}", f"--base={model}"]
    assert_done(convert(*arguments, f"--output={tmp_path / 'out'}", "--format=diffusers"))
    rest = {key: tensor for key, tensor in tensors_of(model).items() if not key.startswith("unet/")}
    assert_same(tensors_of(tmp_path / "out"), rest | unet_of(student.params))
    pipe = Pipeline.from_pretrained(tmp_path / "out")
    assert pipe.sampler == "lcm" and pipe.model.guidance_embedding_dim == 24
    assert pipe.index["_class_name"] == "LatentConsistencyModelPipeline"
    assert json_of(tmp_path / "out", "scheduler")["prediction_type"] == "v_prediction"
    done = convert(arguments[0], "--base=shapes", f"--output={tmp_path / 'm.safetensors'}", "--format=ldm")
    assert done.returncode == 1 and "use networks of one model" in done.stderr
    assert_done(convert(*arguments, f"--output={tmp_path / 'm.safetensors'}", "--format=ldm"))
    assert any(key.startswith("cond_stage_model.") for key in load_file(tmp_path / "m.safetensors"))


def test_an_autoencoder_alone_and_beside_a_base(model, tmp_path):
    vae = {key: tensor + 1 for key, tensor in folders.read_component(model, "vae")[1].items()}
    config = json_of(model, "vae") | {"_class_name": "AutoencoderKL", "scaling_factor": 0.125}
    folders.write_tensors(tmp_path, "vae", config, vae)
    file = tmp_path / "vae.safetensors"
    assert_done(convert(f"--input={tmp_path / 'vae'}", f"--output={file}", "--format=ldm"))
    assert "decoder.conv_in.weight" in load_file(file)
    for source, scale in [(tmp_path / "vae", 0.125), (file, 0.5)]:  # the file does not tell it, and the base does
        out = tmp_path / f"of {source.name}"
        assert_done(convert(f"--input={source}", f"--output={out}", "--format=diffusers", f"--base={model}"))
        rest = {key: tensor for key, tensor in tensors_of(model).items() if not key.startswith("vae/")}
        assert_same(tensors_of(out), rest | {f"vae/{key}": tensor for key, tensor in vae.items()})
        assert json_of(out, "vae")["scaling_factor"] == scale


def test_a_network_of_another_kind_is_named(tmp_path):
    folders.write_tensors(tmp_path, "unet", {"_class_name": "MotionAdapter"}, {"a": np.zeros(3, np.float32)})
    done = convert(f"--input={tmp_path / 'unet'}", "--dry_run")
    assert (
        done.returncode == 1
        and "class 'MotionAdapter' is not supported; use one of UNet2DConditionModel" in done.stderr
    )


# ---- every pair of formats ------------------------------------------------------------------------------------------

MODELS = ("diffusers", "ldm", "orbax")


@pytest.fixture(scope="module")
def formats(model, tmp_path_factory) -> dict[str, Path]:
    """One model of three dtypes, with infinities and payloads of NaN among its numbers, in every format."""
    folder = tmp_path_factory.mktemp("formats")
    source = shutil.copytree(model, folder / "diffusers")
    rng = np.random.default_rng(0)
    for part, dtype in [("unet", np.float16), ("vae", ml_dtypes.bfloat16)]:
        path = source / part / f"{layout.FILES[part]}.safetensors"
        tensors = load_file(path)
        bits = {key: rng.integers(0, 2**16, value.shape, np.uint16).view(dtype) for key, value in tensors.items()}
        save_file(bits, path)
    for name in ("ldm", "orbax"):
        assert_done(to(name, source, folder / name, model))
    return {"diffusers": source, "ldm": folder / "ldm.safetensors", "orbax": folder / "orbax"}


def to(name: str, source: Path, target: Path, base: Path) -> SimpleNamespace:
    """Converts; the target of a single file gets its ending."""
    target = target.with_name(f"{target.name}.safetensors") if name in ("ldm", "lora-kohya", "lora-peft") else target
    return convert(f"--input={source}", f"--output={target}", f"--format={name}", f"--base={base}")


def assert_done(done: SimpleNamespace) -> None:
    assert done.returncode == 0, done.stderr


def stored(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a folder, of a file, or as orbax has them."""
    if path.is_file():
        return load_file(path)
    if (path / "model_index.json").is_file():
        return tensors_of(path)
    tree = ocp.PyTreeCheckpointer().restore(path / "checkpoints" / "0" / "default")
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize(("first", "second"), list(permutations(MODELS, 2)))
def test_every_pair_of_formats_there_and_back_is_the_same_bits(first, second, formats, model, tmp_path):
    source = formats[first]
    assert_done(to(second, source, tmp_path / "there", model))
    there = tmp_path / ("there.safetensors" if second == "ldm" else "there")
    assert_same(stored(formats[second]), stored(there))
    assert_done(to(first, there, tmp_path / "back", model))
    assert_same(stored(source), stored(tmp_path / ("back.safetensors" if first == "ldm" else "back")))


@pytest.mark.parametrize("name", MODELS)
def test_a_format_to_itself_is_the_same_bits(name, formats, model, tmp_path):
    assert_done(to(name, formats[name], tmp_path / "copy", model))
    assert_same(stored(formats[name]), stored(tmp_path / ("copy.safetensors" if name == "ldm" else "copy")))


def test_a_model_as_an_orbax_checkpoint_needs_no_base(formats, model, tmp_path):
    done = convert(f"--input={formats['orbax']}", f"--output={tmp_path / 'again'}", "--format=diffusers")
    assert_done(done)
    names = lambda folder: {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.*") if p.is_file()}  # noqa: E731
    files, again = names(formats["diffusers"]), names(tmp_path / "again")
    assert files.keys() == again.keys()
    assert all(again[name] == content for name, content in files.items() if name.endswith((".json", ".txt")))


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(model, tmp_path_factory) -> Path:
    """What a distillation leaves before its end: its config, and its states at 3 and 7."""
    workdir = tmp_path_factory.mktemp("run")
    config = {"objective": {"name": "lcd", "num_ddim_steps": 8}, "teacher": str(model)}
    (workdir / "config.json").write_text(json.dumps(config))
    checkpoints = Checkpoints(workdir / "checkpoints", keep=2)
    for step in (3, 7):
        checkpoints.save(state_at(step, model))
    checkpoints.close()
    shutil.copytree(workdir / "checkpoints" / "3", workdir / "best" / "3")
    return workdir


def state_at(step: int, model: Path):
    """A student's state in which every number is its own."""
    configs = {name: json.loads((model / name / "config.json").read_text()) for name in ("unet", "vae", "text_encoder")}
    configs["unet"]["time_cond_proj_dim"] = 24
    configs["scheduler"] = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    abstract = {"unet": StableDiffusion.from_configs(configs).abstract_params()["unet"]}
    rng = np.random.default_rng(step)
    draw = lambda tree: jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), tree)  # noqa: E731
    state = create_state(draw(abstract), optax.adam(1e-3))
    return state.replace(step=jnp.int32(step), ema=jax.tree.map(jnp.asarray, draw(abstract)))


def unet_of(tree) -> dict[str, np.ndarray]:
    return {f"unet/{key}": tensor for key, tensor in trees.from_params(tree["unet"]).items()}


@pytest.mark.parametrize(
    ("place", "arguments", "step", "part"),
    [
        ("", [], 7, "ema"),
        ("", ["--ema"], 7, "ema"),
        ("", ["--noema"], 7, "params"),
        ("checkpoints", ["--noema"], 7, "params"),
        ("checkpoints/3", [], 3, "ema"),
        ("best", [], 3, "ema"),
    ],
)
def test_a_run_gives_its_student_or_the_target(place, arguments, step, part, workdir, model, tmp_path):
    before = sorted(workdir.rglob("*"))
    done = convert(f"--input={workdir / place}", f"--output={tmp_path / 'out'}", "--format=diffusers", *arguments)
    assert_done(done)
    assert f"the {'EMA target' if part == 'ema' else 'student'} at step {step}" in done.stdout
    rest = {key: tensor for key, tensor in tensors_of(model).items() if not key.startswith("unet/")}
    assert_same(tensors_of(tmp_path / "out"), unet_of(getattr(state_at(step, model), part)) | rest)
    student = Pipeline.from_pretrained(tmp_path / "out")
    assert student.sampler == "lcm" and student.model.guidance_embedding_dim == 24
    assert student.configs["scheduler"]["original_inference_steps"] == 8
    assert sorted(workdir.rglob("*")) == before


def test_a_run_gives_both_in_one_file(workdir, model, tmp_path):
    """As the files of a training have them: --ema reads the average, and what does not ask for it the student."""
    both = tmp_path / "both.safetensors"
    assert_done(convert(f"--input={workdir}", f"--output={both}", "--format=ldm", "--with_ema"))
    keys = load_file(both).keys()
    assert {key for key in keys if key.startswith("model_ema.")} == {
        "model_ema." + key.removeprefix("model.").replace(".", "") for key in keys if key.startswith("model.")
    }
    for arguments, part in [([], "params"), (["--ema"], "ema")]:
        target = tmp_path / part
        done = convert(f"--input={both}", f"--output={target}", "--format=diffusers", f"--base={model}", *arguments)
        assert_done(done)
        assert_same(
            {key: tensor for key, tensor in tensors_of(target).items() if key.startswith("unet/")},
            unet_of(getattr(state_at(7, model), part)),
        )
    done = convert(f"--input={model}", f"--output={tmp_path / 'c.safetensors'}", "--format=ldm", "--with_ema")
    assert done.returncode == 1 and "with_ema writes a run" in done.stderr


@pytest.mark.parametrize("name", ["ldm", "orbax"])
def test_a_run_to_the_other_formats_and_from_there_to_a_folder(name, workdir, model, tmp_path):
    for target, source in [("diffusers", workdir), (name, workdir)]:
        done = convert(f"--input={source}", f"--output={tmp_path / target}.safetensors", f"--format={target}")
        assert_done(done)
    there = tmp_path / f"{name}.safetensors"
    assert_done(convert(f"--input={there}", f"--output={tmp_path / 'b'}", "--format=diffusers", f"--base={model}"))
    assert_same(tensors_of(tmp_path / "diffusers.safetensors"), tensors_of(tmp_path / "b"))


def test_a_damaged_checkpoint_is_named_and_stays(workdir, tmp_path):
    copy = Path(shutil.copytree(workdir, tmp_path / "run"))
    largest = max((p for p in (copy / "checkpoints" / "7").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    for place in range(1000, len(content), 2000):
        content[place] ^= 1
    largest.write_bytes(content)
    before = sorted(copy.rglob("*"))
    done = convert(f"--input={copy}", f"--output={tmp_path / 'out'}", "--format=diffusers")
    assert done.returncode == 1 and "checkpoint 7 in" in done.stderr and "use another" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists() and sorted(copy.rglob("*")) == before
    done = convert(f"--input={copy / 'checkpoints' / '9'}", f"--output={tmp_path / 'out'}", "--format=diffusers")
    assert done.returncode == 1
    done = convert(f"--input={copy / 'checkpoints' / '3'}", f"--output={tmp_path / 'out'}", "--format=diffusers")
    assert_done(done)


def test_a_run_whose_teacher_is_gone_wants_a_base(workdir, model, tmp_path):
    copy = Path(shutil.copytree(workdir, tmp_path / "run"))
    config = json.loads((copy / "config.json").read_text()) | {"teacher": "nowhere"}
    (copy / "config.json").write_text(json.dumps(config))
    done = convert(f"--input={copy}", f"--output={tmp_path / 'out.safetensors'}", "--format=ldm")
    assert (
        done.returncode == 1 and "cannot be read, pass it as base (--base): there is no model 'nowhere'" in done.stderr
    )
    assert_done(convert(f"--input={copy}", f"--output={tmp_path / 'o.safetensors'}", "--format=ldm", f"--base={model}"))


# ---- in a process of its own, of which something is changed before it begins -----------------------------------------


def alone(before: str, *arguments: str) -> subprocess.CompletedProcess:
    code = f"import sys; {before}\nfrom lcm_jax import convert; sys.argv = {['convert', *arguments]!r}; convert.run()"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)


DAMAGE = """
from lcm_jax.weights import diffusers_folder, stored
from lcm_jax.weights import orbax_tree
write, write_tree = stored.write_safetensors, orbax_tree.write_tree

def damaged(path, *rest, **how):
    write(path, *rest, **how)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)

def other(folder, outline, read, advance):
    write_tree(folder, outline, lambda name: read(name) + (name == "unet.conv_in.bias"), advance)

stored.write_safetensors = diffusers_folder.write_safetensors = damaged
orbax_tree.write_tree = other
"""


@pytest.mark.parametrize("name", MODELS)
def test_what_reads_back_as_other_numbers_is_not_kept(name, model, tmp_path):
    target = tmp_path / ("m.safetensors" if name == "ldm" else "m")
    done = alone(DAMAGE, f"--input={model}", f"--output={target}", f"--format={name}")
    assert done.returncode == 1 and "verification failed for" in done.stderr
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []


def test_it_converts_without_torch(model, single, tmp_path):
    done = alone(
        "sys.modules['torch'] = None",
        f"--input={single}",
        f"--output={tmp_path / 'm'}",
        "--format=diffusers",
        f"--base={model}",
    )
    assert_done(done)
    assert_same(tensors_of(tmp_path / "m"), tensors_of(model))


KILL = """
import os
from lcm_jax.weights import diffusers_folder, stored
from lcm_jax.weights import orbax_tree
write, write_tree = stored.write_safetensors, orbax_tree.write_tree

def half(path, *rest, **how):
    write(path, *rest, **how)
    os.truncate(path, path.stat().st_size // 2)
    os.kill(os.getpid(), 9)

def whole(*arguments):
    write_tree(*arguments)
    os.kill(os.getpid(), 9)

stored.write_safetensors = diffusers_folder.write_safetensors = half
orbax_tree.write_tree = whole
"""


@pytest.mark.parametrize("name", MODELS)
def test_a_kill_while_it_writes_leaves_what_was_there(name, formats, model, tmp_path):
    target = tmp_path / ("m.safetensors" if name == "ldm" else "m")
    (shutil.copy if name == "ldm" else shutil.copytree)(formats[name], target)
    before = stored(target)
    arguments = [f"--input={model}", f"--output={target}", f"--format={name}", "--overwrite"]
    assert alone(KILL, *arguments).returncode == -9
    assert_same(before, stored(target))
    assert_done(convert(*arguments))
    again = tmp_path / f"again{target.suffix}"
    assert_done(convert(f"--input={target}", f"--output={again}", f"--format={name}", f"--base={model}"))
    assert_same(stored(target), stored(again))


# ---- a full disk ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_disk_that_fills_leaves_what_was_there(name, formats, model, tmp_path):
    """The system itself refuses: no file of that process may grow beyond 20 kB."""
    target = tmp_path / ("m.safetensors" if name == "ldm" else "m")
    (shutil.copy if name == "ldm" else shutil.copytree)(formats[name], target)
    files = lambda: {str(p): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}  # noqa: E731
    before = files()
    small = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))"
    done = alone(small, f"--input={model}", f"--output={target}", f"--format={name}", "--overwrite")
    assert done.returncode == 1 and done.stderr.count("error:") == 1, done.stderr
    assert f"writing {target} failed" in done.stderr and "what was there is untouched. Free some space" in done.stderr
    assert files() == before and len(list(tmp_path.iterdir())) == 1
    assert len(done.stderr.splitlines()) == 1


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(model, tmp_path):
    small = "import shutil; usage = shutil.disk_usage; shutil.disk_usage = lambda path: usage(path)._replace(free=3000)"
    target = tmp_path / "new" / "m.safetensors"
    done = alone(small, f"--input={model}", f"--output={target}", "--format=ldm")
    needs = f"{target} needs 0.000495 GB, and {tmp_path} has 3e-06 GB free; free some space, or use another output"
    assert done.returncode == 1 and done.stderr == f"error: {needs}\n" and list(tmp_path.iterdir()) == []


INTERRUPT = """
import os, signal, time
from lcm_jax.weights import orbax_tree
from lcm_jax.weights import stored
write, init = stored.write_safetensors, orbax_tree.Streamed.__init__

def interrupted(path, *rest, **how):
    write(path, *rest, **how)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)

def begun(self, read, advance):
    def then(name):
        if name == "vae.encoder.conv_in.kernel":
            os.kill(os.getpid(), signal.SIGINT)
        return read(name)
    init(self, then, advance)

stored.write_safetensors, orbax_tree.Streamed.__init__ = interrupted, begun
"""


@pytest.mark.parametrize("name", ["ldm", "orbax"])
def test_ctrl_c_ends_in_one_line_and_leaves_what_was_there(name, formats, model, tmp_path):
    target = tmp_path / ("m.safetensors" if name == "ldm" else "m")
    (shutil.copy if name == "ldm" else shutil.copytree)(formats[name], target)
    files = lambda: {str(p): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}  # noqa: E731
    before = files()
    done = alone(INTERRUPT, f"--input={model}", f"--output={target}", f"--format={name}", "--overwrite")
    assert (done.returncode, done.stderr) == (130, "interrupted: nothing unfinished is left\n")
    assert files() == before and len(list(tmp_path.iterdir())) == 1


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


def test_a_folder_of_peft_is_a_lora(model, style, tmp_path):
    tensors, peft, again = load_file(style), {}, tmp_path / "again.safetensors"
    for key in folders.read_component(model, "unet")[1]:
        name = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
        if f"{name}.alpha" in tensors:
            place = f"base_model.model.{key.removesuffix('.weight')}"
            peft[f"{place}.lora_A.weight"] = tensors[f"{name}.lora_down.weight"]
            peft[f"{place}.lora_B.weight"] = tensors[f"{name}.lora_up.weight"]
    (tmp_path / "peft").mkdir()
    save_file(peft, tmp_path / "peft" / "adapter_model.safetensors")
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 2}))
    done = convert(f"--input={tmp_path / 'peft'}", f"--output={again}", "--format=lora-kohya")
    assert_done(done)
    found = load_file(again)
    assert found.keys() == tensors.keys() and all(np.array_equal(found[key], tensors[key]) for key in tensors)
    for source, target in [(style, "a"), (tmp_path / "peft", "b")]:
        done = convert(f"--input={model}", f"--output={tmp_path / target}", "--format=diffusers", f"--merge={source}")
        assert_done(done)
    assert_same(tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b"))


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
        (("--input={style}", "--format=lora-peft"), "pass the base model as base (--base)"),
        (("--input={style}", "--format=lora-peft", "--base=shapes"), "to prompts of width 16, the model to 128"),
        (("--input={style}", "--format=ldm", "--base={model}"), "is a LoRA; use format lora-kohya"),
        (("--input={model}", "--format=lora-peft"), "is for LoRAs"),
        (("--input={style}", "--format=lora-peft", "--base={model}", "--merge={style}"), "omit merge"),
        (("--input={style}", "--format=lora-peft", "--base={model}", "--component=unet"), "omit component"),
        (("--input={style}", "--format=lora-peft", "--base={model}", "--with_ema"), "omit with_ema"),
        (("--input={style}", "--format=lora-peft", "--base={model}", "--dtype=float16"), "omit dtype"),
        (("--input={model}", "--format=ldm", "--merge={style}:much"), "'much' is not a number; write LORA or"),
    ],
)
def test_mistakes_with_a_lora_are_errors(model, style, tmp_path, arguments, message):
    output = tmp_path / "out.safetensors"
    done = convert(f"--output={output}", *(each.format(style=style, model=model) for each in arguments))
    assert done.returncode == 1 and message in done.stderr and not output.exists(), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "^dtype 'int8' is not supported; use float32, bfloat16, float16$"),
        ({"prediction_type": "x0"}, "^prediction_type 'x0' is not supported; use epsilon, sample, v_prediction$"),
    ],
)
def test_the_function_checks_what_flags_cannot(options, message, tmp_path):
    with pytest.raises(ModelError, match=message):
        conversion.convert("shapes", tmp_path / "a.safetensors", "ldm", **options)
    assert not list(tmp_path.iterdir())
