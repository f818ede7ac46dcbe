"""JSON files of models that are damaged or hostile: a right result, or an error of one or two lines."""

import copy
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_model
from odd_values import VALUES
from safetensors.numpy import load_file, save_file

from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.pipeline import Pipeline
from lcm_jax.weights import diffusers_folder as folders
from lcm_jax.weights import lora as loras
from lcm_jax.weights import orbax_tree
from lcm_jax.weights.model import open_model
from lcm_jax.weights.preset import Preset

WHOLE = ("null", "[]", "[1]", "3", '"text"', "", "{", "nul", "NaN", '{"a": 1} 2', "\x00", "[" * 100_000, "{}", "é")


def mutate(text: str, rng: random.Random) -> bytes:
    """Another file in the place of a JSON file."""
    kind = rng.random()
    if kind < 0.08:
        return rng.choice(WHOLE).encode(rng.choice(["utf-8", "latin-1", "utf-16"]))
    if kind < 0.12:
        return text[: rng.randrange(len(text))].encode()
    content = json.loads(text)
    parents = [content]
    for parent in parents:  # grows while it is read
        each = parent.values() if isinstance(parent, dict) else parent
        parents += [child for child in each if isinstance(child, dict | list)]
    parent = rng.choice([parent for parent in parents if parent])
    key = rng.choice(sorted(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
    if kind < 0.2:
        del parent[key]
    elif kind < 0.25:
        parent[key] = [copy.deepcopy(parent[key])]
    elif kind < 0.28 and isinstance(parent, dict):
        parent[f"{key}\n{key}"] = parent.pop(key)
    else:
        parent[key] = rng.choice(VALUES)
    text = json.dumps(content)
    if kind < 0.3:  # a key that is there twice
        text = text.replace("{", '{"_class_name": 3, "r": null, ', 1)
    return text.encode(rng.choice(["utf-8", "utf-8-sig", "utf-16"]) if kind > 0.9 else "utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model with its UNet in two shards, a LoRA in the two ways that PEFT's settings come, an orbax model, a run."""
    folder = tmp_path_factory.mktemp("json")
    model = tiny_model.write(folder / "model", unet=tiny_model.SHALLOW)
    preset = Preset("lcm", 4, 8.0, (4.0, 8.0))
    folders.write_json(model / "preset.json", preset.to_json())
    whole = model / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    keys = sorted(tensors)
    placed = {key: f"diffusion_pytorch_model-0000{1 + (key > keys[20])}-of-00002.safetensors" for key in keys}
    for name in set(placed.values()):
        save_file({key: tensors[key] for key in keys if placed[key] == name}, model / "unet" / name)
    index = {"metadata": {"total_size": 1}, "weight_map": placed}
    (model / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))

    key = next(key for key in keys if key.endswith("attn2.to_k.weight"))
    down, up = np.ones((2, tensors[key].shape[1]), np.float32), np.ones((len(tensors[key]), 2), np.float32)
    module = key.removesuffix(".weight")
    settings = {"r": 4, "lora_alpha": 3.0, "use_rslora": False, "use_dora": False, "alpha_pattern": {module: 16}}
    settings |= {"rank_pattern": {"to_k": 2}, "bias": "none", "target_modules": ["to_k"], "peft_type": "LORA"}
    peft = {"base_model.model." + module + ".lora_A.weight": down, "base_model.model." + module + ".lora_B.weight": up}
    (folder / "lora").mkdir()
    save_file(peft, folder / "lora" / "adapter_model.safetensors")
    (folder / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "settings.json").write_text(json.dumps({f"unet.{key}": value for key, value in settings.items()}))

    configs = {n: json.loads((model / n / "config.json").read_text()) for n in ("unet", "vae", "text_encoder")}
    configs["scheduler"] = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    index = json.loads((model / "model_index.json").read_text())
    about = {"family": "sd1", "configs": configs, "index": index, "guessed": ["sample_size"]}
    about |= {"preset": preset.to_json()}
    (folder / "orbax").mkdir()
    (folder / "orbax" / "configs.json").write_text(json.dumps(about))
    config: dict = {"objective": {"name": "lcd", "num_ddim_steps": 8, "w_min": 3.0, "w_max": 7.0}}
    config |= {"teacher": str(model), "sample": {"student_steps": [1, 4], "guidance_scale": 8.0}}
    (folder / "run" / "checkpoints").mkdir(parents=True)
    (folder / "run" / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(autouse=True)
def without_tracing_and_checkpoints(monkeypatch):
    """Networks of the same configs are traced once; there are checkpoints of one array, without files."""
    traced, known = StableDiffusion.abstract_params, {}

    def abstract_params(model):
        parts = (model.unet.config, model.vae.config, model.text_encoder.config)
        if parts not in known:
            known[parts] = traced(model)
        return known[parts]

    monkeypatch.setattr(StableDiffusion, "abstract_params", abstract_params)
    tree = {"unet": {"conv_in": {"bias": np.zeros(3, np.float32)}}}
    monkeypatch.setattr(orbax_tree, "read_specs", lambda folder, step: (3, tree | {"ema": tree}))


def open_settings(folder: Path, base: dict):
    """A LoRA whose settings are among the metadata of its file, as diffusers writes it."""
    tensors, _ = loras.read_file(folder / "lora")
    text = (folder / "settings.json").read_bytes().decode("utf-8", "replace")
    tensors = {key.replace("base_model.model.", "unet."): tensor for key, tensor in tensors.items()}
    save_file(tensors, folder / "style.safetensors", {loras.METADATA: text})
    return loras.open_lora(folder / "style.safetensors", base)


PARTS = {
    "model/model_index.json": "model",
    "model/unet/config.json": "model",
    "model/vae/config.json": "model",
    "model/text_encoder/config.json": "model",
    "model/scheduler/scheduler_config.json": "model",
    "model/preset.json": "model",
    "model/unet/diffusion_pytorch_model.safetensors.index.json": "model",
    "model/tokenizer/vocab.json": "tokenizer",
    "model/tokenizer/tokenizer_config.json": "tokenizer",
    "model/tokenizer/special_tokens_map.json": "tokenizer",
    "model/tokenizer/tokenizer.json": "tokenizer",
    "lora/adapter_config.json": "lora",
    "settings.json": "style",
    "orbax/configs.json": "orbax",
    "run/config.json": "run",
}


NAMED = {"settings.json": "style.safetensors", "orbax/configs.json": "config", "run/config.json": "run"}


def opened(folder: Path, part: str, base: dict) -> None:
    if part == "lora":
        loras.open_lora(folder / "lora", base)
    elif part == "style":
        open_settings(folder, base)
    elif part in ("orbax", "run"):
        model = open_model(str(folder / part))
        StableDiffusion.from_configs(model.configs)
    else:
        Pipeline.from_pretrained(folder / "model")


def test_300_mutations_end_in_a_model_or_in_two_lines(folder, tmp_path):
    rng, here = random.Random(0), tmp_path / "here"
    shutil.copytree(folder, here)
    text = (here / "run" / "config.json").read_text()
    (here / "run" / "config.json").write_text(text.replace(str(folder), str(here)))
    shards = (folder / "model" / "unet").glob("*.safetensors")
    base = {"unet": {key: tensor for path in shards for key, tensor in load_file(path).items()}}
    for part in sorted(set(PARTS.values())):
        opened(here, part, base)
    wrong, failed = [], 0
    for number in range(300):
        file = sorted(PARTS)[number % len(PARTS)]
        before = (here / file).read_bytes()
        after = mutate(before.decode(), rng)
        (here / file).write_bytes(after)
        try:
            opened(here, PARTS[file], base)
        except ValueError as error:  # ModelError is one
            failed += 1
            said = str(error)
            name = "tokenizer" if "tokenizer/" in file else NAMED.get(file, Path(file).name)
            if len(said.splitlines()) > 2 or name not in said or len(said) > 1500:
                wrong.append(f"{file}: {after[:80]!r}: {said[:300]}")
        except Exception as error:
            wrong.append(f"{file}: {after[:300]!r}: {type(error).__name__} {str(error)[:300]}")
        finally:
            (here / file).write_bytes(before)
    assert not wrong, f"{len(wrong)} of 300:\n" + "\n".join(wrong)
    assert failed > 150
