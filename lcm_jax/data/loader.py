"""Records -> endless shuffled batches, addressed by step, so that a resumed run reads on where it stopped."""

from collections.abc import Iterator, Mapping, Sequence

import grain
import numpy as np


def check_length(records: int, batch_size: int) -> None:
    """Raise ValueError if there are fewer records than a batch has: shuffling could not fill it without repeats."""
    if records < batch_size:
        raise ValueError(f"the data has {records} records, fewer than train.batch_size {batch_size}; lower it")


def batches(
    source: Sequence[Mapping[str, np.ndarray]], batch_size: int, *, seed: int, first: int = 0, threads: int = 2
) -> Iterator[dict[str, np.ndarray]]:
    """Batches number first, first + 1, .. of the endless sequence that (source, batch_size, seed) determine.

    source: random access, each record a dict of arrays with the same shapes. Every epoch has its own order. Raises
    ValueError if the source has fewer records than a batch.
    """
    check_length(len(source), batch_size)
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat().batch(batch_size, drop_remainder=True)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(dataset[first:].to_iter_dataset(options))
