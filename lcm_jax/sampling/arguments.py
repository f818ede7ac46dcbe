"""Checks of a pipeline's arguments: each returns the value, or raises ValueError with argument, value and remedy."""

import operator
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from lcm_jax import files
from lcm_jax.data.images import to_rgb
from lcm_jax.diffusion.samplers import SAMPLERS
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.sampling import crop
from lcm_jax.sampling.control import Control, control_window
from lcm_jax.sampling.inputs import Inpainting, Source, draw_image_noise, make_time_ids, to_mask, to_pixels, to_unit

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


def _is_real(value: Any) -> bool:
    return not isinstance(value, bool) and not np.ndim(value) and np.asarray(value).dtype.kind in "iuf"


def guidance(value: Any) -> float:
    """A finite guidance_scale of 1 or more."""
    if not _is_real(value) or not 1 <= value < np.inf:
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
    """One of the samplers `allowed` that fits the model: a latent consistency model has `lcm` and `tcd`."""
    choice("sampler", value, allowed)
    if model.guidance_embedding_dim is not None and not SAMPLERS[value].consistency:
        names = " or ".join(repr(name) for name in allowed if SAMPLERS[name].consistency)
        raise ValueError(f"sampler is {value!r}, but this model is an LCM; use {names}, or its teacher")
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


def default_size(model: StableDiffusion, image: Any = None, mask: Any = None, control: Any = None) -> Any:
    """(height, width) in latents: of the image for image-to-image, of a control image, or the model's sample_size."""
    if image is None or mask is not None or model.inpaints:
        image = control[0] if isinstance(control, Sequence) and control else control
    if isinstance(image, Image.Image):
        return image.height // model.downscale, image.width // model.downscale
    return model.unet.config.get("sample_size") or 64


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


def strength(value: Any, image: Any, mask: Any) -> float:
    """Share of the noise that is added to an image, above 0 and at most 1; by default 0.8, or 1 with a mask."""
    if value is None:
        return 0.8 if image is not None and mask is None else 1.0
    if image is None:
        raise ValueError(f"strength is {value!r} and there is no image to start from; pass image, or omit strength")
    if not _is_real(value) or not 0 < value <= 1:
        raise ValueError(f"strength is {value!r}; use a number above 0 and at most 1")
    return float(value)


class Images(NamedTuple):
    """Images of a call: what the model is given of them, and how its results are pasted back, if they are.

    box: what padding_mask_crop cut out, of images of `original_size`, (width, height).
    """

    inpainting: Inpainting | None = None
    source: Source | None = None
    paste: Callable[[Sequence[Image.Image]], list[Image.Image]] | None = None
    box: crop.Box | None = None
    original_size: tuple[int, int] | None = None


def images(
    model: StableDiffusion,
    image: Any,
    mask: Any,
    padding: Any,
    size: tuple[int, int],
    strength: float,
    seed: int,
    output_type: str = "pil",
) -> Images:
    """The image to start from or to inpaint, its mask, and padding_mask_crop, resized to (height, width)."""
    for name, value in (("image", image), ("mask_image", mask)):
        wanted = model.inpaints or (name == "image" and mask is not None)
        if (wanted or value is not None) and not isinstance(value, Image.Image):
            reason = " for inpainting models" if model.inpaints else " to inpaint" if mask is not None else ""
            raise ValueError(f"{name} must be a PIL image{reason}, got {type(value).__name__}")
    if padding is not None and mask is None:
        raise ValueError(f"padding_mask_crop is {padding!r} and there is no mask_image; pass one, or omit it")
    if image is None:
        return Images()
    paste = box = None
    original_size = image.size
    if padding is not None and mask is not None:
        padding = integer("padding_mask_crop", padding, 0)
        if output_type != "pil":
            raise ValueError(f"output_type is {output_type!r}; use 'pil' with padding_mask_crop, which pastes images")
        if image.size != mask.size:
            raise ValueError(
                f"image is {image.width} x {image.height} and mask_image {mask.width} x {mask.height} pixels; "
                "use the same size with padding_mask_crop"
            )
        original, whole_mask = to_rgb(image), to_rgb(mask).convert("L")
        box = crop.crop_region(whole_mask, size, padding)
        image, mask = (crop.fit(each.crop(box), size) for each in (original, whole_mask))
        paste = partial(crop.paste, original=original, mask=whole_mask, box=box)
    shape = (size[0] // model.downscale, size[1] // model.downscale, model.vae.config["latent_channels"])
    noise = draw_image_noise(seed, shape)
    pixels, repainted = to_pixels(image, size), None if mask is None else to_mask(mask, size)
    inpainting = Inpainting(pixels, repainted, noise) if model.inpaints else None
    # A mask is an input of an inpainting model, whose latents start from the image only below full strength.
    source = Source(pixels, noise) if strength < 1 or mask is None else None
    if not model.inpaints and mask is not None:
        source = Source(pixels, noise, repainted)
    return Images(inpainting, source, paste, box, original_size)


def controls(
    nets: Sequence[str],
    images: Any,
    scales: Any,
    starts: Any,
    ends: Any,
    size: tuple[int, int],
    timesteps: np.ndarray,
    whole: Images,
) -> tuple[Control, ...] | None:
    """An image, a scale and a window for each of the ControlNets, by their names; None without any.

    size: (height, width). timesteps: of the steps that are made. whole: the other images of the call.
    """
    given = {
        "control_image": (images, None),
        "controlnet_conditioning_scale": (scales, 1.0),
        "control_guidance_start": (starts, 0.0),
        "control_guidance_end": (ends, 1.0),
    }
    if not nets:
        for name, (value, default) in given.items():
            if value is not default and value != default:
                raise ValueError(f"{name} is given, and this pipeline has no ControlNet; pass controlnet, or omit it")
        return None
    images, scales, starts, ends = (_for_each(name, value, nets) for name, (value, _) in given.items())
    made = []
    for image, scale, start, end in zip(images, scales, starts, ends, strict=True):
        if not isinstance(image, Image.Image):
            raise ValueError(f"control_image must be a PIL image for each ControlNet, got {type(image).__name__}")
        if not _is_real(scale) or not np.isfinite(scale):
            raise ValueError(f"controlnet_conditioning_scale is {scale!r}; use a finite number, such as 1.0")
        if not (_is_real(start) and _is_real(end) and 0 <= start < end <= 1):
            raise ValueError(
                f"control_guidance_start and control_guidance_end are {start!r} and {end!r}; use shares of the steps, "
                "the first below the second, from 0 to 1"
            )
        if whole.box is not None:
            if image.size != whole.original_size:
                raise ValueError(
                    f"control_image is {image.size} and image {whole.original_size} (width, height); use the same "
                    "size with padding_mask_crop"
                )
            image = crop.fit(to_rgb(image).crop(whole.box), size)
        made.append(Control(to_unit(image, size), np.float32(scale), control_window(timesteps, start, end)))
    return tuple(made)


def _for_each(name: str, value: Any, nets: Sequence[str]) -> Sequence[Any]:
    """One value for each ControlNet: a list of as many, or for numbers one for all."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        if name != "control_image" or len(nets) == 1:
            return [value] * len(nets)
        value = [] if value is None else [value]
    if len(value) != len(nets):
        raise ValueError(f"{name} has {len(value)} values and there are {len(nets)} ControlNets; use one for each")
    return value


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


def warn_of_guidance(guidance_scale: float, bounds: tuple[float, float] | None) -> None:
    """Warn of a guidance scale outside the range that a model was distilled for."""
    if bounds is not None and not bounds[0] <= guidance_scale <= bounds[1]:
        warnings.warn(
            f"guidance_scale is {guidance_scale:g}, and the model was distilled for {bounds[0]:g} to {bounds[1]:g}; "
            "use a guidance_scale in that range",
            stacklevel=CALLER,
        )
