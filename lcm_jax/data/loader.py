"""Records -> endless shuffled batches, addressed by step, so that a resumed run reads on where it stopped."""

from collections.abc import Iterator, Mapping, Sequence

import grain
import numpy as np


def batches(
    source: Sequence[Mapping[str, np.ndarray]], batch_size: int, *, seed: int, first: int = 0, threads: int = 2
) -> Iterator[dict[str, np.ndarray]]:
    """Batches number first, first + 1, .. of the endless sequence that (source, batch_size, seed) determine.

    source: random access, each record a dict of arrays with the same shapes. Every epoch has its own order. Raises
    ValueError where the source has fewer records than a batch: shuffling could not fill it without repeats.
    """
    if len(source) < batch_size:
        raise ValueError(f"the data has {len(source)} records, fewer than train.batch_size {batch_size}; lower it")
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat().batch(batch_size, drop_remainder=True)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(dataset[first:].to_iter_dataset(options))
