"""The data that a config names: captioned pictures, their latents, and the prompts that samples and reports show."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from lcm_jax.data import latents, loader, shapes, tar_shards
from lcm_jax.errors import phase
from lcm_jax.evaluation import verifier
from lcm_jax.models.stable_diffusion import StableDiffusion


def to_float(images: np.ndarray) -> jax.Array:
    """uint8[..., 3] -> float32 in -1..1."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1.0


def pictures(config, split: str, length: int) -> shapes.Shapes:
    """A split of the embedded set; what config.data names of `tasks` and `relations` is for training pictures."""
    if config.data.source != "shapes":
        raise ValueError(f"data.source is {config.data.source!r}; this objective takes shapes")
    chosen = {name: config.data[name] for name in ("tasks", "relations") if name in config.data and split == "train"}
    return shapes.Shapes(split, length, config.data.size, **chosen)


def identity_of(config) -> str:
    """What tells the training pictures of the embedded set from those of another config."""
    data = config.data
    relations = data.get("relations", tuple(shapes.RELATIONS))
    some = [] if set(relations) == set(shapes.RELATIONS) else relations
    return " ".join([data.source, str(data.size), str(data.length), *data.get("tasks", ()), *some])


def prompts_of(split: str, per_task: int) -> list[str]:
    """The same few captions of every task each time, evenly spread over those of the split."""
    chosen = []
    for task in shapes.TASKS:
        if not (every := shapes.captions(split, task)):
            continue
        order = np.random.default_rng(0).permutation(len(every))
        chosen += [every[order[i % len(every)]] for i in range(per_task)]
    return chosen


@dataclass(frozen=True)
class Captioned:
    """Captioned pictures to distil on. train, held_out: random access to {"image", "caption"[, "time_ids"]}.

    captions(group) -> held-out captions, as many as the config's group `sample` or `report` asks for. unseen: captions
    of what no training picture has. score: the share of pictures that satisfy their captions, where something can tell.
    identity: what tells `train` from other data.
    """

    train: Sequence
    held_out: Sequence
    captions: Callable[..., list[str]]
    unseen: list[str]
    score: Callable | None
    identity: str


def check_data(config) -> None:
    """Raise ValueError if `config.data` names no data; nothing is written, and no record is read."""
    if config.data.source == "shapes":
        return loader.check_length(config.data.length, config.train.batch_size)
    if config.data.source != "tar":
        raise ValueError(f"data.source is {config.data.source!r}; choose shapes or tar")
    most = max(config.sample.prompts, config.report.prompts, config.report.reference)
    if config.data.held_out < most:
        raise ValueError(
            f"data.held_out is {config.data.held_out}, fewer records than sample.prompts, report.prompts or "
            f"report.reference take: {most}; raise it, or lower these"
        )
    tar_shards.expand(config.data.shards)


def captioned(config, workdir: Path) -> Captioned:
    """The data that `config.data.source` names: `shapes`, or the `tar` shards of data.shards. Raises ValueError."""
    check_data(config)
    if config.data.source == "shapes":
        return Captioned(
            train=pictures(config, "train", config.data.length),
            held_out=pictures(config, "test", config.report.reference),
            captions=lambda group: prompts_of("test", group.per_task),
            # Half as many: they stand beside the figures, and the teacher's 50 steps are most of a report's time.
            unseen=prompts_of("composition", max(config.report.per_task // 2, 1)),
            score=verifier.score,
            identity=identity_of(config),
        )
    index = tar_shards.index_shards(tar_shards.expand(config.data.shards), workdir / "index")
    every = tar_shards.TarShards(index, config.data.size, config.train.seed, config.data.caption_field)
    first = len(every) - config.data.held_out
    train, held_out = every.part(0, first), every.part(max(first, 0), len(every))
    return Captioned(
        train=train,
        held_out=held_out,
        captions=lambda group: [held_out.caption(i) for i in range(group.prompts)],
        unseen=[],
        score=None,
        identity=train.identity,
    )


def batch_shapes(model: StableDiffusion, size: int, count: int, content: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes and dtypes of a batch of `count` images of size x size pixels and their captions.

    content: "image" for uint8[B, H, W, 3], or "moments" for float32[B, h, w, 2c], which `latent_source` reads. Raises
    ValueError if the autoencoder does not divide the size.
    """
    length = model.text_encoder.config.max_position_embeddings
    ids = (length,) if model.text_encoder_2 is None else (2, length)
    if size % model.downscale:
        raise ValueError(f"data.size {size} is not supported; use a multiple of {model.downscale}, for the autoencoder")
    side, channels = size // model.downscale, 2 * model.vae.config["latent_channels"]
    contents = {
        "image": jax.ShapeDtypeStruct((count, size, size, 3), jnp.uint8),
        "moments": jax.ShapeDtypeStruct((count, side, side, channels), jnp.float32),
    }
    return {
        "token_ids": jax.ShapeDtypeStruct((count, *ids), jnp.int32),
        "time_ids": jax.ShapeDtypeStruct((count, 6), jnp.float32),
        content: contents[content],
    }


def latent_source(
    config, workdir: Path, model: StableDiffusion, vae_params, tokenize, source: Sequence, identity: str
) -> latents.LatentCache:
    """The training pictures as moments and tokens, encoded once into `data.cache`, or workdir/latents by default.

    source, identity: the captioned pictures, and what tells them from others.
    """
    encode = jax.jit(lambda params, images: model.encode(params, to_float(images)))
    description = {
        "data": identity,
        "vae": digest(vae_params),
        "empty_prompt": str(np.asarray(tokenize([""])).tolist()),  # tokenizers differ in what they pad with
    }
    tar = config.data.source == "tar"
    memory = "set data.cache='', so that each step encodes its own images" if tar else "lower data.size"
    kept = "nothing of it is kept; run the same command to begin again"
    with phase("encoding images", memory=memory, kept=kept):
        on_device = jax.device_put(vae_params)
        return latents.cache_latents(
            source,
            lambda images: encode(on_device, images),
            tokenize,
            Path(config.data.cache or workdir / "latents"),
            description,
        )


def digest(params) -> str:
    """sha256 of a parameter tree's names and bytes, in hexadecimal."""
    total = hashlib.sha256()
    for path, leaf in sorted(flatten_dict(params).items()):
        total.update("/".join(path).encode())
        total.update(np.ascontiguousarray(leaf).tobytes())
    return total.hexdigest()
