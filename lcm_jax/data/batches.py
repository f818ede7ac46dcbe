"""Training batches as a step reads them: images, or moments that were encoded once, with token ids for captions."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from lcm_jax.data import loader
from lcm_jax.data.captioned import CaptionedDataset, Records, time_ids
from lcm_jax.data.latents import Encoder, Tokenize, cache_latents
from lcm_jax.data.masks import add_mask
from lcm_jax.data.prepared import SKIPPED
from lcm_jax.errors import phase


class ImageRecords:
    """Random access to {"image": uint8[H, W, 3]} of captioned images, with "token_ids": int32[L] (SDXL: [2, L]) and
    "time_ids": float32[6] if there is a tokenizer."""

    def __init__(self, records: Records, tokenize: Tokenize | None):
        self.records, self.tokenize = records, tokenize

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        record = self.records[i]
        images = {name: record[name] for name in ("image", SKIPPED) if name in record}
        if self.tokenize is None:
            return images
        token_ids = np.asarray(self.tokenize([record["caption"]])[0], np.int32)
        return {**images, "token_ids": token_ids, "time_ids": time_ids(record)}


def make_batches(
    config,
    workdir: Path,
    dataset: CaptionedDataset,
    first: int,
    *,
    tokenize: Tokenize | None = None,
    make_encoder: Callable[[], Encoder] | None = None,
    encoder_digest: str = "",
    masks: bool = False,
) -> Iterator[dict[str, np.ndarray]]:
    """Return this process's rows of training batches number first, first + 1, ... without end.

    config.data.encode decides between "step", a batch of "image": uint8[B, H, W, 3] for steps that encode their own
    images, and "cache", a batch of "moments": float32[B, h, w, 2c], encoded once into `config.data.cache` or by default
    workdir/latents. Both have "token_ids" and "time_ids" if there is a tokenizer.

    make_encoder: returns a function images -> moments (see `cache_latents`); called only if images have to be encoded,
    so that no weights wait on a device. encoder_digest: of its weights. masks: add "mask": uint8[B, H, W, 1], a random
    mask per record, 255 where to paint.
    Raises ValueError if there is less data than a batch, RunError if memory or disk do not suffice.
    """
    if config.data.encode == "step":
        records, threads = ImageRecords(dataset.train, tokenize), min(8, os.cpu_count() or 2)
    else:
        assert tokenize is not None and make_encoder is not None and not masks, "a cache has moments and no images"
        if dataset.buckets is not None:
            raise ValueError("data.buckets is not supported with data.encode=cache; set --config.data.encode=step")
        loader.check_length(len(dataset.train), config.train.batch_size)  # before hours of encoding
        remedy = "set --config.data.encode=step, so that each step encodes its own images"
        kept = "nothing of it is kept; run the same command to begin again"
        with phase("encoding images", memory=remedy, kept=kept):
            records, threads = _cached(config, workdir, dataset, tokenize, make_encoder, encoder_digest), 2
    return loader.batches(
        records,
        config.train.batch_size,
        seed=config.train.seed,
        first=first,
        process=jax.process_index(),
        processes=jax.process_count(),
        random_map=add_mask if masks else None,
        threads=threads,
        workers=config.data.get("workers", 0),
        buckets=dataset.buckets,
        bucket_sizes=dataset.bucket_sizes,
        substitutes=dataset.substitutes if config.data.encode == "step" else None,
    )


def _cached(config, workdir, dataset, tokenize, make_encoder, encoder_digest):
    fingerprint = {
        "data": dataset.fingerprint,
        "vae": encoder_digest,
        "empty_prompt": str(np.asarray(tokenize([""])).tolist()),  # tokenizers differ in what they pad with
    }
    folder = Path(config.data.cache or workdir / "latents")
    return cache_latents(dataset.train, make_encoder, tokenize, folder, fingerprint)
