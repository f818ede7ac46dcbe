"""Training batches as a step reads them: images, or moments that were encoded once, with token ids for captions."""

import os
from collections.abc import Iterator

import jax
import numpy as np

from lcm_jax.data import loader
from lcm_jax.data.captioned import Records, time_ids
from lcm_jax.data.latents import Tokenize
from lcm_jax.data.masks import add_mask


class ImageRecords:
    """Random access to {"image": uint8[H, W, 3]} of captioned images, with "token_ids": int32[L] (SDXL: [2, L]) and
    "time_ids": float32[6] if there is a tokenizer."""

    def __init__(self, records: Records, tokenize: Tokenize | None):
        self.records, self.tokenize = records, tokenize

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        record = self.records[i]
        if self.tokenize is None:
            return {"image": record["image"]}
        token_ids = np.asarray(self.tokenize([record["caption"]])[0], np.int32)
        return {"image": record["image"], "token_ids": token_ids, "time_ids": time_ids(record)}


def make_batches(config, records: Records, first: int, *, masks: bool = False) -> Iterator[dict[str, np.ndarray]]:
    """Return this process's rows of training batches number first, first + 1, ... without end.

    records: `ImageRecords`, for steps that encode their own images, or a `LatentCache`. masks: add "mask":
    uint8[B, H, W, 1], a random mask per record, 255 where to paint. Raises ValueError if there is less data than a
    batch.
    """
    return loader.batches(
        records,
        config.train.batch_size,
        seed=config.train.seed,
        first=first,
        process=jax.process_index(),
        processes=jax.process_count(),
        random_map=add_mask if masks else None,
        threads=min(8, os.cpu_count() or 2) if config.data.encode == "step" else 2,
    )
