"""Shared parts of every recipe that trains a latent diffusion model: batches, examples and the task."""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.data.batches import image_batches, make_batches
from lcm_jax.data.buckets import check_buckets
from lcm_jax.data.captioned import CaptionedDataset
from lcm_jax.data.latents import Tokenize
from lcm_jax.data.sources import load_dataset
from lcm_jax.diffusion.pixels import to_float
from lcm_jax.diffusion.schedule import Schedule
from lcm_jax.models.conditioning import Conditioning
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.objectives.networks import Bind, Denoiser, Examples, Networks, Objective, Prepare
from lcm_jax.recipes.export import complete
from lcm_jax.recipes.latents import STORED, RunCache
from lcm_jax.recipes.models import (
    Models,
    abstract_frozen,
    abstract_prompts,
    encode_prompts,
    latent_shape,
    load_encoders,
    load_frozen,
    load_network,
    token_shape,
)
from lcm_jax.recipes.previews import Candidate, Previews, check_samplers, preview_figures
from lcm_jax.recipes.trained import Trained
from lcm_jax.sampling.generate import masked_channels
from lcm_jax.sampling.inputs import Inpainting
from lcm_jax.training.loop import TrainTask
from lcm_jax.training.state import Params
from lcm_jax.weights.model import compute_digests

# ---- batches and examples -------------------------------------------------------------------------------------------


def largest_size(data, downscale: int) -> tuple[int, int]:
    """Return (height, width) of the largest training images of a run, in pixels.

    data: the group of its config. Raises ValueError for a size that the autoencoder does not divide by `downscale`.
    """
    buckets = check_buckets(data.get("buckets", ()))
    for key, size in [("data.size", (data.size,)), *(("data.buckets", size) for size in buckets)]:
        if any(side % downscale for side in size):
            value = size[0] if len(size) == 1 else size
            raise ValueError(f"{key} {value} is not supported; use a multiple of {downscale}, for the autoencoder")
    return max(buckets, key=math.prod) if buckets else (data.size, data.size)


def batch_shapes(model: StableDiffusion, data, count: int, prompts: bool = True) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes and dtypes of a batch of `count` images, of the largest size, and their captions.

    data: the group of a config; its `encode` is "step" for images (and masks for an inpainting model), or "cache" for
    moments. prompts: True if steps encode prompts; False for a cache of encoded ones. Raises ValueError if the
    autoencoder does not divide a size, and for an inpainting model without images.
    """
    size, encode = largest_size(data, model.downscale), data.encode
    if model.inpaints and encode != "step":
        raise ValueError(
            "this is an inpainting model, of which each step masks images anew; use --config.data.encode=step"
        )
    shapes: dict[str, tuple] = {"time_ids": ((count, 6), jnp.float32)}
    if prompts:
        shapes["token_ids"] = ((count, *token_shape(model)), jnp.int32)
    else:
        shapes |= {name: (each.shape, STORED) for name, each in abstract_prompts(model, count).items()}
    if encode == "cache":
        latent = [side // model.downscale for side in size]
        shapes["moments"] = ((count, *latent, 2 * model.vae.config["latent_channels"]), STORED)
    else:
        shapes["image"] = ((count, *size, 3), jnp.uint8)
    if model.inpaints:
        shapes["mask"] = ((count, *size, 1), jnp.uint8)
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}


def make_prepare(model: StableDiffusion) -> Prepare:
    """Return prepare(params, frozen, batch, draws) -> Examples for batches of `batch_shapes`.

    Networks are those of `params`, else those of `frozen`. Each micro-batch is encoded on its own, so that no image
    waits in memory. The empty prompt is "empty_prompt" of `frozen`, encoded once; without that its tokens, "empty_ids",
    are encoded in each step, by a text encoder that is trained.
    """

    def prepare(params: Params, frozen: Params, batch: Mapping[str, jax.Array], draws: Any) -> Examples:
        networks = {**frozen, **params}
        images = to_float(batch["image"]) if "image" in batch else None
        moments = batch["moments"] if images is None else model.encode(networks["vae"], images)
        z = model.to_latents(moments.astype(jnp.float32), draws.posterior)
        if "empty_prompt" in frozen:
            states = batch if "context" in batch else {**batch, **encode_prompts(model, networks, batch["token_ids"])}
            prompt, empty = stored_prompts(model, frozen["empty_prompt"], states, draws.keep_prompt)
        else:
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


def stored_prompts(
    model: StableDiffusion, empty: Mapping[str, jax.Array], batch: Mapping[str, jax.Array], keep: jax.Array
) -> tuple[Conditioning, Conditioning]:
    """Return the encoded prompts of a batch, the empty one where `keep` is False, and the empty prompt for each.

    empty: of one prompt, see `models.encode_prompts`. keep: bool[B].
    """
    dtype = model.dtype_of("text_encoder")
    none = {name: jnp.broadcast_to(each.astype(dtype), batch[name].shape) for name, each in empty.items()}
    kept = {
        name: jnp.where(keep.reshape(-1, *(1,) * empty[name].ndim), batch[name].astype(dtype), none[name])
        for name in empty
    }
    sizes = {"time_ids": batch["time_ids"]} if "pooled" in empty else {}
    return Conditioning(**kept, **sizes), Conditioning(**none, **sizes)


def latent_batches(
    config, dataset: Callable[[], CaptionedDataset], tokenize: Tokenize, cache: RunCache, masks: bool = False
) -> Callable[[int], Iterator[Mapping[str, np.ndarray]]]:
    """Return make_batches(first) of a TrainTask, whose batches are those of `batch_shapes`.

    dataset: called when the first batch is made, unless that comes from `cache`. masks: see `data.batches`.
    """

    def batches(first: int) -> Iterator[Mapping[str, np.ndarray]]:
        if config.data.encode == "step":
            return image_batches(config, dataset(), tokenize, first, masks=masks)
        records = cache.open()
        return make_batches(config, records, first, buckets=records.buckets, bucket_sizes=cache.image_sizes(records))

    return batches


def bind_networks(
    student: Callable[[Params, Params], Denoiser], teacher: StableDiffusion | None, schedule: Schedule
) -> Bind:
    """Return bind(params, target, frozen) -> Networks.

    student(params, frozen) is the network that is trained, and with other parameters its target. teacher: its UNet is
    frozen["unet"]; None for an objective without one.
    """

    def bind(params: Params, target: Params, frozen: Params) -> Networks:
        taught = None if teacher is None else partial(teacher.denoise, frozen["unet"])
        return Networks(student(params, frozen), student(target, frozen), taught, schedule)

    return bind


# ---- the task -------------------------------------------------------------------------------------------------------


def make_task(
    config, workdir: Path, models: Models, objective: Objective, trained: Trained, *, teaches: bool = False
) -> TrainTask:
    """Return the task of training `trained`, a part of `models.student`; all else is frozen.

    teaches: the objective has a teacher, `models.base`. Raises ValueError for settings of data, previews and report
    that are not supported; nothing is written, and no tensor is read.
    """
    keep_unet = teaches or trained.of_frozen
    prompts = config.data.encode == "step"  # a cache has them encoded

    def base_params(_: Params, frozen: Params) -> Params:
        # A UNet that no step needs is on the device only while images are generated with it.
        return frozen if keep_unet else {**frozen, "unet": load_network(models, "unet")}

    candidates = (
        Candidate(models.role, models.base, base_params),
        Candidate("student", models.student, trained.networks),
    )
    check_samplers(config, candidates)

    @cache
    def dataset() -> CaptionedDataset:  # opened when it is first needed: indexing writes to the workdir
        return load_dataset(config, workdir)

    @cache
    def previews() -> Previews:
        return Previews(config, candidates, models.tokenize, dataset())

    @cache
    def digests() -> dict[str, str]:
        return compute_digests(models.stored)

    def with_encoders(frozen: Params) -> Params:
        # Nor are text encoders that no step needs.
        return frozen if prompts else {**frozen, **jax.device_put(load_encoders(models))}

    def on_complete(ema: Params, frozen: Params, seconds: float) -> None:
        export = lambda folder: trained.write(folder, ema)  # noqa: E731
        complete(config, workdir, export, previews(), ema, with_encoders(frozen), seconds)

    latents = RunCache(
        folder=Path(config.data.cache or workdir / "latents"),
        model=models.base,
        load=partial(load_network, models),
        digests=digests,
        dataset=dataset,
        tokenizers=lambda: models.tokenizers,
        prompts=True,
        batch_size=config.train.batch_size,
    )

    return TrainTask(
        title=config.objective.name,
        objective=trained.objective(objective),
        bind=bind_networks(trained.bind, models.base if teaches else None, models.student.schedule),
        prepare=make_prepare(models.student),
        params=trained.params,
        frozen=abstract_frozen(models.base, keep_unet, prompts),
        load_params=trained.load,
        load_frozen=lambda: load_frozen(models, keep_unet, prompts),
        latents=partial(latent_shape, models.student),
        batch=batch_shapes(models.student, config.data, config.train.batch_size, prompts),
        encode_data=None if prompts else latents.write,
        make_batches=latent_batches(config, dataset, models.tokenize, latents, models.student.inpaints),
        write_preview=lambda ema, frozen, path: previews().write(ema, with_encoders(frozen), path),
        on_complete=on_complete,
        weight_digests=lambda: {f"{models.role}'s {name}": digest for name, digest in digests().items()},
        figures=preview_figures(config, candidates[-1]),
        data=lambda: {"images": str(len(dataset().train)), "digest": dataset().fingerprint},
        skipped=lambda: dataset().skipped(),
    )
