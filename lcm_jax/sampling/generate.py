"""From token ids to pixels, as one pure function; jitted, it is one program for any number of steps."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np

from lcm_jax.diffusion.guidance import classifier_free
from lcm_jax.diffusion.pixels import to_uint8
from lcm_jax.diffusion.samplers import CONSISTENCY_SCHEDULERS, SAMPLERS
from lcm_jax.diffusion.samplers.table import Network, Table
from lcm_jax.models.conditioning import Conditioning, concatenate
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.sampling.control import Controller, make_controller
from lcm_jax.sampling.finite import Finite, all_finite
from lcm_jax.sampling.inputs import Inpainting, Inputs, step_noise


def default_sampler(model: StableDiffusion) -> str:
    """Return the name in SAMPLERS of the model's scheduler. Raises ValueError if no sampler has its class."""
    scheduler = model.scheduler["_class_name"]
    names = [name for name, sampler in SAMPLERS.items() if sampler.scheduler == scheduler]
    if not names:
        raise ValueError(f"scheduler {scheduler} is not supported; pass sampler=, one of {', '.join(SAMPLERS)}")
    return names[0]


def is_consistency_model(model: StableDiffusion) -> bool:
    """Return True for a latent consistency model, by its input for the guidance weight or by its scheduler."""
    return model.guidance_embedding_dim is not None or model.scheduler["_class_name"] in CONSISTENCY_SCHEDULERS


def effective_guidance_scale(model: StableDiffusion, scale: float) -> float:
    """Return `scale`, or 1 for a latent consistency model without guidance input: its guidance is fixed."""
    fixed = is_consistency_model(model) and model.guidance_embedding_dim is None
    return 1.0 if fixed else float(scale)


def sampler_table(
    model: StableDiffusion, sampler: str, steps: int, strength: float = 1.0, eta: float | None = None
) -> Table:
    """Return the steps of the sampler of that name for the model's scheduler_config.json.

    strength, eta: as in `Sampler.make_table`. The table is padded to the same size for every number of steps, so that
    all share one program. Raises ValueError for a number of steps, a strength or an eta that the sampler does not have,
    and for options that it does not support.
    """
    config = model.scheduler
    if model.text_encoder_2 is None and sampler != "lcm":
        # diffusers' StableDiffusionPipeline sets these two whatever the file contains: old files have the class's own.
        config = dict(config) | {"steps_offset": 1, "clip_sample": False}
    table = SAMPLERS[sampler].make_table(model.schedule, config, steps, strength, eta)
    return table.padded(len(model.schedule.alphas_cumprod) + 1)  # PNDM has a row more than steps


def is_classifier_free(model: StableDiffusion, guidance_scale: float) -> bool:
    """Return True if guidance takes a second pass, for a negative prompt: above 1, without the weight as an input."""
    return guidance_scale != 1 and model.guidance_embedding_dim is None


def masked_channels(model: StableDiffusion, params: Any, inpainting: Inpainting, tile: int | None = None) -> jax.Array:
    """Return the `masked` part of a Conditioning, float32[N, h, w, 1 + c].

    It is the mask at the first pixel of each latent, and the scaled latents of the image, gray where it is repainted.
    params: by network. tile: as in `StableDiffusion.encode`.
    """
    kept = inpainting.image * (1.0 - inpainting.mask)
    encoded = model.to_latents(model.encode(params["vae"], kept, tile), inpainting.noise)
    return jnp.concatenate([inpainting.mask[:, :: model.downscale, :: model.downscale], encoded], axis=-1)


def guided_network(
    model: StableDiffusion,
    params: Any,
    prompt: Conditioning,
    negative: Conditioning | None,
    weight: jax.Array,
    controller: Controller | None = None,
) -> Network:
    """Return the network that a sampler evaluates, guided by the weight w: float32[].

    params: of the UNet. negative: None for a UNet that has the weight as an input, and for a model that is not guided;
    else guidance is classifier-free, and its two passes are one batch of 2B. controller: of `make_controller`.
    """

    def denoise(z, t, conditioning):
        if controller is not None:
            residuals = controller(z, t, conditioning, len(prompt.context))
            conditioning = conditioning._replace(control=residuals)
        return model.denoise(params, z, t, conditioning)

    if negative is None:
        takes_weight = model.guidance_embedding_dim is not None
        guided = prompt._replace(guidance=jnp.full(len(prompt.context), weight) if takes_weight else None)
        return lambda z, t: denoise(z, t, guided)
    both = concatenate(prompt, negative)

    def network(z, t):
        output = denoise(jnp.concatenate([z, z]), jnp.concatenate([t, t]), both)
        cond, uncond = jnp.split(output, 2)
        return classifier_free(uncond, cond, weight)

    return network


def first_latents(inputs: Inputs, table: Table, encoded: jax.Array | None) -> jax.Array:
    """Return the latents that sampling starts from, float32[B, h, w, c], at the level of noise of the table's start.

    encoded: scaled latents float32[N, h, w, c] of the image to start from, or None for noise alone.
    """
    signal, level = table.start
    noise = level * inputs.latents
    return noise if encoded is None else signal * encoded + noise


def keep_unmasked(
    z: jax.Array, i: jax.Array, mask: jax.Array, encoded: jax.Array, noise: jax.Array, table: Table
) -> jax.Array:
    """Return z after step i, float32[B, h, w, c], with the image's latents where the mask is 0 (latent blending).

    mask: float32[N, h, w, 1]. encoded: of the image, float32[N, h, w, c]; noise is added up to the level of z.
    """
    signal, level = jnp.asarray(table.levels)[i + 1]
    return mask * z + (1.0 - mask) * (signal * encoded + level * noise)


def generate(
    model: StableDiffusion,
    params: Any,
    inputs: Inputs,
    sampler: str,
    table: Table,
    *,
    clip_skip: int = 0,
    zero_empty: bool = True,
    decode: bool = True,
    callback: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray] | None = None,
    tile: int | None = None,
) -> tuple[jax.Array, Finite]:
    """Return images uint8[B, H, W, 3], or scaled latents float32[B, h, w, c] if `decode` is False, and their flags.

    params: by network, and a tuple of `controlnets` if inputs.control is not None. sampler: name in SAMPLERS. table: of
    `sampler_table`. clip_skip: last layers of the text encoder to leave out, for the prompt but not for the negative
    prompt. zero_empty: False if an empty negative prompt is encoded even by a model that was trained with zeros for it.
    callback(i, t, z): called on the host after each step, with int32[], the timestep and float32[B, h, w, c]; returns
    the latents to go on with. tile: side in pixels of the autoencoder's tiles, see `StableDiffusion.tile_size`; None
    for images in one piece.
    """
    encode = partial(model.encode_prompt, params, time_ids=inputs.time_ids)
    prompt = encode(inputs.token_ids, token_weights=inputs.token_weights, clip_skip=clip_skip, zero_empty=False)
    negative = masked = source = None
    if model.guidance_embedding_dim is None and inputs.negative_ids is not None:
        negative = encode(inputs.negative_ids, token_weights=inputs.negative_weights, zero_empty=zero_empty)
    texts = (prompt, negative)
    batch, *shape = inputs.latents.shape
    if inputs.inpainting is not None:
        masked = masked_channels(model, params, inputs.inpainting, tile)
        repeated = jnp.broadcast_to(masked, (batch, *masked.shape[1:]))
        prompt = prompt._replace(masked=repeated)
        negative = None if negative is None else negative._replace(masked=repeated)
    if inputs.source is not None:
        source = model.to_latents(model.encode(params["vae"], inputs.source.image, tile), inputs.source.noise)
    controller = None
    if inputs.control is not None:
        controller = make_controller(model.controlnets, params["controlnets"], inputs.control)
    network = guided_network(model, params["unet"], prompt, negative, inputs.guidance_scale - 1.0, controller)

    def on_step(i, z):
        if inputs.source is not None and source is not None and inputs.source.mask is not None:
            mask = inputs.source.mask[:, :: model.downscale, :: model.downscale]
            z = keep_unmasked(z, i, mask, source, inputs.latents, table)
        if callback is not None:
            z = jax.experimental.io_callback(
                callback, jax.ShapeDtypeStruct(z.shape, z.dtype), i, jnp.asarray(table.timesteps)[i], z
            )
        return z

    noise = (lambda i: step_noise(inputs.noise, i, tuple(shape))) if SAMPLERS[sampler].adds_noise else None
    z = first_latents(inputs, table, source)
    z = SAMPLERS[sampler].sample(network, z, table, model.schedule, noise, on_step)
    images = model.decode(params["vae"], z, tile) if decode else None
    encoded = [each for each in (masked, source) if each is not None]
    finite = Finite(
        all_finite(texts),
        all_finite(encoded) if encoded else None,
        all_finite(z),
        None if images is None else all_finite(images),
    )
    return (z if images is None else to_uint8(images)), finite
