"""Rematerialization: the activations that a backward pass finds stored, and those that it computes a second time."""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

# Names of the activations that layers mark.
CONVOLUTION, ATTENTION = "convolution", "attention"
# cuDNN's fused attention, whose backward pass needs the softmax statistics of the forward pass too.
FUSED_ATTENTION = "dot_product_attention_fwd_wrapper"

Wrap = Callable[[type[nn.Module]], type[nn.Module]]


def mark(x: jax.Array, name: str) -> jax.Array:
    """Return x with a name, by which "save_convs_and_attention" stores it."""
    return checkpoint_name(x, name)


def save_convs_and_attention(primitive, *_, **params) -> bool:
    """Return True for an operation whose results are stored: the policy of `jax.checkpoint` of that name."""
    return params.get("name") in (CONVOLUTION, ATTENTION) or primitive.name == FUSED_ATTENTION


POLICIES: Mapping[str, Wrap] = {
    "none": lambda block: block,
    "block": nn.remat,
    "save_convs_and_attention": lambda block: nn.remat(block, policy=save_convs_and_attention),
}


def rematerialize(remat: str) -> Wrap:
    """Return the function that wraps the class of a block by a policy of POLICIES.

    none: all activations are stored. block: those between blocks, and each block runs forward a second time.
    save_convs_and_attention: the outputs of convolutions and attentions as well, which are most of a block's work, so
    that only linear layers, norms and activation functions are computed again. Output and gradient are the same. Raises
    ValueError for another name.
    """
    if remat not in POLICIES:
        raise ValueError(f"remat {remat!r} is not supported; use {', '.join(POLICIES)}")
    return POLICIES[remat]
