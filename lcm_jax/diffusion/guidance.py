"""Classifier-free guidance (arXiv 2207.12598)."""


def classifier_free(uncond, cond, w):
    """cond + w (cond - uncond) with the paper's w = guidance_scale - 1 of diffusers."""
    return cond + w * (cond - uncond)
