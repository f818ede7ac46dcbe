"""How ControlNets act while images are sampled: each has an image, a scale, and a window of timesteps."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.models.conditioning import Conditioning
from lcm_jax.models.controlnet import ControlNet
from lcm_jax.models.layers import apply
from lcm_jax.models.unet import Residuals


class Control(NamedTuple):
    """Inputs of one ControlNet, all of which may change without a new program; N is 1 (shared by all images) or B.

    image: float32[N, H, W, 3], RGB in [0, 1]. scale: float32[], the factor of its residuals. window: float32[2], the
    lowest and highest timestep at which it acts.
    """

    image: Any
    scale: Any
    window: Any


Controller = Callable[[jax.Array, jax.Array, Conditioning, int], Residuals]


def control_window(timesteps: np.ndarray, start: float, end: float) -> np.ndarray:
    """Return the window of a ControlNet that acts from `start` to `end`, fractions of the steps: float32[2].

    timesteps: those of the sampler's rows, [n], descending. As in diffusers, row i of n acts unless i / n < start or
    (i + 1) / n > end; without such a row the window is empty. Two rows at one timestep, as PNDM has, act together.
    """
    n = len(timesteps)
    acting = [t for i, t in enumerate(timesteps) if not (i / n < start or (i + 1) / n > end)]
    return np.array([min(acting, default=np.inf), max(acting, default=-np.inf)], np.float32)


def make_controller(nets: Sequence[ControlNet], params: Sequence[Any], controls: Sequence[Control]) -> Controller:
    """Return a function (z, t, conditioning, prompts) -> sum of the residuals of all nets, at least one.

    z: float32[B, h, w, c], without mask and masked latents; t: [B], all equal; conditioning: the UNet's. prompts:
    number of its first examples that have the prompt; the others have the negative prompt, and a net whose residuals
    are pooled does not act on them, as in diffusers. An LCM's guidance weight is an input of the UNet alone. params,
    controls: of each net.
    """
    # The images are the same at every step, and their features are computed once.
    features = [
        apply(net, each, control.image, method="embed")
        for net, each, control in zip(nets, params, controls, strict=True)
    ]

    def controller(z, t, conditioning, prompts):
        outputs = [
            _act(net, each, control, image, prompts, z, t, conditioning)
            for net, each, control, image in zip(nets, params, controls, features, strict=True)
        ]
        return jax.tree.map(lambda *arrays: sum(arrays[1:], arrays[0]), *outputs)

    return controller


def _act(net, params, control: Control, features, prompts: int, z, t, conditioning: Conditioning) -> Residuals:
    """Return the residuals of one net, zeros outside its window; then it is not evaluated."""

    def evaluate():
        count = prompts if net.config["global_pool_conditions"] else len(z)
        context, pooled, time_ids = (None if x is None else x[:count] for x in conditioning[:3])
        image = jnp.tile(features, (count // len(features), 1, 1, 1))
        inputs = (z[:count], t[:count], context, image, pooled, time_ids)
        residuals = apply(net, params, *inputs, method="residuals")
        rest = ((0, len(z) - count), (0, 0), (0, 0), (0, 0))
        return jax.tree.map(lambda x: jnp.pad(x * control.scale, rest), residuals)

    low, high = control.window
    acts = (control.scale != 0) & (low <= t[0]) & (t[0] <= high)
    zeros = jax.eval_shape(evaluate)
    return jax.lax.cond(acts, evaluate, lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), zeros))
