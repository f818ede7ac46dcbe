"""Records -> endless shuffled batches, addressed by step, so that a resumed run continues exactly."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import grain
import numpy as np

from lcm_jax.data.buckets import Size
from lcm_jax.data.captioned import Records
from lcm_jax.data.order import BucketOrder
from lcm_jax.data.prepared import SKIPPED
from lcm_jax.data.substitutes import Substitutes

STOP_SECONDS = 5  # that a worker lives on after SIGTERM


def check_length(records: int, batch_size: int) -> None:
    """Raise ValueError if there are fewer records than a batch has: shuffling could not fill it without repeats."""
    if records < batch_size:
        raise ValueError(f"the data has {records} records, fewer than train.batch_size {batch_size}; lower it")


class Ordered:
    """Records in an endless order, in place of grain's shuffle."""

    def __init__(self, records: Records, order: BucketOrder):
        self._records, self._order = records, order

    def __len__(self) -> int:
        return sys.maxsize // 2

    def __getitem__(self, position: int) -> Mapping[str, Any]:
        return self._records[self._order[position]]


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
    workers: int = 0,
    buckets: np.ndarray | None = None,
    bucket_sizes: Sequence[Size] = (),
    substitutes: Substitutes | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Return this process's rows of batches number first, first + 1, ... of an endless sequence.

    The sequence depends on (records, batch_size, seed, random_map, buckets) alone. Of each batch, process i of n gets
    rows i * batch_size / n up to (i + 1) * batch_size / n. Every epoch has its own order.

    records: random access, each record a dict of arrays with the same shapes, or with those of its bucket.
    random_map(record, rng) -> record, with an rng that depends on the seed and on the record's place in the sequence.
    threads: that read records, in each of `workers` processes; 0 is in this one. buckets: int[N], the number of the
    bucket of each record in `bucket_sizes`; a batch has records of one, see `BucketOrder`. substitutes: counts the
    records that others have replaced.
    Raises ValueError if there are fewer records than a batch has, in all or in a bucket, or if the batch size is not a
    multiple of the number of processes.
    """
    check_length(len(records), batch_size)
    if batch_size % processes:
        raise ValueError(
            f"train.batch_size {batch_size} is not a multiple of the number of processes, {processes}; use a multiple"
        )
    # grain's annotations ask for SupportsIndex; it calls with int.
    if buckets is None:
        dataset = grain.MapDataset.source(records).seed(seed).shuffle().repeat()  # pyright: ignore[reportArgumentType]
    else:
        ordered = Ordered(records, BucketOrder(buckets, batch_size, seed, bucket_sizes))
        dataset = grain.MapDataset.source(ordered).seed(seed)  # pyright: ignore[reportArgumentType]
    if random_map is not None:
        dataset = dataset.random_map(random_map)
    dataset = dataset.batch(batch_size // processes, drop_remainder=True, batch_fn=_stack)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    iterable = dataset[first * processes + process :: processes].to_iter_dataset(options)
    if workers:
        each = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        iterable = iterable.mp_prefetch(each, worker_init_fn=_start_worker)
    return _counted(iter(iterable), batch_size // processes, substitutes)


def _stack(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a batch of arrays; `SKIPPED` is a list of what the records have of it."""
    batch: dict[str, Any] = {
        name: np.stack([record[name] for record in records]) for name in records[0] if name != SKIPPED
    }
    if skipped := [record[SKIPPED] for record in records if SKIPPED in record]:
        batch[SKIPPED] = skipped
    return batch


def _start_worker(index: int, count: int) -> None:
    """Live as long as the process that reads the batches: a signal to all of them must not end a worker before it, and
    no worker outlives one that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: threading.Timer(STOP_SECONDS, os._exit, [0]).start())
    reader = multiprocessing.parent_process()
    if reader is not None:
        threading.Thread(target=lambda: (reader.join(), os._exit(1)), daemon=True).start()


def _counted(
    batches: grain.DatasetIterator, rows: int, substitutes: Substitutes | None
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the batches without `SKIPPED`, which `substitutes` counts: worker processes cannot."""
    with closing(batches):
        for batch in batches:
            skipped = batch.pop(SKIPPED, [])
            if substitutes is not None:
                substitutes.count(rows, skipped)
            yield batch
