"""What only an accelerator can show, in two minutes on one card: `pytest -m gpu`. Skipped without one."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from whole_runs import QUICK, shrunk_lcd

from lcm_jax.models import attention as attentions
from lcm_jax.models.attention import KERNELS, REFUSALS, Shape, choose_kernel, current_device
from lcm_jax.pipeline import Pipeline
from lcm_jax.recipes import RECIPES
from lcm_jax.training.loop import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() == "cpu", reason="there is no accelerator, or -m gpu was not given"),
]


@pytest.mark.parametrize("queries, keys", [(4096, 4096), (4096, 77), (1024, 1024), (256, 256), (77, 77)])
@pytest.mark.parametrize("head_dim", [40, 64, 80, 160])
def test_every_kernel_equals_plain(queries, keys, head_dim):
    """In bfloat16, forward and backward, against float32 on the host's numbers: all that the device offers."""
    rng = np.random.default_rng(0)
    numbers = [rng.standard_normal((1, n, 2, head_dim), np.float32) for n in (queries, keys, keys)]
    numbers = [jnp.asarray(x, jnp.bfloat16) for x in numbers]
    tangent = jnp.asarray(rng.standard_normal((1, queries, 2, head_dim)), jnp.float32)

    def both_ways(function, *arguments):
        out, pull = jax.vjp(lambda *a: function(*a).astype(jnp.float32), *arguments)
        return out, *pull(tangent)

    with jax.default_matmul_precision("highest"):
        plain = KERNELS["xla"]
        expected = jax.jit(lambda *a: both_ways(plain, *a))(*(x.astype(jnp.float32) for x in numbers))
    shape = Shape(queries, keys, head_dim, jnp.dtype(jnp.bfloat16))
    device = current_device()
    for name in [name for name in KERNELS if name not in REFUSALS or REFUSALS[name](device, shape) is None]:
        found = jax.jit(lambda *a, f=KERNELS[name]: both_ways(f, *a))(*numbers)
        for ours, theirs in zip(found, expected, strict=True):
            error = np.linalg.norm(np.float32(ours) - np.float32(theirs)) / np.linalg.norm(np.float32(theirs))
            assert error < 0.02, (name, error)


def test_a_small_distillation_in_bfloat16(tmp_path, monkeypatch):
    """Two updates of the real loop at 1,024 positions, which a CUDA device computes with the fused kernel."""
    chosen = []
    choose = lambda device, shape: chosen.append(choose_kernel(device, shape)) or chosen[-1]  # noqa: E731
    monkeypatch.setattr(attentions, "choose_kernel", choose)
    teacher = tiny_model.write(tmp_path / "teacher", unet=tiny_model.SHALLOW)
    losses = {}
    for dtype in ("float32", "bfloat16"):
        settings = {"data.size": 128, "train.dtype": dtype, "train.remat": "block", "data.cache": str(tmp_path / dtype)}
        config = shrunk_lcd(teacher, **QUICK | settings)
        task = RECIPES["lcd"](config, tmp_path / f"run-{dtype}")
        task = replace(task, write_preview=lambda *_: {}, on_complete=lambda *_: None)
        assert train(task, config, tmp_path / f"run-{dtype}")
        lines = (tmp_path / f"run-{dtype}" / "metrics.jsonl").read_text().splitlines()
        losses[dtype] = [json.loads(line)["loss"] for line in lines]
    assert bool({"cudnn", "flash"} & set(chosen)) == (current_device().platform in ("cuda", "tpu"))
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.1)


def test_sampling_equals_the_cpu():
    """The bundled student, four steps from the same latents, within 2 of 255."""
    latents = np.random.default_rng(0).standard_normal((2, 16, 16, 4)).astype(np.float32)
    images = {}
    for device in (jax.devices("cpu")[0], jax.devices()[0]):
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            pipe = Pipeline.from_pretrained("shapes-lcm")
            prompts = ["a red circle above a blue square", "three green triangles"]
            images[device.platform] = pipe(prompts, 4, 8.0, latents=latents, output_type="np").images
    ours, theirs = images.values()
    assert len(images) == 2 and np.abs(ours - theirs).max() * 255 <= 2 and ours.std() > 0.1
