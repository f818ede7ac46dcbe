"""Whole runs of adapters: LCM-LoRA and a style, their files, their memory, and what is refused."""

import json
from functools import partial
from unittest.mock import patch

import jax
import numpy as np
import optax
import pytest
import tiny_model
from running import run, run_until, run_without_images
from whole_runs import load_config, shrunk

from lcm_jax import dry_run
from lcm_jax.conversion import convert
from lcm_jax.models import lora
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.pipeline import Pipeline
from lcm_jax.recipes import make_task
from lcm_jax.training import sharded_step, sharding
from lcm_jax.training.state import create_state, make_optimizer
from lcm_jax.weights import orbax_folder
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.lora_files import read_adapters, write_adapters
from lcm_jax.weights.model import open_model
from lcm_jax.weights.preset import Preset

SETTINGS = lora.LoRASettings(4, 8.0, ("to_q", "to_out.0", "conv1"))  # of `shrunk`


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny_model.write(tmp_path_factory.mktemp("models") / "teacher", unet=tiny_model.SHALLOW)


def size(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def unet_shapes(folder):
    return StableDiffusion.from_configs(open_model(folder).configs).abstract_params()["unet"]


def test_an_lcm_lora_from_a_teacher_to_its_files(teacher, tmp_path, capsys):
    config = shrunk("lcm_lora:shapes", teacher, **{"lora.dropout": 0.1, "metrics": ("frechet",)})
    assert config.objective.backward_simulation > 0, "the student's own images have no dropout"
    assert run(config, tmp_path / "run")
    export, base = tmp_path / "run" / "export", Pipeline.from_pretrained(teacher)
    assert {path.name for path in export.iterdir()} == {"pytorch_lora_weights.safetensors", "kohya.safetensors"}
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["guidance_scales"] == {"teacher": 8.0, "student": 1.0}

    # The state has nothing but the adapters, and both files have those of the last checkpoint.
    step, tree = orbax_folder.read_tree(tmp_path / "run" / "checkpoints", None)
    adapters = orbax_folder.read_arrays(tmp_path / "run" / "checkpoints", step, "params", "lora")
    assert step == 2 and tree["params"].keys() == {"lora"} and not tree["ema"]
    assert 2 * size(adapters) <= size(tree["opt_state"]) <= 2 * size(adapters) + 64, "moments, and a few counts"
    for name in ("pytorch_lora_weights.safetensors", "kohya.safetensors"):
        same(read_adapters(export / name, unet_shapes(teacher), SETTINGS), adapters)
    assert all(np.abs(each["up"]).max() > 0 for each in lora.modules(adapters).values()), "zero before training"

    # The run opens as the base with its adapters merged, which is what its export does to the base.
    merged = Pipeline.from_pretrained(tmp_path / "run")
    assert merged.configs["scheduler"]["_class_name"] == "LCMScheduler" and merged.sampler == "lcm"
    stored = jax.tree.map(np.copy, base.params["unet"])
    assert base.load_lora(tmp_path / "run") == "run"
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), merged.params["unet"], base.params["unet"])
    assert merged.preset == base.preset == Preset("lcm", 1, 1.0), "of its previews, without guidance"
    base.unload_lora()
    assert base.preset == Preset(None, 50, 7.5)
    same(stored, base.params["unet"])
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), stored, merged.params["unet"])
    assert sum(jax.tree.leaves(changed)) == len(lora.modules(adapters)), "adapted modules alone"
    convert(tmp_path / "run", tmp_path / "model", "diffusers", log=lambda _: None)
    converted = open_model(tmp_path / "model")
    assert converted.configs["scheduler"]["_class_name"] == "LCMScheduler"
    assert converted.index["_class_name"] == "StableDiffusionPipeline", "of diffusers, the one without guidance input"
    with pytest.raises(ModelError, match="has no moving average .*omit --ema"):
        open_model(tmp_path / "run", ema=True)

    # It is an LCM, which a LoRA file is not.
    make_task(shrunk("lcf:shapes", tmp_path / "run"), tmp_path / "more")
    assert "has no input for the guidance weight: it is trained at the one weight" in capsys.readouterr().out
    with pytest.raises(ModelError, match="kohya.safetensors is a LoRA, not a model; merge it"):
        make_task(shrunk("lcf:shapes", export / "kohya.safetensors"), tmp_path / "more")
    with pytest.raises(ValueError, match="teacher '.*run' is already a latent consistency model; use its own teacher"):
        make_task(shrunk("lcm_lora:shapes", tmp_path / "run"), tmp_path / "more")

    # Other adapters may begin from these, with the same settings.
    more = shrunk("lcm_lora:shapes", teacher, **{"lora.init": str(export / "kohya.safetensors")})
    same(make_task(more, tmp_path / "more").load_params(), {"lora": adapters})
    more.lora.rank = 2
    with pytest.raises(ModelError, match="has rank 4 in .*, and lora.rank is 2; set both the same"):
        make_task(more, tmp_path / "more")

    # alpha is in the config alone; without a config of the group, the adapters are not known.
    text = (tmp_path / "run" / "config.json").read_text()
    for broken in ("0.0", "NaN", '"8"', "null"):
        (tmp_path / "run" / "config.json").write_text(text.replace('"alpha": 8.0', f'"alpha": {broken}'))
        with pytest.raises(ModelError, match=r"config.json: lora.alpha .* is not supported; use a number above 0"):
            open_model(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(json.dumps(json.loads(text) | {"lora": None}))
    with pytest.raises(ModelError, match="run trains no LoRA"):
        open_model(tmp_path / "run")


def test_the_teacher_is_held_once_and_the_optimizer_has_the_adapters_alone(teacher, tmp_path):
    config = shrunk("lcm_lora:shapes", teacher)
    task = make_task(config, tmp_path / "run")
    state = create_state(task.load_params(), make_optimizer(config.optimizer, 2), average=False)
    networks = {name: tree for name, tree in task.load_frozen().items() if name != "empty_prompt"}
    base = Pipeline.from_pretrained(teacher).params
    del base["text_encoder"]  # the cache has its prompts encoded
    same(networks, base)
    assert size(networks) == size(base), "one copy of each network"
    adapters = size(task.params)
    assert size(state.params) == adapters < size(networks["unet"]) / 2
    assert 3 * adapters <= size(state) <= 3 * adapters + 64, "adapters and their moments"
    bound = task.bind(state.params, state.average, networks)
    assert state.ema is None and bound.target == bound.student and bound.student.unet is networks["unet"]


def test_a_style_with_dropout_and_a_moving_average_resumes_exactly(teacher, tmp_path, capsys):
    more = {"lora.dropout": 0.25, "train.ema_rate": 0.5, "data.cache": str(tmp_path / "latents")}
    config = shrunk("shapes_style_lora", teacher, **more)
    assert run_without_images(config, tmp_path / "whole")
    run_until(config, tmp_path / "parts", 1)
    assert run(config, tmp_path / "parts") and "at step 1" in capsys.readouterr().out
    report = json.loads((tmp_path / "parts" / "report.json").read_text())
    assert "guidance_scales" not in report and report["student"]["ddim"].keys() == {"1"}

    def arrays(name, part):
        return orbax_folder.read_arrays(tmp_path / name / "checkpoints", 2, part, "lora")

    same(arrays("whole", "params"), arrays("parts", "params"))
    exported = read_adapters(tmp_path / "parts" / "export", unet_shapes(teacher), SETTINGS)
    same(exported, arrays("whole", "ema"))
    assert open_model(tmp_path / "whole", ema=True).name.endswith("the EMA target at step 2")


def test_dropout_is_the_same_in_micro_batches_on_several_devices(teacher, tmp_path, monkeypatch):
    """A step on 2 x 2 devices in two micro-batches equals one at once on one device: its loss and every gradient."""
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
    config = shrunk("shapes_style_lora", teacher, **{"lora.dropout": 0.5, "data.cache": str(tmp_path / "latents")})
    task = make_task(config, tmp_path / "run")
    frozen, rng = task.load_frozen(), np.random.default_rng(0)
    task.encode_data()
    batch = next(task.make_batches(0))
    random = lambda leaf: np.float32(leaf + 0.1 * rng.standard_normal(leaf.shape))  # noqa: E731
    params = jax.tree.map(random, jax.device_get(task.load_params()))  # up is not zero, so that down has a gradient

    def update(mesh, accumulate):
        config.train.accumulate = accumulate
        with patch.object(sharded_step, "make_optimizer", lambda *_: optax.sgd(1.0)):  # by the gradient itself
            step = sharded_step.make_sharded_step(task, config, mesh)
        placed = [
            jax.device_put(x, sharded_step.placement(like))
            for x, like in ((step.create(params), step.state), (frozen, step.frozen))
        ]
        after, metrics = step.jitted(*placed, sharding.put_batch(mesh, batch))
        assert after.ema is None
        return jax.device_get((after.params, metrics))

    (one, metrics), (parts, theirs) = update(sharding.make_mesh(1, 1), 1), update(sharding.make_mesh(2, 2), 2)
    for name, value in metrics.items():
        np.testing.assert_allclose(theirs[name], value, rtol=1e-5)

    def close(before, a, b):
        assert np.abs(a - before).max() > 0
        np.testing.assert_allclose(a - before, b - before, rtol=0, atol=1e-4 * np.abs(a - before).max())

    jax.tree.map(close, params, one, parts)


def test_settings_of_adapters_that_are_wrong_are_named(teacher, tmp_path):
    def refuse(match: str, **settings):
        with pytest.raises(ValueError, match=match) as error:
            make_task(shrunk("lcm_lora:shapes", teacher, **settings), tmp_path / "run")
        assert "\n" not in str(error.value)

    refuse("lora.rank 0 is not supported; use a whole number", **{"lora.rank": 0})
    refuse("lora.rank 64 is above the width of .*; use at most 16", **{"lora.rank": 64})
    refuse("lora.targets 'to_x' matches no module; use some of .*to_q", **{"lora.targets": ("to_x",)})
    refuse("there is no LoRA '.*none.safetensors'", **{"lora.init": str(tmp_path / "none.safetensors")})
    block = {"attn2": {"to_k": {"down": np.ones((12, 4), np.float32), "up": np.ones((4, 16), np.float32)}}}
    write_adapters(tmp_path / "other", {"mid_block": {"attentions_0": {"transformer_blocks_0": block}}}, 8.0)
    settings = {"lora.init": str(tmp_path / "other"), "lora.targets": ("attn2.to_k",)}
    refuse("other: 1 of 1 modules .* to prompts of width 12, the model to 16; use the base it was trained", **settings)
    config = shrunk("lcm_lora:shapes", teacher)
    with config.unlocked():
        config.lora.beta = 1
    with pytest.raises(ValueError, match="lora.beta is not a setting of LoRASettings"):
        make_task(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lcm_lora:sdxl", "lcf:sd15", "lcf:sdxl", "finetune:sd15"])
def test_full_size_runs_are_estimated_without_weights(name):
    config = load_config(*name.split(":"))
    config.mesh.data, config.train.batch_size = 1, 2
    found = dry_run.estimate(config)
    if "lora" in config:
        assert found["trained"] == {"lora": 196_751_360} and found["memory"]["their moving average"] == 0
    else:
        assert found["trained"].keys() == {"unet"} and "unet" not in found["frozen"]
