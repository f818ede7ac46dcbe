"""Weights of an Inception v3 that nobody trained, whose features differ from image to image."""

import numpy as np

from lcm_jax.models.inception import InceptionV3, abstract_inception
from lcm_jax.weights.trees import from_params


def random_state_dict(abstract, seed: int = 0) -> dict[str, np.ndarray]:
    """Return float32 tensors under PyTorch's keys for a network of convolutions and batch normalizations.

    Kernels keep the variance of what they are applied to, so that no layer collapses; statistics differ by channel.
    """
    rng = np.random.default_rng(seed)
    tensors = {}
    for key, spec in from_params(abstract).specs.items():
        shape, leaf = spec.shape, key.split(".")[-1]
        if len(shape) > 1:
            value = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
        elif leaf == "running_var" or leaf == "weight":
            value = rng.uniform(0.7, 1.3, shape)
        else:
            value = rng.normal(0, 0.2, shape)
        tensors[key] = value.astype(np.float32)
    return tensors


def random_inception() -> dict[str, np.ndarray]:
    """Return the tensors of the published file, the classifier's among them."""
    tensors = random_state_dict(abstract_inception(InceptionV3()))
    return tensors | {"fc.weight": np.zeros((1008, 2048), np.float32), "fc.bias": np.zeros(1008, np.float32)}
