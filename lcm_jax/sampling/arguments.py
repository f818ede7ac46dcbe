"""Checks of a pipeline's arguments: each returns the value, or raises ValueError with argument, value and remedy."""

import operator
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from lcm_jax import files
from lcm_jax.data import tokenizer as tokenizers
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.sampling.inputs import Inpainting, draw_image_noise, make_inpainting, make_time_ids

CALLER = 3  # stacklevel of a warning: the call of the pipeline, whose __call__ calls the check


def integer(name: str, value: Any, minimum: int | None = None, maximum: int | None = None) -> int:
    """An int, or a value that Python accepts as an index (not a bool), from minimum to maximum."""
    allowed = (
        "an integer" if minimum is None else f"{minimum} or more" if maximum is None else f"{minimum} to {maximum}"
    )
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}; use {allowed}") from None
    outside = (minimum is not None and number < minimum) or (maximum is not None and number > maximum)
    if outside or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; use {allowed}")
    return number


def guidance(value: Any) -> float:
    """A finite guidance_scale of 1 or more."""
    if (
        isinstance(value, bool)
        or np.ndim(value)
        or np.asarray(value).dtype.kind not in "iuf"
        or not 1 <= value < np.inf
    ):
        raise ValueError(f"guidance_scale is {value!r}; use 1 (no guidance) or more, such as 8")
    return float(value)


def pair(name: str, value: Any) -> tuple[int, int]:
    """(height, width) or (top, left) in pixels."""
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str) or len(value) != 2:
        raise ValueError(f"{name} is {value!r}; use two integers, such as (512, 512)")
    return integer(name, value[0], 0), integer(name, value[1], 0)


def prompts(name: str, value: Any) -> list[str]:
    """One prompt or several, valid Unicode."""
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, Sequence) or not given or not all(isinstance(each, str) for each in given):
        raise ValueError(f"{name} is {value!r}; use a string or a list of strings")
    return [files.check_unicode(each, name) for each in given]


def negative_prompts(value: Any, count: int) -> list[str]:
    """A negative prompt for each of `count` prompts, empty by default."""
    if value is None:
        return [""] * count
    negatives = prompts("negative_prompt", value)
    if isinstance(value, str):
        negatives = negatives * count
    if len(negatives) != count:
        raise ValueError(
            f"negative_prompt has {len(negatives)} prompts and prompt has {count}; use one, or one for each"
        )
    return negatives


def choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """One of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; choose {', '.join(allowed)}")
    return value


def sampler(model: StableDiffusion, value: Any, allowed: Sequence[str]) -> str:
    """One of the samplers `allowed` that fits the model: a latent consistency model has only `lcm`."""
    choice("sampler", value, allowed)
    if value != "lcm" and model.guidance_embedding_dim is not None:
        raise ValueError(f"sampler is {value!r}, but this model is an LCM; use sampler='lcm' or its teacher")
    return value


def size(model: StableDiffusion, height: Any, width: Any, sample_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) in pixels; by default the model's sample_size, which is in latents."""
    scale = model.downscale
    rows, columns = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    height = rows * scale if height is None else integer("height", height)
    width = columns * scale if width is None else integer("width", width)
    if height % scale or width % scale or min(height, width) < scale:
        raise ValueError(f"height and width are {height} and {width}; use multiples of {scale}")
    return height, width


def latents(value: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    """Finite latents of that shape, float32[N, h, w, c], or None."""
    if value is None:
        return None
    if np.shape(value) != shape:
        raise ValueError(f"latents have shape {np.shape(value)}; use {shape} (NHWC)")
    value = np.asarray(value, np.float32)
    if not np.isfinite(value).all():
        raise ValueError("latents have NaN or infinity; use standard normal numbers")
    return value


def time_ids(
    model: StableDiffusion, count: int, size: tuple[int, int], original_size: Any, corner: Any, target_size: Any
) -> np.ndarray | None:
    """SDXL's sizes, float32[count, 6], by default those of the image; None for other models."""
    if model.text_encoder_2 is None:
        return None
    target = size if target_size is None else pair("target_size", target_size)
    original = size if original_size is None else pair("original_size", original_size)
    return make_time_ids(count, target, original, pair("crops_coords_top_left", corner))


def inpainting(model: StableDiffusion, image: Any, mask: Any, size: tuple[int, int], seed: int) -> Inpainting | None:
    """The inputs of an inpainting model; None for other models."""
    for name, value in (("image", image), ("mask_image", mask)):
        if model.inpaints and not isinstance(value, Image.Image):
            raise ValueError(f"{name} must be a PIL image for inpainting models, got {type(value).__name__}")
        if not model.inpaints and value is not None:
            raise ValueError(f"{name} is not supported by this model, which does not inpaint; omit it")
    if not model.inpaints:
        return None
    shape = (size[0] // model.downscale, size[1] // model.downscale, model.vae.config["latent_channels"])
    return make_inpainting(image, mask, size, draw_image_noise(seed, shape))


def warn_of_no_effect(model: StableDiffusion, negative_prompt: Any, guidance_scale: float) -> None:
    """Warn if there is a negative prompt and no classifier-free guidance."""
    if negative_prompt is None:
        return
    if model.guidance_embedding_dim is not None:
        reason = "this model is an LCM, whose guidance_scale is an input of the network; use its teacher"
        warnings.warn(f"negative_prompt has no effect: {reason}", stacklevel=CALLER)
    elif guidance_scale == 1:
        reason = "raise guidance_scale above 1"
        warnings.warn(f"negative_prompt has no effect without guidance: {reason}", stacklevel=CALLER)


def warn_of_overlong(name: str, prompts: Sequence[str], tokenizer) -> None:
    """Warn of each prompt that has too many tokens, with the words that are lost."""
    limit = tokenizer.model_max_length
    for i in tokenizers.overlong(tokenizer, prompts):
        lost = tokenizer.decode(tokenizer(prompts[i], verbose=False)["input_ids"][limit - 1 : -1])
        start = prompts[i] if len(prompts[i]) <= 40 else prompts[i][:40] + "..."
        message = f"{name} {start!r} is longer than {limit} tokens and was cut; lost: {lost!r}"
        warnings.warn(message, stacklevel=CALLER)
