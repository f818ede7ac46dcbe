"""Weights of Mask2Former as transformers publishes them, to the parameter tree of models/mask2former.py."""

import re
from collections.abc import Mapping
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.models.layers import abstract_network
from lcm_jax.models.mask2former import STRIDE, Mask2Former, Mask2FormerConfig
from lcm_jax.weights.trees import Params, to_params

# Weights of the loss, indices that follow from the window's size, and a norm after the last stage of the backbone, in
# place of which the norms of the stages are used.
UNUSED = re.compile(r"^criterion\.|\.relative_position_index$|\.encoder\.(swin\.)?layernorm\.")


def abstract_params(config: Mask2FormerConfig) -> Params:
    """Return the parameters of the network as ShapeDtypeStructs."""
    network = cast(nn.Module, Mask2Former(config))
    return abstract_network(network, jax.ShapeDtypeStruct((1, STRIDE, STRIDE, 3), jnp.float32))


def mask2former_params(tensors: Mapping[str, np.ndarray], config: Mask2FormerConfig, where: str) -> Params:
    """Return the float32 parameters of a Mask2Former from the tensors of a file.

    where: names the file in errors. Raises ModelError that names the keys that are missing, extra or misshapen.
    """
    used = {key: tensors[key] for key in tensors if not UNUSED.search(key)}
    return to_params("Mask2Former", used, abstract_params(config), where, cast=lambda _: np.float32)
