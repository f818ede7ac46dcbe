"""The trained part of a student and what becomes of it: all of the UNet, or adapters of a frozen one."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np

from lcm_jax.models import lora
from lcm_jax.models.conditioning import Conditioning
from lcm_jax.models.lora import LoRASettings
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.objectives.adapter_dropout import AdapterDropout
from lcm_jax.objectives.networks import Denoiser, Objective
from lcm_jax.ranges import from_settings
from lcm_jax.recipes.export import write_model
from lcm_jax.recipes.models import Models
from lcm_jax.training.state import Params
from lcm_jax.weights.lora_files import read_adapters, write_adapters
from lcm_jax.weights.model import read_params
from lcm_jax.weights.preset import adapter_preset, run_preset


@dataclass(frozen=True)
class Trained:
    """The trained part of a student.

    params, load: its shapes and dtypes, and its initial values. bind(params, frozen): the student as a network.
    networks(params, frozen): the student's parameters by network, for sampling. write(folder, params): the export of a
    run, in place of an earlier one. objective: an objective -> what trains this part by it. of_frozen: True if the UNet
    stays frozen, and a step needs it.
    """

    params: Params
    load: Callable[[], Params]
    bind: Callable[[Params, Params], Denoiser]
    networks: Callable[[Params, Params], Params]
    write: Callable[[Path, Params], None]
    objective: Callable[[Objective], Objective]
    of_frozen: bool


def make_trained(config, models: Models) -> Trained:
    """Return what `config` trains: adapters if it has a group `lora`, else all of the UNet. Raises ValueError."""
    return train_adapters(config, models) if "lora" in config else train_unet(config, models)


# ---- all of the UNet ------------------------------------------------------------------------------------------------


def train_unet(config, models: Models) -> Trained:
    """Train all of the UNet, from the weights of the model that the run begins from. Raises ValueError."""
    student = models.student
    preset = run_preset(config.to_dict(), student.guidance_embedding_dim is not None, models.stored.preset)

    def load() -> Params:
        abstract = models.base.abstract_params()["unet"]
        unet = read_params(models.stored, "unet", abstract, lambda leaf: np.dtype(np.float32))
        if student.guidance_embedding_dim is not None and models.base.guidance_embedding_dim is None:
            unet = add_guidance_input(unet, student, config.student.guidance_embedding_init, config.train.seed)
        return {"unet": unet}

    return Trained(
        params={"unet": student.abstract_params()["unet"]},
        load=load,
        bind=lambda params, frozen: bind_unet(student, params["unet"]),
        networks=lambda params, frozen: {**frozen, **params},
        write=lambda folder, params: write_model(folder, models.stored, models.configs, params, preset),
        objective=lambda objective: objective,
        of_frozen=False,
    )


def bind_unet(model: StableDiffusion, params: Params) -> Denoiser:
    """Return a UNet as objectives see it: the guidance weight is left out if it has no input for it."""
    if model.guidance_embedding_dim is not None:
        return partial(model.denoise, params)
    return lambda z, t, conditioning: model.denoise(params, z, t, conditioning._replace(guidance=None))


def add_guidance_input(unet: Params, student: StableDiffusion, init: str, seed: int) -> Params:
    """Return a teacher's UNet with the student's input for the guidance weight.

    init: "zero", so that at first student and teacher agree for every w, or "normal" weights drawn from `seed`, of the
    variance 1 / 3d of torch's linear layers, with which the public scripts begin; d is the embedding's dimension.
    """
    assert student.guidance_embedding_dim is not None
    width = (student.guidance_embedding_dim, student.unet.config["block_out_channels"][0])
    kernel = np.zeros(width, np.float32)
    if init == "normal":
        kernel = np.random.default_rng(seed).normal(0.0, (3 * width[0]) ** -0.5, width).astype(np.float32)
    return unet | {"time_embedding": unet["time_embedding"] | {"cond_proj": {"kernel": kernel}}}


# ---- adapters -------------------------------------------------------------------------------------------------------


def train_adapters(config, models: Models) -> Trained:
    """Train adapters of a UNet that stays as it is, by the group `lora` of the config. Raises ValueError.

    Its key `init` names a LoRA to begin from; if it is empty, the adapters begin as an update of zero.
    """
    group = config.lora.to_dict()
    start = group.pop("init", "")
    settings = from_settings(LoRASettings, "lora", group)
    unet = models.student.abstract_params()["unet"]
    begin = partial(lora.init, params=unet, settings=settings)
    merge = jax.jit(partial(lora.merge, scale=settings.scale))
    read = partial(read_adapters, start, unet, settings, models.stored.family)

    def load() -> Params:
        return {"lora": read() if start else jax.jit(begin)(jax.random.key(config.train.seed))}

    preset = adapter_preset(config.to_dict())
    if start:
        read()  # what does not fit is named before the step is compiled
    return Trained(
        params={"lora": jax.eval_shape(begin, jax.eval_shape(lambda: jax.random.key(0)))},
        load=load,
        bind=lambda params, frozen: Adapted(models.student, frozen["unet"], params["lora"], settings),
        networks=lambda params, frozen: {**frozen, "unet": merge(frozen["unet"], params["lora"])},
        write=lambda folder, params: write_adapters(
            folder, params["lora"], settings.alpha, overwrite=True, preset=preset
        ),
        objective=lambda objective: AdapterDropout(objective) if settings.dropout else objective,
        of_frozen=True,
    )


@dataclass(frozen=True)
class Adapted:
    """A UNet with adapters as objectives see it; keys: key[B] for the dropout of a batch, None for no dropout."""

    model: StableDiffusion
    unet: Params
    adapters: Params
    settings: LoRASettings
    keys: jax.Array | None = None

    def __call__(self, z: jax.Array, t: jax.Array, conditioning: Conditioning, /) -> jax.Array:
        rate = 0.0 if self.keys is None else self.settings.dropout
        with lora.applied(self.adapters, self.settings.scale, rate, self.keys):
            return bind_unet(self.model, self.unet)(z, t, conditioning)

    def with_dropout(self, keys: jax.Array) -> "Adapted":
        """Return the network for one batch of examples, of which each key drops its own."""
        return Adapted(self.model, self.unet, self.adapters, self.settings, keys)
