"""Records -> endless shuffled batches, addressed by step, so that a resumed run continues exactly."""

from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from lcm_jax.data.captioned import Records


def check_length(records: int, batch_size: int) -> None:
    """Raise ValueError if there are fewer records than a batch has: shuffling could not fill it without repeats."""
    if records < batch_size:
        raise ValueError(f"the data has {records} records, fewer than train.batch_size {batch_size}; lower it")


def batches(
    records: Records,
    batch_size: int,
    *,
    seed: int,
    first: int = 0,
    process: int = 0,
    processes: int = 1,
    random_map: Callable[[Any, np.random.Generator], Any] | None = None,
    threads: int = 2,
) -> Iterator[dict[str, np.ndarray]]:
    """Return this process's rows of batches number first, first + 1, ... of an endless sequence.

    The sequence depends on (records, batch_size, seed, random_map) alone. Of each batch, process i of n gets rows
    i * batch_size / n up to (i + 1) * batch_size / n. Every epoch has its own order.

    records: random access, each record a dict of arrays with the same shapes. random_map(record, rng) -> record, with
    an rng that depends on the seed and on the record's place in the sequence. Raises ValueError if there are fewer
    records than a batch has, or if the batch size is not a multiple of the number of processes.
    """
    check_length(len(records), batch_size)
    if batch_size % processes:
        raise ValueError(
            f"train.batch_size {batch_size} is not a multiple of the number of processes, {processes}; use a multiple"
        )
    # grain's annotation asks for SupportsIndex; it calls with int.
    source = grain.MapDataset.source(records)  # pyright: ignore[reportArgumentType]
    dataset = source.seed(seed).shuffle().repeat()
    if random_map is not None:
        dataset = dataset.random_map(random_map)
    dataset = dataset.batch(batch_size // processes, drop_remainder=True)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(dataset[first * processes + process :: processes].to_iter_dataset(options))
