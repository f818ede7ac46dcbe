"""One step of latent consistency fine-tuning in PyTorch and float64, written from the published method.

arXiv 2310.04378, section 4.4. The formulas of single examples are those of `reference_lcd`.
"""

import math

import numpy as np
import pytest
from reference_lcd import consistency

torch = pytest.importorskip("torch")


def fine_tune(
    student,
    target,
    z,
    context,
    noise,
    index,
    embedding,
    *,
    abar,
    prediction_type,
    distance,
    weighting="uniform",
    huber_c=1e-3,
    steps=50,
) -> tuple[float, dict[str, np.ndarray]]:
    """Return the loss and the gradient of each of the student's parameters by name.

    student, target: UNet2DConditionModel in float64, with time_cond_proj_dim unless embedding is None. z, noise:
    [B, h, w, c]; context: [B, L, D]; index: int[B] in 0..steps-1; embedding: [B, 256], that of w.
    """
    stride, losses = len(abar) // steps, []
    student.zero_grad()
    for i in range(len(z)):
        start = (int(index[i]) + 1) * stride - 1
        end = max(start - stride, 0)

        def predict(unet, t, i=i):
            # The same latent and the same noise at both ends of the step.
            clean, e = (torch.from_numpy(np.array(x[i : i + 1], np.float64)).permute(0, 3, 1, 2) for x in (z, noise))
            noisy = math.sqrt(abar[t]) * clean + math.sqrt(1 - abar[t]) * e
            told = None if embedding is None else torch.from_numpy(np.array(embedding[i : i + 1], np.float64))
            prompt = torch.from_numpy(np.array(context[i : i + 1], np.float64))
            output = unet(noisy, torch.tensor([t]), encoder_hidden_states=prompt, timestep_cond=told).sample
            return consistency(prediction_type, output, noisy, t, abar[t])

        with torch.no_grad():
            goal = predict(target, end)
        d = predict(student, start) - goal
        elements = d * d if distance == "l2" else torch.sqrt(d * d + huber_c**2) - huber_c
        scale = 1 / math.sqrt(1 - abar[start]) if weighting == "inverse_sigma" else 1.0
        losses.append(scale * elements.mean())
    loss = sum(losses) / len(losses)
    loss.backward()
    gradients = {name: parameter.grad.numpy().copy() for name, parameter in student.named_parameters()}
    return loss.item(), gradients
