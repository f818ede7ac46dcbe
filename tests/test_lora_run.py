"""Whole runs of adapters: LCM-LoRA and a style, their files, their memory, and what is refused."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny_model
from whole_runs import load_config, shrunk

from lcm_jax import dry_run
from lcm_jax.conversion import convert
from lcm_jax.errors import Interrupted
from lcm_jax.models import lora
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.pipeline import Pipeline
from lcm_jax.recipes import check_config, make_task
from lcm_jax.training.loop import train
from lcm_jax.training.state import create_state, make_optimizer
from lcm_jax.training.step import make_loss, make_train_step
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.lora import read_file
from lcm_jax.weights.lora_files import read_adapters
from lcm_jax.weights.model import open_model


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny_model.write(tmp_path_factory.mktemp("models") / "teacher", unet=tiny_model.SHALLOW)


def run(config, workdir) -> bool:
    return train(make_task(config, workdir), config, workdir)


def size(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_an_lcm_lora_from_a_teacher_to_its_files(teacher, tmp_path, capsys):
    config = shrunk("lcm_lora:shapes", teacher)
    assert run(config, tmp_path / "run")
    export, base = tmp_path / "run" / "export", Pipeline.from_pretrained(teacher)
    assert {path.name for path in export.iterdir()} == {"pytorch_lora_weights.safetensors", "kohya.safetensors"}
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["guidance_scales"] == {"teacher": 8.0, "student": 1.0}

    # the run opens as the base with its adapters merged, which is what its export does to the base
    merged = Pipeline.from_pretrained(tmp_path / "run")
    assert merged.configs["scheduler"]["_class_name"] == "LCMScheduler" and merged.sampler == "lcm"
    stored = jax.tree.map(np.copy, base.params["unet"])
    assert base.load_lora(tmp_path / "run") == "run"
    for path, ours in jax.tree.leaves_with_path(merged.params["unet"]):
        theirs = base.params["unet"]
        for key in path:
            theirs = theirs[key.key]
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    base.unload_lora()
    for before, after in zip(jax.tree.leaves(stored), jax.tree.leaves(base.params["unet"]), strict=True):
        np.testing.assert_array_equal(before, after)
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), stored, merged.params["unet"])
    assert 0 < sum(jax.tree.leaves(changed)) < len(jax.tree.leaves(changed)), "adapted modules alone"
    convert(tmp_path / "run", tmp_path / "model", "diffusers", log=lambda _: None)
    assert open_model(tmp_path / "model").configs["scheduler"]["_class_name"] == "LCMScheduler"
    with pytest.raises(ModelError, match="has no moving average .*omit --ema"):
        open_model(tmp_path / "run", ema=True)

    # a LoRA to begin from must be of these settings
    more = shrunk("lcm_lora:shapes", teacher, **{"lora.init": str(export / "kohya.safetensors")})
    begun = make_task(more, tmp_path / "more").load_params()["lora"]
    settings = lora.LoRASettings(4, 8.0, ("to_q", "to_out.0", "conv1"))
    again = read_adapters(export, open_model_params(teacher), settings)
    for ours, theirs in zip(jax.tree.leaves(begun), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert any(np.abs(each["up"]).max() > 0 for each in lora.modules(begun).values())
    more.lora.rank = 2
    with pytest.raises(ModelError, match="has rank 4 in .*, and lora.rank is 2; set both the same"):
        make_task(more, tmp_path / "more")
    with pytest.raises(ModelError, match="kohya.safetensors is a LoRA, not a model; merge it"):
        make_task(shrunk("lcf:shapes", export / "kohya.safetensors"), tmp_path / "more")


def open_model_params(folder):
    return StableDiffusion.from_configs(open_model(folder).configs).abstract_params()["unet"]


def test_the_teacher_is_held_once_and_the_optimizer_has_the_adapters_alone(teacher, tmp_path):
    task = make_task(shrunk("lcm_lora:shapes", teacher), tmp_path / "run")
    config = shrunk("lcm_lora:shapes", teacher)
    optimizer = make_optimizer(config.optimizer, 2)
    state = create_state(task.load_params(), optimizer, average=False)
    frozen = task.load_frozen()
    networks = {name: tree for name, tree in frozen.items() if name != "empty_ids"}
    assert networks.keys() == {"unet", "vae", "text_encoder"} and state.ema is None
    base = Pipeline.from_pretrained(teacher)
    assert size(networks) == size(base.params), "one copy of each network"
    adapters = size(task.params)
    assert size(state.params) == adapters < size(networks["unet"]) / 2
    counters = 64  # Adam's moments, and a few counts
    assert 2 * adapters <= size(state.opt_state) <= 2 * adapters + counters

    # The target is the student itself, without a gradient; the base is what it was, and `up` leaves zero.
    step = make_train_step(
        task.objective, task.bind, task.prepare, optimizer, latents=task.latents, seed=0, ema_rate=0.0
    )
    batch = next(task.make_batches(frozen, 0))
    after, metrics = jax.jit(step)(state, frozen, batch)
    assert after.ema is None and np.isfinite(metrics["loss"]) and metrics["gradient_norm"] > 0
    assert after.average is after.params
    for each in lora.modules(after.params["lora"]).values():
        assert np.abs(each["up"]).max() > 0


def test_a_style_with_dropout_resumes_exactly(teacher, tmp_path):
    more = {"lora.dropout": 0.25, "train.accumulate": 2, "train.ema_rate": 0.5, "data.cache": str(tmp_path / "latents")}
    config = shrunk("shapes_style_lora", teacher, **more)
    assert run(config, tmp_path / "whole")
    adapters = lambda name: read_file(tmp_path / name / "export")[0]  # noqa: E731
    task = make_task(config, tmp_path / "parts")
    batches, calls = task.make_batches, []

    def stop_after_one(frozen, first):
        for number, batch in enumerate(batches(frozen, first)):
            if first == 0 and number == 1:
                raise KeyboardInterrupt
            calls.append(first + number)
            yield batch

    with pytest.raises(Interrupted):
        train(replace(task, make_batches=stop_after_one), config, tmp_path / "parts")
    assert run(config, tmp_path / "parts") and calls == [0]
    for key, tensor in adapters("whole").items():
        np.testing.assert_array_equal(tensor, adapters("parts")[key])


def test_settings_of_adapters_that_are_wrong_are_named(teacher, tmp_path):
    def refuse(match: str, **settings):
        with pytest.raises(ValueError, match=match):
            make_task(shrunk("lcm_lora:shapes", teacher, **settings), tmp_path / "run")

    refuse("lora.rank 0 is not supported; use a whole number", **{"lora.rank": 0})
    refuse("lora.rank 64 is above the width of .*; use at most 16", **{"lora.rank": 64})
    refuse("lora.targets 'to_x' matches no module; use some of .*to_q", **{"lora.targets": ("to_x",)})
    refuse("lora.dropout 1.0 is not supported", **{"lora.dropout": 1.0})
    refuse("lora.alpha -1.0 is not supported", **{"lora.alpha": -1.0})
    refuse("there is no LoRA '.*none.safetensors'", **{"lora.init": str(tmp_path / "none.safetensors")})
    config = shrunk("lcm_lora:shapes", teacher)
    with config.unlocked():
        config.lora.beta = 1
    with pytest.raises(ValueError, match="lora.beta is not a setting of LoRASettings"):
        make_task(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["lcm_lora:sd15", pytest.param("lcf:sdxl", marks=pytest.mark.slow)])
def test_full_size_runs_are_estimated_without_weights(name, capsys):
    config = load_config(*name.split(":"))
    config.mesh.data, config.train.batch_size = 1, 2
    found = dry_run.estimate(config)
    if "lora" in config:
        full = dry_run.estimate(dry_run.without_adapters(config))
        assert found["trained"] == {"lora": 67_252_224} and full["trained"]["unet"] > 859_000_000
        assert found["memory"]["their moving average"] == 0
        assert found["memory"]["optimizer moments"] < full["memory"]["optimizer moments"] / 12
        dry_run.show(found, full)
        assert "all of the UNet" in capsys.readouterr().out
    else:
        assert found["trained"].keys() == {"unet"} and "unet" not in found["frozen"]


@pytest.mark.parametrize("name", ["shapes_teacher", "shapes_vae"])
def test_a_model_from_scratch_has_no_adapters(name, tmp_path):
    config = load_config(name)
    with config.unlocked():
        config.lora = load_config("shapes_style_lora").lora
    with pytest.raises(ValueError, match="lora is not supported for a model that is trained from scratch; remove"):
        make_task(config, tmp_path / "run")


NAMES = ["lcm_lora:sd15", "lcm_lora:sdxl", "lcf:sd15", "lcf:sdxl", "finetune:shapes", "finetune:sd15", "finetune:sdxl"]


@pytest.mark.parametrize("name", NAMES)
def test_every_config_makes_a_step_in_small(name, teacher, tmp_path):
    """Its settings are accepted, and a step of its recipe can be traced with them."""
    check_config(load_config(*name.split(":")))
    scheduler = {"scheduler": "LCMScheduler"} if name.startswith("lcf") else {}
    model = tiny_model.write(tmp_path / "lcm", unet=tiny_model.SHALLOW, **scheduler) if scheduler else teacher
    small = {"data.source": "shapes", "data.size": 64, "data.held_out": 32, "data.length": 32, "metrics": ("frechet",)}
    task = make_task(shrunk(name, model, **small), tmp_path / "run")
    loss = make_loss(task.objective, task.bind, task.prepare)
    draws = jax.eval_shape(lambda: task.objective.draw(jax.random.key(0), task.latents))
    total, metrics = jax.eval_shape(loss, task.params, task.params, task.frozen, dict(task.batch), draws)
    assert total.shape == () and metrics["loss"].shape == ()
