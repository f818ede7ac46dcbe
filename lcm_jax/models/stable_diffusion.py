"""Text encoders, UNet and autoencoder as one latent diffusion model: pure functions of parameters and arrays."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.diffusion.consistency import guidance_embedding
from lcm_jax.diffusion.schedule import Schedule, make_schedule
from lcm_jax.models.clip import CLIPTextModel, TextOutput
from lcm_jax.models.conditioning import Conditioning
from lcm_jax.models.controlnet import ControlNet
from lcm_jax.models.layers import Dtype, abstract_network
from lcm_jax.models.quantized import apply
from lcm_jax.models.tiling import map_tiles, tile_size
from lcm_jax.models.tiny_vae import AutoencoderTiny
from lcm_jax.models.unet import UNet2DCondition
from lcm_jax.models.vae import AutoencoderKL, sample_latents, unscale_latents

Params = Any
ENCODERS = ("text_encoder", "text_encoder_2")
MIN_FACTOR = 0.1  # of the mean in `emphasize`, for weights of 0 and below


def frozen_dtype(dtype: Dtype) -> Callable[[Any], np.dtype]:
    """Return leaf -> the dtype in which a network that computes in `dtype` holds a parameter that is not trained.

    Such a network casts matrices and kernels before each use, so that these lose nothing; biases and scales stay
    float32.
    """
    return lambda leaf: jnp.dtype(dtype if leaf.ndim >= 2 else jnp.float32)


@contextmanager
def in_file(name: str) -> Iterator[None]:
    """Begin the message of a ValueError with the name of a file in the model's folder."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


@dataclass(frozen=True, eq=False)
class StableDiffusion:
    """Networks and schedule of one model. It is compared by identity, so that jit compiles once for each instance."""

    unet: UNet2DCondition
    vae: AutoencoderKL | AutoencoderTiny
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModel | None  # SDXL has two
    schedule: Schedule
    scheduler: Mapping[str, Any]  # scheduler_config.json, for the samplers
    empty_is_zero: bool  # the empty prompt is encoded as zeros (SDXL's force_zeros_for_empty_prompt)
    controlnets: tuple[ControlNet, ...] = ()  # beside the model's own networks; their parameters are separate too

    @classmethod
    def from_configs(
        cls, configs: Mapping[str, Mapping[str, Any]], dtype: Dtype = jnp.float32, remat: str = "none"
    ) -> "StableDiffusion":
        """Build the model of published config.json files, unchanged.

        configs: `unet`, `vae`, `text_encoder`, `scheduler`; `text_encoder_2` for SDXL; `model_index` for
        `force_zeros_for_empty_prompt`, by default true. dtype: of the computation. remat: the UNet's policy, see
        `remat.rematerialize`. Raises ValueError for an unsupported option, or two networks that do not fit each other.
        """
        with in_file("unet/config.json"):
            unet = UNet2DCondition.from_config(configs["unet"], dtype, remat)
        # force_upcast marks autoencoders that overflow in half precision, such as SDXL's.
        upcast = configs["vae"].get("force_upcast", False) and jnp.dtype(dtype) == jnp.float16
        kind = AutoencoderTiny if configs["vae"].get("_class_name") == "AutoencoderTiny" else AutoencoderKL
        with in_file("vae/config.json"):
            vae = kind.from_config(configs["vae"], jnp.float32 if upcast else dtype)
        with in_file("text_encoder/config.json"):
            text_encoder = CLIPTextModel.from_config(configs["text_encoder"], dtype)
        width, channels = text_encoder.config.hidden_size, vae.config["latent_channels"]
        text_encoder_2 = None
        if "text_encoder_2" in configs:
            with in_file("text_encoder_2/config.json"):
                text_encoder_2 = CLIPTextModel.from_config(configs["text_encoder_2"], dtype)
            width += text_encoder_2.config.hidden_size
            if not text_encoder_2.config.projects:
                raise ValueError(
                    "text_encoder_2 has no projection, which SDXL's UNet needs; use a CLIPTextModelWithProjection"
                )
        if (unet.config["addition_embed_type"] is None) != (text_encoder_2 is None):
            raise ValueError(
                f"the UNet's addition_embed_type is {unet.config['addition_embed_type']!r} and there is "
                f"{'no' if text_encoder_2 is None else 'a'} text_encoder_2; use networks of one model"
            )
        for option, other, value in [
            ("cross_attention_dim", "text encoder's hidden_size", (width,)),
            ("in_channels", "autoencoder's latent_channels", (channels, 2 * channels + 1)),  # z, mask, masked
            ("out_channels", "autoencoder's latent_channels", (channels,)),
        ]:
            mine = unet.config[option]
            if any(one not in value for one in (mine if isinstance(mine, tuple) else (mine,))):
                raise ValueError(
                    f"the UNet's {option} is {mine} and the {other} is {value[0]}; use networks of one model"
                )
        return cls(
            unet,
            vae,
            text_encoder,
            text_encoder_2,
            make_schedule(configs["scheduler"]),
            dict(configs["scheduler"]),
            text_encoder_2 is not None and configs.get("model_index", {}).get("force_zeros_for_empty_prompt", True),
        )

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of the networks, in parameter trees and in folders."""
        return ("unet", "vae", "text_encoder", *(() if self.text_encoder_2 is None else ("text_encoder_2",)))

    def dtype_of(self, name: str) -> Dtype:
        """Return the compute dtype of the network of that name."""
        return getattr(self, name).dtype

    @property
    def inpaints(self) -> bool:
        """True if the UNet's input has a mask and masked latents after the noisy latents."""
        return self.unet.config["in_channels"] != self.unet.config["out_channels"]

    @property
    def downscale(self) -> int:
        """Pixels per latent along one axis."""
        widths = "block_out_channels" if isinstance(self.vae, AutoencoderKL) else "decoder_block_out_channels"
        return 2 ** (len(self.vae.config[widths]) - 1)

    @property
    def guidance_embedding_dim(self) -> int | None:
        """Size of the guidance weight's embedding; None for a network without that input (a teacher)."""
        return self.unet.config["time_cond_proj_dim"]

    @property
    def max_clip_skip(self) -> int:
        """Largest number of last layers that `encode_prompt` can leave out."""
        if self.text_encoder_2 is None:
            return self.text_encoder.config.num_hidden_layers
        return min(each.config.num_hidden_layers for each in (self.text_encoder, self.text_encoder_2)) - 1

    def encode_prompt(
        self,
        params: Params,
        token_ids: jax.Array,
        time_ids: jax.Array | None = None,
        *,
        token_weights: jax.Array | None = None,
        clip_skip: int = 0,
        zero_empty: bool = True,
    ) -> Conditioning:
        """Encode tokens to the prompt's part of a Conditioning. params: by network.

        Stable Diffusion 1.x and 2.x: token_ids int32[B, L] -> context [B, L, D], the last layer after the final norm.
        SDXL: token_ids int32[B, 2, L], one row for each encoder, and time_ids float32[B, 6] -> context and pooled of
        the layers before the last, without the norm; zeros for an empty prompt if the model was trained with them and
        zero_empty is True. A long prompt is C chunks, int32[B, C, L] or int32[B, 2, C, L], which are encoded one by one
        and joined to context [B, C L, D]; pooled is the first one's. token_weights: float32 of the shape of token_ids,
        see `emphasize`. clip_skip: number of last layers to leave out, as in diffusers, at most `max_clip_skip`.
        """
        length = token_ids.shape[-1]

        def encode(name: str, ids: jax.Array, skip: int = 0) -> TextOutput:
            return apply(getattr(self, name), params[name], ids.reshape(-1, length), skip)

        def join(states: jax.Array, weights: jax.Array | None) -> jax.Array:
            states = states if weights is None else emphasize(states, weights.reshape(-1, length))
            return states.reshape(len(token_ids), -1, states.shape[-1])

        if self.text_encoder_2 is None:
            return Conditioning(join(encode("text_encoder", token_ids, clip_skip).last_hidden_state, token_weights))
        layer, outputs = -2 - clip_skip, [encode(name, token_ids[:, i]) for i, name in enumerate(ENCODERS)]
        weights = [None, None] if token_weights is None else [token_weights[:, 0], token_weights[:, 1]]
        states = [join(output.hidden_states[layer], each) for output, each in zip(outputs, weights, strict=True)]
        context = jnp.concatenate(states, axis=-1)
        pooled = outputs[1].pooled.reshape(len(token_ids), -1, outputs[1].pooled.shape[-1])[:, 0]
        if self.empty_is_zero and zero_empty:
            chunks = token_ids[:, 0].reshape(len(token_ids), -1, length)
            kept = (chunks[..., 1] != chunks[..., -1]).any(axis=1)  # an empty chunk is all padding after its beginning
            context, pooled = context * kept[:, None, None], pooled * kept[:, None]
        return Conditioning(context, pooled, time_ids)

    def denoise(self, params: Params, z: jax.Array, t: jax.Array, conditioning: Conditioning) -> jax.Array:
        """Return the UNet's output, float32[B, h, w, c].

        params: of the UNet; z: float32[B, h, w, c]; t: int32[B], or float32[B] between training steps. Raises
        ValueError for a part of the conditioning that this model has no input for, or lacks; a guidance weight is
        required if and only if `guidance_embedding_dim` is not None, a mask if and only if it inpaints.
        """
        context, pooled, time_ids, guidance, masked, control = conditioning
        width = self.guidance_embedding_dim
        if (guidance is None) != (width is None):
            raise ValueError(
                f"conditioning.guidance is {'missing' if guidance is None else 'given'}, and time_cond_proj_dim of "
                f"this UNet is {width}; set guidance for a latent consistency model alone"
            )
        if (masked is not None) != self.inpaints:
            raise ValueError(
                f"conditioning.masked is {'missing' if masked is None else 'given'}, and this UNet has "
                f"{self.unet.config['in_channels']} input channels; set masked for an inpainting model alone"
            )
        if masked is not None:
            z = jnp.concatenate([z, masked], axis=-1)
        embedding = None if width is None else guidance_embedding(guidance, width)
        return apply(self.unet, params, z, t, context, embedding, pooled, time_ids, control)

    def tile_size(self, side: int | None = None) -> int:
        """Return the side of the autoencoder's tiles in pixels, by default its sample_size. Raises ValueError."""
        if not isinstance(self.vae, AutoencoderKL):
            raise ValueError(
                "the autoencoder is an AutoencoderTiny, which is not tiled; omit tiling, or use another vae"
            )
        return tile_size(self.vae.config, side)

    def encode(self, params: Params, images: jax.Array, tile: int | None = None) -> jax.Array:
        """Encode images float32[B, H, W, 3] in [-1, 1] to moments float32[B, h, w, 2c].

        params: of the autoencoder. tile: of `tile_size`, for larger images; None for one piece.
        """
        encode = partial(apply, self.vae, params, method="encode")
        return encode(images) if tile is None else map_tiles(encode, images, tile, (1, self.downscale))

    def to_latents(self, moments: jax.Array, noise: jax.Array) -> jax.Array:
        """Return scaled latents float32[B, h, w, c] of moments float32[B, h, w, 2c], by noise float32[B, h, w, c]."""
        return sample_latents(moments, noise, self.vae.config["scaling_factor"], self.vae.config["shift_factor"])

    def decode(self, params: Params, z: jax.Array, tile: int | None = None) -> jax.Array:
        """Decode scaled latents float32[B, h, w, c] to images float32[B, H, W, 3], about [-1, 1].

        params, tile: as in `encode`.
        """
        latents = unscale_latents(z, self.vae.config["scaling_factor"], self.vae.config["shift_factor"])
        decode = partial(apply, self.vae, params, method="decode")
        if tile is None:
            return decode(latents)
        return map_tiles(decode, latents, tile // self.downscale, (self.downscale, 1))

    def abstract_params(self) -> dict[str, Params]:
        """Return every parameter as a ShapeDtypeStruct, by network. Nothing is allocated; the trees are not copies."""
        unet, vae = self.unet.config, self.vae.config
        size, channels = 2 ** (len(unet["block_out_channels"]) - 1), vae["latent_channels"]
        width = unet["cross_attention_dim"]
        float_inputs = lambda *shapes: [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]  # noqa: E731
        sample, context = float_inputs(
            (1, size, size, unet["in_channels"]), (1, 1, width[0] if isinstance(width, tuple) else width)
        )
        more = []
        if self.text_encoder_2 is not None:
            more = [None, *float_inputs((1, self.text_encoder_2.config.projection_dim), (1, 6))]
        image = (1, self.downscale, self.downscale, vae["in_channels"])
        token_ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
        inputs = {
            "unet": [sample, jax.ShapeDtypeStruct((1,), jnp.int32), context, *more],
            "vae": float_inputs(image, (1, 1, 1, channels)),
            "text_encoder": [token_ids],
            "text_encoder_2": [token_ids],
        }
        # Parameters do not depend on how they are computed with.
        plain = {name: getattr(self, name).clone(dtype=jnp.float32) for name in self.networks}
        plain["unet"] = plain["unet"].clone(remat="none")
        return {name: abstract_network(network, *inputs[name]) for name, network in plain.items()}


def emphasize(states: jax.Array, weights: jax.Array) -> jax.Array:
    """Multiply the encoded tokens of chunks, [N, L, D], by float32[N, L], and restore the mean of each chunk.

    A1111 restores the mean of a batch; here an image does not depend on the others. The mean changes by a factor
    within the range of the weights if it measures the size of the states. That of centered states, as the norm of the
    bundled model gives them, is near 0 and changes by any factor; it is not restored.
    """
    scaled = states.astype(jnp.float32) * weights[..., None]
    mean, changed = (each.mean(axis=(1, 2), dtype=jnp.float32) for each in (states, scaled))
    factor = changed / mean
    measures = (factor >= jnp.maximum(weights.min(axis=1), MIN_FACTOR)) & (factor <= weights.max(axis=1))
    return (scaled / jnp.where(measures, factor, 1.0)[:, None, None]).astype(states.dtype)
