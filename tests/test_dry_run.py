"""The dry run: its bytes are those of a real run on eight devices, its work that of an independent count."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_model
from jax._src.cudnn import fused_attention_stablehlo
from whole_runs import load_config

from lcm_jax import cost, dry_run
from lcm_jax.models import layers
from lcm_jax.recipes import RECIPES
from lcm_jax.training import sharding
from lcm_jax.training.loop import RunError
from lcm_jax.training.state import create_state, make_optimizer
from lcm_jax.training.step import make_loss

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return tiny_model.write(tmp_path_factory.mktemp("models") / "teacher", unet=tiny_model.SHALLOW)


def small(teacher: Path, **more):
    config = load_config("shapes")
    config.update_from_flattened_dict(
        {"teacher": str(teacher), "data.length": 32, "train.batch_size": 16, "optimizer.name": "adamw"} | more
    )
    return config


def on_first_device(tree) -> int:
    """The real bytes of `tree` on the first device."""
    device = jax.devices()[0]
    return sum(s.data.nbytes for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards if s.device == device)


@pytest.mark.parametrize(("data", "fsdp", "optimizer"), [(8, 1, "adamw"), (2, 4, "muon"), (1, 8, "adamw")])
def test_memory_is_the_bytes_of_a_real_state(data, fsdp, optimizer, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)  # so that these small parameters are split as large ones are
    more = {"mesh.data": data, "mesh.fsdp": fsdp, "optimizer.name": optimizer, "train.dtype": "bfloat16"}
    config = small(teacher, **more)
    found = dry_run.estimate(config)
    assert found["mesh"] == {"data": data, "fsdp": fsdp, "tensor": 1} and found["images_per_device"] == 2

    task = RECIPES["lcd"](config, tmp_path)
    mesh = sharding.make_mesh(data, fsdp)
    state = jax.eval_shape(lambda p: create_state(p, make_optimizer(config.optimizer, 10)), task.load_params())
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
    state = jax.device_put(state, sharding.tree_shardings(mesh, state))
    frozen = jax.device_put(task.load_frozen(), sharding.tree_shardings(mesh, task.frozen))
    task.encode_data()
    real = {
        "trained parameters": state.params,
        "their moving average": state.ema,
        "optimizer moments": state.opt_state,
        "gradients": state.params,
        "frozen parameters": frozen,
        "batch": sharding.put_batch(mesh, next(task.make_batches(0))),
    }
    assert found["memory"] == {name: on_first_device(tree) for name, tree in real.items()}
    assert found["frozen"].keys() == {"unet", "vae"}, "prompts are encoded beforehand"
    assert found["memory"]["trained parameters"] < 1.3 * found["trained"]["unet"] * 4 / fsdp
    assert found["trained"]["unet"] == found["frozen"]["unet"] + 256 * 16


def gradient_of(task):
    """The traced gradient of a task's loss for a whole batch."""
    draws = jax.eval_shape(lambda key: task.objective.draw(key, task.latents(task.batch)), jax.random.key(0))
    gradient = jax.grad(make_loss(task.objective, task.bind, task.prepare), has_aux=True)
    return jax.jit(gradient).trace(task.params, task.params, task.frozen, dict(task.batch), draws)


def test_work_is_what_xla_counts(tmp_path, monkeypatch):
    """Every matrix product and convolution of the traced step; XLA's count adds the work per element."""
    # XLA leaves products with padding out of its count: many, at this tiny size, of a convolution that upsamples.
    repeat = lambda x: x.repeat(2, axis=1).repeat(2, axis=2)  # noqa: E731
    monkeypatch.setattr(layers, "convolve_upsampled", lambda x, kernel: layers.convolve(repeat(x), kernel))
    teacher = tiny_model.write(tmp_path / "teacher")
    config = small(teacher, **{"mesh.data": 1, "objective.backward_simulation": 0.0})
    program = gradient_of(RECIPES["lcd"](config, tmp_path))
    found = dry_run.estimate(config)["flops"]
    assert found < program.lower().cost_analysis()["flops"] < 1.05 * found
    config.train.batch_size = 8
    np.testing.assert_allclose(found, 2 * dry_run.estimate(config)["flops"], rtol=0.02)


def test_work_of_loops_branches_and_fused_attention(monkeypatch):
    square = lambda x: x @ x  # noqa: E731
    x = np.zeros((8, 8), np.float32)
    once = 2 * 8**3
    count = lambda function, *arguments: cost.count_flops(jax.make_jaxpr(function)(*arguments).jaxpr)  # noqa: E731
    assert count(square, x) == once
    assert count(lambda x: jax.lax.scan(lambda c, _: (square(c), None), x, length=5)[0], x) == 5 * once
    assert count(lambda x: jax.lax.cond(x[0, 0] > 0, square, lambda x: square(square(x)), x), x) == 2 * once
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91200)
    query, key = (jax.ShapeDtypeStruct((2, n, 3, 8), "bfloat16") for n in (64, 32))
    fused = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, implementation="cudnn").sum()  # noqa: E731
    product = 2 * 2 * 3 * 64 * 32 * 8
    assert count(fused, query, key, key) == 2 * product
    assert count(jax.grad(fused, (0, 1, 2)), query, key, key) == (2 + 5) * product


def test_activations_are_about_what_xla_allocates(teacher, tmp_path):
    config = small(teacher, **{"mesh.data": 1, "objective.backward_simulation": 0.0})
    real = gradient_of(RECIPES["lcd"](config, tmp_path)).lower().compile().memory_analysis().temp_size_in_bytes
    estimated = dry_run.estimate(config)["activations"]
    assert 0.8 * real < estimated < 2 * real, (real, estimated)


def test_the_peak_of_a_program_counted_by_hand():
    """x: 400 bytes in. y and z are alive together, then z and the product; the output is not counted."""

    def program(x):
        y = x + 1.0
        z = y * 2.0
        return (z * y).sum()

    jaxpr = jax.make_jaxpr(program)(np.zeros(100, np.float32)).jaxpr
    assert cost.peak_bytes(jaxpr) == 1200
    attention = jax.make_jaxpr(lambda q: (q @ q.swapaxes(2, 3)).sum())(np.zeros((2, 4, 1024, 8), np.float32)).jaxpr
    logits, transposed = 2 * 4 * 1024 * 1024 * 4, 2 * 4 * 1024 * 8 * 4
    assert cost.peak_bytes(attention) == logits + transposed


def test_accumulation_halves_activations_and_doubles_gradients(teacher):
    whole = dry_run.estimate(small(teacher, **{"mesh.data": 1}))
    parts = dry_run.estimate(small(teacher, **{"mesh.data": 1, "train.accumulate": 2}))
    assert parts["memory"]["gradients"] == 2 * whole["memory"]["gradients"]
    assert parts["memory"]["batch"] == whole["memory"]["batch"]
    assert parts["activations"] < 0.7 * whole["activations"]
    np.testing.assert_allclose(parts["flops"], whole["flops"], rtol=0.02)


def test_a_solver_of_second_order_adds_a_guided_pass_of_the_teacher(teacher):
    """Passes of one network for each example: 3 of the student, 1 of the target and 2 or 4 of the teacher."""
    more = {"mesh.data": 1, "objective.backward_simulation": 0.0}
    ddim, dpm = (dry_run.estimate(small(teacher, **more, **{"objective.solver": each})) for each in ("ddim", "dpm"))
    np.testing.assert_allclose(dpm["flops"] / ddim["flops"], 8 / 6, rtol=0.03)


def test_every_objective_is_estimated():
    vae = dry_run.estimate(load_config("shapes_vae"))
    assert vae["title"] == "autoencoder from scratch" and vae["trained"].keys() == {"autoencoder"} and vae["flops"] > 0
    config = load_config("shapes_teacher")
    config.autoencoder = "shapes"
    teacher = dry_run.estimate(config)
    assert teacher["title"] == "diffusion from shapes"
    assert teacher["trained"].keys() == {"unet", "text_encoder"} and teacher["frozen"].keys() == {"vae"}
    assert teacher["frozen"] == {"vae": vae["trained"]["autoencoder"]} and teacher["flops"] > vae["flops"] / 100
    dry_run.show(teacher)


def test_what_cannot_be_estimated_is_one_error(teacher):
    with pytest.raises(RunError, match="train.batch_size 16 is not a multiple"):
        dry_run.estimate(small(teacher, **{"mesh.data": 5}))
    with pytest.raises(ValueError, match="mesh.fsdp 0 is not supported"):
        dry_run.estimate(small(teacher, **{"mesh.data": 1, "mesh.fsdp": 0}))
    config = load_config("lcd", "sd15")
    config.family = "sd4"
    with pytest.raises(ValueError, match="config.family is 'sd4'"):
        dry_run.estimate(config)


def command(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "lcm_jax.main", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=240,
        env=environment,
    )


def test_the_command_at_full_size_needs_neither_weights_nor_memory(tmp_path):
    """SD 1.5 on eight devices that are not there, by the published counts; no file is written.

    LCM-LoRA, beside LCD of all of the UNet, of which each device holds a quarter of what it trains.
    """
    before = sorted(path.name for path in ROOT.iterdir())
    done = command("--config=lcm_lora:sd15", "--dry_run", "--config.mesh.data=2", "--config.mesh.fsdp=4")
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines()]
    assert ["lora", "trained", "67.3"] in rows and ["unet", "frozen", "859.5"] in rows
    memory = {row[0]: row[1:] for row in rows if len(row) == 3}
    assert memory["trained parameters"] == ["0.07 GB", "0.86 GB"]
    assert memory["optimizer moments"] == ["0.13 GB", "1.72 GB"]
    assert memory["their moving average"] == ["0.00 GB", "0.86 GB"]
    assert memory["frozen parameters"][0] == memory["frozen parameters"][1]
    assert "data 2, fsdp 4, tensor 1; 12 images on each" in done.stdout
    clusters = {row[0]: row[1:3] for row in rows if len(row) == 9}
    assert clusters["64 x H100"] == ["16 x 4 x 1", "768"] and "TPU v5e-256" in clusters
    assert "NVIDIA H100" in done.stdout and "TFLOP per step of 96 images" in done.stdout
    assert sorted(path.name for path in ROOT.iterdir()) == before
    wrong = command("--config=configs/lcd.py:sd3", "--dry_run")
    assert wrong.returncode and "choose one of sd15" in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd21", "sd21-768", "sdxl", "ssd1b"])
def test_every_published_model_at_full_size(name):
    config = load_config("lcd", name)
    config.mesh.data = 8
    found = dry_run.estimate(config)
    assert found["flops"] > 1e14 and sum(found["memory"].values()) > 1e10
