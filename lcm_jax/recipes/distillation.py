"""Shared parts of every recipe that trains a latent diffusion model: models, frozen weights, batches and the task."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.data import tokenizer as tokenizers
from lcm_jax.data.batches import make_batches
from lcm_jax.data.captioned import CaptionedDataset
from lcm_jax.data.latents import Tokenize
from lcm_jax.data.sources import load_dataset
from lcm_jax.diffusion.pixels import to_float
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.objectives.networks import Bind, Examples, Networks, Objective, Prepare
from lcm_jax.recipes.export import complete, write_model
from lcm_jax.recipes.previews import Candidate, Previews, check_samplers
from lcm_jax.sampling.generate import masked_channels
from lcm_jax.sampling.inputs import Inpainting
from lcm_jax.training.loop import TrainTask
from lcm_jax.training.state import Params
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.model import StoredModel, check_complete, check_params, compute_digests, open_model, read_params
from lcm_jax.weights.scheduler import lcm_scheduler


class OpenModel(Protocol):
    """`weights.model.open_model`, or for a dry run another opener that needs no weights."""

    def __call__(self, name: str, /) -> StoredModel: ...


@dataclass(frozen=True)
class Models:
    """The models of a run.

    stored: the teacher in its files. configs: the student's, as they are exported. teacher, student: their networks.
    """

    stored: StoredModel
    configs: Mapping[str, Mapping[str, Any]]
    teacher: StableDiffusion
    student: StableDiffusion

    @cached_property
    def tokenizers(self) -> list:
        """The teacher's tokenizers, opened at the first use. Raises ModelError if it has none."""
        return tokenizers.open_tokenizers(check_complete(self.stored), self.stored.configs)

    def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
        """Return token ids, int32[B, L], or int32[B, 2, L] for SDXL."""
        return tokenizers.encode_for(self.tokenizers, prompts)


def open_models(config, make_configs: Callable[[StoredModel], Mapping], open_model: OpenModel) -> Models:
    """Open the teacher and build both models; no tensor is read.

    make_configs(stored) returns the student's configs. Raises ModelError, and ValueError for configs that are
    not supported.
    """
    stored, dtype = open_model(config.teacher), jnp.dtype(config.train.dtype)
    configs = make_configs(stored)
    teacher = StableDiffusion.from_configs(stored.configs, dtype)
    return Models(stored, configs, teacher, StableDiffusion.from_configs(configs, dtype, remat=config.train.remat))


def open_teacher(name: str) -> StoredModel:
    """Open a model to train from, and check that it is complete before any work. Raises ModelError."""
    stored = open_model(name)
    try:
        check_complete(stored)
    except ModelError as error:
        raise ModelError(f"{error}: convert it to a folder by lcm_jax.convert, and train from that") from None
    check_params(stored, StableDiffusion.from_configs(stored.configs).abstract_params())
    return stored


def lcm_configs(config, num_ddim_steps: int, stored: StoredModel) -> dict[str, Mapping[str, Any]]:
    """Return the teacher's configs with an input for the guidance weight and the scheduler of a few-step student.

    num_ddim_steps: timesteps of its grid. Raises ValueError for a teacher that is a student already.
    """
    if stored.configs["unet"].get("time_cond_proj_dim") is not None:
        raise ValueError(f"teacher {config.teacher!r} is already a latent consistency model; use its own teacher")
    return dict(stored.configs) | {
        "unet": dict(stored.configs["unet"]) | {"time_cond_proj_dim": config.student.guidance_embedding_dim},
        "scheduler": lcm_scheduler(stored.configs["scheduler"], num_ddim_steps),
    }


def add_guidance_input(unet: Params, student: StableDiffusion) -> Params:
    """Return a teacher's UNet with the student's input for the guidance weight.

    Its weights are zero: at first student and teacher agree for every w.
    """
    assert student.guidance_embedding_dim is not None
    width = (student.guidance_embedding_dim, student.unet.config["block_out_channels"][0])
    projection = {"cond_proj": {"kernel": np.zeros(width, np.float32)}}
    return unet | {"time_embedding": unet["time_embedding"] | projection}


# ---- frozen weights -------------------------------------------------------------------------------------------------


def frozen_dtype(dtype: Any) -> Callable[[Any], np.dtype]:
    """Return leaf -> the dtype in which a network that computes in `dtype` holds a frozen parameter.

    Such a network casts matrices and kernels before each use, so that these lose nothing; biases and scales stay
    float32.
    """
    return lambda leaf: jnp.dtype(dtype if leaf.ndim >= 2 else jnp.float32)


def abstract_frozen(model: StableDiffusion) -> dict[str, Any]:
    """Return the shapes and dtypes of a model's frozen parameters by network, and of the empty prompt's tokens."""
    trees: dict[str, Any] = {"empty_ids": jax.ShapeDtypeStruct(token_shape(model), jnp.int32)}
    for name, tree in model.abstract_params().items():
        cast = frozen_dtype(model.dtype_of(name))
        trees[name] = jax.tree.map(lambda x, cast=cast: jax.ShapeDtypeStruct(x.shape, cast(x)), tree)
    return trees


def load_frozen(models: Models) -> dict[str, Any]:
    """Read what `abstract_frozen` describes, each tensor cast as it is read, so that no second copy exists.

    Each is copied out of its file: on a CPU the device may use these very arrays, and files may change.
    """
    trees: dict[str, Any] = {"empty_ids": np.asarray(models.tokenize([""])[0], np.int32)}
    for name, tree in models.teacher.abstract_params().items():
        cast = frozen_dtype(models.teacher.dtype_of(name))
        trees[name] = read_params(models.stored, name, tree, cast, put=np.array)
    return trees


# ---- batches and examples -------------------------------------------------------------------------------------------


def batch_shapes(model: StableDiffusion, size: int, count: int, encode: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes and dtypes of a batch of `count` images of size x size pixels and their captions.

    encode: "step" for images (and masks for an inpainting model), or "cache" for moments. Raises ValueError if the
    autoencoder does not divide the size, and for an inpainting model without images.
    """
    if size % model.downscale:
        raise ValueError(f"data.size {size} is not supported; use a multiple of {model.downscale}, for the autoencoder")
    if model.inpaints and encode != "step":
        raise ValueError(
            "this is an inpainting model, of which each step masks images anew; use --config.data.encode=step"
        )
    latents = latent_shape(model, size, count).shape
    shapes = {"token_ids": ((count, *token_shape(model)), jnp.int32), "time_ids": ((count, 6), jnp.float32)}
    if encode == "cache":
        shapes["moments"] = ((*latents[:-1], 2 * latents[-1]), jnp.float32)
    else:
        shapes["image"] = ((count, size, size, 3), jnp.uint8)
    if model.inpaints:
        shapes["mask"] = ((count, size, size, 1), jnp.uint8)
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}


def token_shape(model: StableDiffusion) -> tuple[int, ...]:
    """Return the shape of a prompt's tokens: (L,), or (2, L) for the two encoders of SDXL."""
    length = model.text_encoder.config.max_position_embeddings
    return (length,) if model.text_encoder_2 is None else (2, length)


def latent_shape(model: StableDiffusion, size: int, count: int) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of the scaled latents of `count` images of size x size pixels."""
    side = size // model.downscale
    return jax.ShapeDtypeStruct((count, side, side, model.vae.config["latent_channels"]), jnp.float32)


def make_prepare(model: StableDiffusion) -> Prepare:
    """Return prepare(params, frozen, batch, draws) -> Examples for batches of `batch_shapes`.

    Networks are those of `params`, else those of `frozen`. Each micro-batch is encoded on its own, so that no image
    waits in memory.
    """

    def prepare(params: Params, frozen: Params, batch: Mapping[str, jax.Array], draws: Any) -> Examples:
        networks = {**frozen, **params}
        images = to_float(batch["image"]) if "image" in batch else None
        moments = batch["moments"] if images is None else model.encode(networks["vae"], images)
        z = model.to_latents(moments, draws.posterior)

        token_ids, time_ids = batch["token_ids"], batch["time_ids"]
        empty_ids = jnp.broadcast_to(frozen["empty_ids"], token_ids.shape)
        keep = draws.keep_prompt.reshape(-1, *(1,) * (token_ids.ndim - 1))
        prompt = model.encode_prompt(networks, jnp.where(keep, token_ids, empty_ids), time_ids)
        empty = model.encode_prompt(networks, empty_ids, time_ids)
        if model.inpaints:
            # The draw of z's posterior serves the masked image too: where all is kept, both have the same latents.
            mask = (batch["mask"] > 127).astype(jnp.float32)
            masked = masked_channels(model, networks, Inpainting(images, mask, draws.posterior))
            prompt, empty = prompt._replace(masked=masked), empty._replace(masked=masked)
        return Examples(z, prompt, empty)

    return prepare


def latent_batches(
    config,
    workdir: Path,
    dataset: Callable[[], CaptionedDataset],
    model: StableDiffusion,
    tokenize: Tokenize,
    vae_digest: Callable[[], str],
    masks: bool = False,
) -> Callable[[Params, int], Iterator[Mapping[str, np.ndarray]]]:
    """Return make_batches(frozen, first) of a TrainTask, whose batches are those of `batch_shapes`.

    dataset, vae_digest: called when the first batch is made. model: its autoencoder, with frozen["vae"], encodes images
    for a cache. masks: see `data.batches`.
    """
    encode = jax.jit(lambda vae, images: model.encode(vae, to_float(images)))

    def batches(frozen: Params, first: int) -> Iterator[Mapping[str, np.ndarray]]:
        return make_batches(
            config,
            workdir,
            dataset(),
            first,
            tokenize=tokenize,
            make_encoder=lambda: partial(encode, frozen["vae"]),
            encoder_digest=vae_digest(),
            masks=masks,
        )

    return batches


# ---- the task -------------------------------------------------------------------------------------------------------


def bind_unets(teacher: StableDiffusion, student: StableDiffusion) -> Bind:
    """Return bind(params, target, frozen) -> Networks for a student all of whose UNet is trained."""

    def bind(params: Params, target: Params, frozen: Params) -> Networks:
        return Networks(
            student=partial(student.denoise, params["unet"]),
            target=partial(student.denoise, target["unet"]),
            teacher=partial(teacher.denoise, frozen["unet"]),
            schedule=student.schedule,
        )

    return bind


def make_task(
    config,
    workdir: Path,
    models: Models,
    objective: Objective,
    *,
    bind: Bind,
    params: Params,
    load_params: Callable[[], Params],
) -> TrainTask:
    """Return the task of distilling or fine-tuning `models.student`, whose networks are `params` and else frozen.

    bind, params, load_params: see `TrainTask`. Raises ValueError for settings of data, previews and report that are not
    supported; nothing is written, and no tensor is read.
    """
    candidates = (
        Candidate("teacher", models.teacher, lambda trained, frozen: frozen),
        Candidate("student", models.student, lambda trained, frozen: {**frozen, **trained}),
    )
    check_samplers(config, candidates)
    size, count = config.data.size, config.train.batch_size

    @cache
    def dataset() -> CaptionedDataset:  # opened when it is first needed: indexing writes to the workdir
        return load_dataset(config, workdir)

    @cache
    def previews() -> Previews:
        return Previews(config, candidates, models.tokenize, dataset())

    @cache
    def digests() -> dict[str, str]:
        return compute_digests(models.stored)

    def on_complete(ema: Params, frozen: Params, seconds: float) -> None:
        export = lambda folder: write_model(folder, models.stored, models.configs, ema)  # noqa: E731
        complete(config, workdir, export, previews(), ema, frozen, seconds)

    return TrainTask(
        title=config.objective.name,
        objective=objective,
        bind=bind,
        prepare=make_prepare(models.student),
        params=params,
        frozen=abstract_frozen(models.teacher),
        load_params=load_params,
        load_frozen=lambda: load_frozen(models),
        latents=latent_shape(models.student, size, count),
        batch=batch_shapes(models.student, size, count, config.data.encode),
        make_batches=latent_batches(
            config, workdir, dataset, models.teacher, models.tokenize, lambda: digests()["vae"], models.student.inpaints
        ),
        write_preview=lambda ema, frozen, path: previews().write(ema, frozen, path),
        on_complete=on_complete,
        weight_digests=lambda: {f"teacher's {name}": digest for name, digest in digests().items()},
    )
