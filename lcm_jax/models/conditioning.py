"""All that a denoiser is told besides z and t, as one pytree."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Conditioning(NamedTuple):
    """Inputs of a denoiser; an absent part is None. The leading axis of every part is the batch.

    context: [B, L, D], the encoded prompt. pooled: [B, P], SDXL's pooled prompt. time_ids: float32[B, 6], SDXL's sizes
    in pixels: (height, width) before cropping, (top, left) of the crop, (height, width) of the image. guidance:
    float32[B], the weight w of cond + w (cond - uncond), for a network distilled with guidance. masked:
    float32[B, h, w, 1 + c], for an inpainting network: the mask, and the scaled latents of what is kept. control: the
    `Residuals` of ControlNets, which the network adds to its own features.
    """

    context: Any = None
    pooled: Any = None
    time_ids: Any = None
    guidance: Any = None
    masked: Any = None
    control: Any = None


def concatenate(first: Conditioning, second: Conditioning) -> Conditioning:
    """Join two batches of B1 and B2 examples, with the same parts, into one of B1 + B2."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)


def interleave(first: Any, second: Any) -> Any:
    """Join two trees of B examples, with the same parts, into one of 2B: first[0], second[0], first[1], and so on.

    Of a batch that devices share, both examples of a pair stay where they are; a concatenation moves them.
    """
    join = lambda a, b: jnp.stack([a, b], axis=1).reshape(2 * len(a), *a.shape[1:])  # noqa: E731
    return jax.tree.map(join, first, second)


def deinterleave(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the two batches of [B, ...] that `interleave` has joined to x: [2B, ...]."""
    pairs = x.reshape(-1, 2, *x.shape[1:])
    return pairs[:, 0], pairs[:, 1]
