"""Classifier-free guidance (arXiv 2207.12598)."""

import jax.numpy as jnp


def classifier_free(uncond, cond, w, mean: bool = True):
    """cond + w (cond - uncond) with the paper's w = guidance_scale - 1 of diffusers.

    uncond, cond: [B, h, w, c]. mean: False leaves the mean of each channel as `cond` has it, and guides the rest. At a
    high w it is the lowest frequencies that guidance drives out of the data's range, up to pictures burnt to white
    (arXiv 2506.19713, which gives them a weight of their own; this is its end, 0 for the very lowest).
    """
    difference = cond - uncond
    if not mean:
        difference = difference - jnp.mean(difference, (1, 2), keepdims=True)
    return cond + w * difference
