"""Text encoder, UNet and autoencoder as one latent diffusion model: pure functions of parameters and arrays."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lcm_jax.diffusion.schedule import Schedule, make_schedule
from lcm_jax.models.clip import CLIPTextModel
from lcm_jax.models.layers import Dtype
from lcm_jax.models.unet import UNet2DCondition
from lcm_jax.models.vae import AutoencoderKL, sample_latents, unscale_latents

Params = Any


def check_scheduler(config: Mapping[str, Any]) -> None:
    """Raises ValueError for an option of scheduler_config.json that changes the pictures and is not implemented."""
    clips = config.get("clip_sample", config.get("_class_name") == "DDIMScheduler")  # diffusers' default
    for option, value, allowed in [
        ("clip_sample", clips, False),
        ("thresholding", config.get("thresholding", False), False),
        ("timestep_scaling", config.get("timestep_scaling", 10.0), 10.0),
        ("use_karras_sigmas", config.get("use_karras_sigmas") or False, False),
        ("algorithm_type", config.get("algorithm_type", "dpmsolver++"), "dpmsolver++"),
        ("solver_order", config.get("solver_order", 2), 2),
    ]:
        if value != allowed:
            raise ValueError(f"scheduler config: {option}={value!r} is not supported; only {allowed!r} is")


@dataclass(frozen=True, eq=False)
class StableDiffusion:
    """The three networks and the schedule of one model; hold it once, it is compared by identity."""

    unet: UNet2DCondition
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    schedule: Schedule
    scheduler: Mapping[str, Any]  # scheduler_config.json, for the grid of timesteps that it asks for

    @classmethod
    def from_configs(
        cls, configs: Mapping[str, Mapping[str, Any]], dtype: Dtype = jnp.float32, remat: bool = False
    ) -> "StableDiffusion":
        """configs: `unet`, `vae`, `text_encoder`, `scheduler`, each a published config.json as it stands.

        Raises ValueError that names an option which is not supported, or two networks that do not fit each other.
        """
        check_scheduler(configs["scheduler"])
        unet = UNet2DCondition.from_config(configs["unet"], dtype, remat)
        vae = AutoencoderKL.from_config(configs["vae"], dtype)
        text_encoder = CLIPTextModel.from_config(configs["text_encoder"], dtype)
        width, channels = text_encoder.config.hidden_size, vae.config["latent_channels"]
        for option, other, value in [
            ("cross_attention_dim", "text encoder's hidden_size", width),
            ("in_channels", "autoencoder's latent_channels", channels),
            ("out_channels", "autoencoder's latent_channels", channels),
        ]:
            mine = unet.config[option]
            if any(one != value for one in (mine if isinstance(mine, tuple) else (mine,))):
                raise ValueError(f"the UNet's {option} is {mine}, the {other} {value}: they belong to different models")
        return cls(unet, vae, text_encoder, make_schedule(configs["scheduler"]), dict(configs["scheduler"]))

    @property
    def downscale(self) -> int:
        """Pixels per latent along one axis."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    @property
    def guidance_embedding_dim(self) -> int | None:
        """The size of the guidance weight's embedding; None for a network without that input (a teacher)."""
        return self.unet.config["time_cond_proj_dim"]

    def encode_prompt(self, params: Params, token_ids: jax.Array) -> jax.Array:
        """token_ids: int32[B, L] -> context [B, L, D], the last layer after the final norm (Stable Diffusion 1.x)."""
        return self.text_encoder.apply({"params": params}, token_ids).last_hidden_state

    def denoise(self, params: Params, z, t, context, guidance_embedding=None) -> jax.Array:
        """z: float32[B, h, w, c], t: int32[B] -> the UNet's output, float32[B, h, w, c]."""
        return self.unet.apply({"params": params}, z, t, context, guidance_embedding)

    def encode(self, params: Params, images: jax.Array) -> jax.Array:
        """images: float32[B, H, W, 3] in -1..1 -> moments float32[B, h, w, 2c]."""
        return self.vae.apply({"params": params}, images, method="encode")

    def to_latents(self, moments: jax.Array, noise: jax.Array) -> jax.Array:
        """moments: float32[B, h, w, 2c], noise: float32[B, h, w, c] -> scaled latents."""
        return sample_latents(moments, noise, self.vae.config["scaling_factor"], self.vae.config["shift_factor"])

    def decode(self, params: Params, z: jax.Array) -> jax.Array:
        """z: scaled latents float32[B, h, w, c] -> images float32[B, H, W, 3], about -1..1."""
        latents = unscale_latents(z, self.vae.config["scaling_factor"], self.vae.config["shift_factor"])
        return self.vae.apply({"params": params}, latents, method="decode")

    def abstract_params(self) -> dict[str, Params]:
        """Every parameter as a ShapeDtypeStruct, by network: unet, vae, text_encoder. Nothing is allocated."""

        def init():
            rng, unet, vae = jax.random.key(0), self.unet.config, self.vae.config
            size, channels = 2 ** (len(unet["block_out_channels"]) - 1), vae["latent_channels"]
            sample = jnp.zeros((1, size, size, unet["in_channels"]))
            width = unet["cross_attention_dim"]
            context = jnp.zeros((1, 1, width[0] if isinstance(width, tuple) else width))
            image = jnp.zeros((1, self.downscale, self.downscale, vae["in_channels"]))
            return {
                "unet": self.unet.init(rng, sample, jnp.zeros(1, jnp.int32), context)["params"],
                "vae": self.vae.init(rng, image, jnp.zeros((1, 1, 1, channels)))["params"],
                "text_encoder": self.text_encoder.init(rng, jnp.zeros((1, 2), jnp.int32))["params"],
            }

        return jax.eval_shape(init)
