"""Training batches as a step reads them: images, or moments that were encoded once, with token ids for captions."""

import os
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from lcm_jax.data import loader
from lcm_jax.data.buckets import Size
from lcm_jax.data.captioned import CaptionedDataset, Records, time_ids
from lcm_jax.data.latents import Tokenize
from lcm_jax.data.masks import add_mask
from lcm_jax.data.prepared import SKIPPED
from lcm_jax.data.substitutes import Substitutes


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


def image_batches(
    config, dataset: CaptionedDataset, tokenize: Tokenize | None, first: int, masks: bool = False
) -> Iterator[dict[str, np.ndarray]]:
    """Return `make_batches` of "image": uint8[B, H, W, 3], for steps that encode their own.

    Those have "token_ids" and "time_ids" if there is a tokenizer.
    """
    return make_batches(
        config,
        ImageRecords(dataset.train, tokenize),
        first,
        masks=masks,
        buckets=dataset.buckets,
        bucket_sizes=dataset.bucket_sizes,
        substitutes=dataset.substitutes,
    )


def make_batches(
    config,
    records: Records,
    first: int,
    *,
    masks: bool = False,
    buckets: np.ndarray | None = None,
    bucket_sizes: Sequence[Size] = (),
    substitutes: Substitutes | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Return this process's rows of training batches number first, first + 1, ... without end.

    records: `ImageRecords`, or a `LatentCache` if config.data.encode is "cache". masks: add "mask":
    uint8[B, H, W, 1], a random mask per record, 255 where to paint. buckets, bucket_sizes, substitutes: see
    `loader.batches`. Raises ValueError if there is less data than a batch.
    """
    images = config.data.encode == "step"
    return loader.batches(
        records,
        config.train.batch_size,
        seed=config.train.seed,
        first=first,
        process=jax.process_index(),
        processes=jax.process_count(),
        random_map=add_mask if masks else None,
        threads=min(8, os.cpu_count() or 2) if images else 2,
        workers=config.data.get("workers", 0) if images else 0,
        buckets=buckets,
        bucket_sizes=bucket_sizes,
        substitutes=substitutes,
    )
