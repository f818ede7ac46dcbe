"""One step of latent consistency distillation in PyTorch and float64, written from the published method.

arXiv 2310.04378, algorithm 1. Independent of the package on purpose: arrays come in as numpy NHWC, networks are
diffusers' UNets (NCHW inside), every random number is an argument, and the formulas are written for one example.
"""

import math
from typing import NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch")


class Step(NamedTuple):
    z_s: np.ndarray  # [B, h, w, c], the noised latent
    z_t: np.ndarray  # [B, h, w, c], one guided DDIM step earlier
    prediction: np.ndarray  # [B, h, w, c], the student's, from z_s
    target: np.ndarray  # [B, h, w, c], the target network's, from z_t
    loss: float
    gradients: dict[str, np.ndarray]  # by the student's parameter names


def alphas_cumprod(first: float, last: float, steps: int = 1000) -> np.ndarray:
    """Scaled-linear: the square roots of beta are equally spaced. float64[steps]"""
    beta = (math.sqrt(first) + (math.sqrt(last) - math.sqrt(first)) * np.arange(steps) / (steps - 1)) ** 2
    return np.exp(np.cumsum(np.log1p(-beta)))


def embed_guidance(w: float, dim: int = 256) -> np.ndarray:
    frequency = [math.exp(-math.log(10000.0) * j / (dim // 2 - 1)) for j in range(dim // 2)]
    return np.array([wave(1000.0 * w * f) for wave in (math.sin, math.cos) for f in frequency])


def origin_and_noise(kind: str, output, z, abar: float):
    """What an output of the network says about the clean latent and about the noise, for one example."""
    alpha, sigma = math.sqrt(abar), math.sqrt(1.0 - abar)
    if kind == "epsilon":
        return (z - sigma * output) / alpha, output
    if kind == "sample":
        return output, (z - alpha * output) / sigma
    if kind == "v_prediction":
        return alpha * z - sigma * output, sigma * z + alpha * output
    raise ValueError(kind)


def consistency(kind: str, output, z, t: int, abar: float):
    u = 10.0 * t
    skip, out = 0.25 / (u * u + 0.25), u / math.sqrt(u * u + 0.25)
    return skip * z + out * origin_and_noise(kind, output, z, abar)[0]


def own_pictures(target, noise, context, embedding, *, abar, prediction_type) -> np.ndarray:
    """float64[B, h, w, c]: what the target network draws in one jump from noise: [B, h, w, c]."""
    pictures = []
    for i, e in enumerate(noise):
        z, t = torch.from_numpy(np.array(e, np.float64)).permute(2, 0, 1)[None], len(abar) - 1
        with torch.no_grad():
            output = target(
                z,
                torch.tensor([t]),
                encoder_hidden_states=torch.from_numpy(np.array(context[i : i + 1], np.float64)),
                timestep_cond=torch.from_numpy(np.array(embedding[i : i + 1], np.float64)),
            ).sample
        pictures.append(consistency(prediction_type, output, z, t, abar[t])[0].permute(1, 2, 0).numpy())
    return np.stack(pictures)


def distil(
    student,
    target,
    teacher,
    z,
    context,
    empty,
    noise,
    index,
    w,
    embedding,
    *,
    abar,
    prediction_type,
    distance,
    weighting="uniform",
    w_caps=(),
    huber_c=1e-3,
    steps=50,
) -> Step:
    """student, target, teacher: UNet2DConditionModel in float64; the first two have time_cond_proj_dim.

    z, noise: [B, h, w, c]; context: [B, L, D], the prompts that are distilled; empty: [1, L, D]; index: int[B] in
    0..steps-1; w: [B]; embedding: [B, 256], that of w; abar: float64[T]; distance: "l2" or "huber";
    weighting: "uniform" or "inverse_sigma"; w_caps: [(timestep, most)], a step that starts at or after the
    timestep of one has at most its w, the last of them being the one that counts.
    """

    def tensor(array):
        return torch.from_numpy(np.array(array, np.float64))

    def latent(array):
        return tensor(array).permute(0, 3, 1, 2)

    def run(unet, z, t, context, embedding=None):
        return unet(z, torch.tensor(t), encoder_hidden_states=context, timestep_cond=embedding).sample

    def each(function, *batches):
        return torch.stack([function(*items) for items in zip(*batches, strict=True)])

    z, noise, context, embedding = latent(z), latent(noise), tensor(context), tensor(embedding)
    empty = tensor(empty).expand(len(z), -1, -1)
    stride = len(abar) // steps
    starts = [(int(i) + 1) * stride - 1 for i in index]
    ends = [max(s - stride, 0) for s in starts]

    z_s = each(lambda z, e, s: math.sqrt(abar[s]) * z + math.sqrt(1 - abar[s]) * e, z, noise, starts)

    def solve(z_s, conditional, unconditional, s, t, w):
        if limits := [most for first, most in w_caps if s >= first]:
            w = min(w, limits[-1])
        x0_c, e_c = origin_and_noise(prediction_type, conditional, z_s, abar[s])
        x0_0, e_0 = origin_and_noise(prediction_type, unconditional, z_s, abar[s])
        x0, e = (1 + w) * x0_c - w * x0_0, (1 + w) * e_c - w * e_0
        return math.sqrt(abar[t]) * x0 + math.sqrt(1 - abar[t]) * e

    with torch.no_grad():
        conditional, unconditional = run(teacher, z_s, starts, context), run(teacher, z_s, starts, empty)
        z_t = each(solve, z_s, conditional, unconditional, starts, ends, [float(value) for value in w])

    def f(unet, z, times):
        outputs = run(unet, z, times, context, embedding)
        return each(lambda o, z, t: consistency(prediction_type, o, z, t, abar[t]), outputs, z, times)

    with torch.no_grad():
        goal = f(target, z_t, ends)
    prediction = f(student, z_s, starts)
    d = prediction - goal
    elements = d * d if distance == "l2" else torch.sqrt(d * d + huber_c**2) - huber_c
    if weighting == "inverse_sigma":
        elements = each(lambda x, s: x / math.sqrt(1 - abar[s]), elements, starts)
    loss = elements.mean()
    student.zero_grad()
    loss.backward()

    def picture(x):
        return x.detach().permute(0, 2, 3, 1).numpy()

    gradients = {name: parameter.grad.numpy().copy() for name, parameter in student.named_parameters()}
    return Step(picture(z_s), picture(z_t), picture(prediction), picture(goal), loss.item(), gradients)
