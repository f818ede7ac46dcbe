"""A network that jax and torch compute alike, and what a comparison of samplers with diffusers' schedulers shares."""

import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.diffusion.samplers import SAMPLERS

torch = pytest.importorskip("torch")

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
Z = np.random.default_rng(0).standard_normal((2, 2, 3, 1)).astype(np.float32)
ROWS = 51  # of padded tables
NOISE = jnp.asarray(np.random.default_rng(5).standard_normal((ROWS, *Z.shape)), jnp.float32)
# What a config needs for its class to sample as Stable Diffusion does.
NEEDED = {"ddim": {"clip_sample": False}, "pndm": {"skip_prk_steps": True}}
CONSISTENCY = [name for name, sampler in SAMPLERS.items() if sampler.consistency]
SOLVERS = [name for name in SAMPLERS if name not in CONSISTENCY]
UNFORCED = [name for name in SAMPLERS if not name.endswith("_karras")]  # the others differ in their tables alone


def network(z, t):
    """Stands for a network in jax: bounded, different at every z and t."""
    return jnp.tanh(z * 0.7 + 0.1) * (1 - t.reshape(-1, 1, 1, 1) / 3000.0)


def torch_network(z, t):
    return torch.tanh(z * 0.7 + 0.1) * (1 - t / 3000.0)


def assert_same(ours, theirs, tolerance=5e-5):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def draw_as_given(scheduler, monkeypatch) -> None:
    """Let the scheduler of diffusers draw the noise of NOISE, beginning with the first."""
    drawn = iter(np.asarray(NOISE))
    module = type(scheduler).__module__
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, **__: torch.tensor(next(drawn)), raising=False)
