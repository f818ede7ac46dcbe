"""The order of training records: which ones are in batch number n, computed from n alone.

Without buckets it is grain's endless sequence of shuffled epochs. With buckets every batch has records of one bucket:
those of a bucket of n records are an endless sequence of its own, which its batches of B take in turn, so that no
record is lost or repeated within one of its epochs. After e epochs a bucket has had floor(e n / B) batches. The batches
of an epoch come in an order that the seed and the epoch shuffle.
"""

import sys
from collections.abc import Sequence
from functools import lru_cache

import grain
import numpy as np

from lcm_jax.data.buckets import Size


class BucketOrder:
    """Random access to the record at each position of an endless sequence, whose batches are of one bucket each.

    Position p is row p % batch_size of batch p // batch_size.
    """

    def __init__(self, buckets: np.ndarray, batch_size: int, seed: int, names: Sequence[Size] = ()):
        """buckets: int[N], of each record. names: the size of each bucket, for messages.

        Raises ValueError for a bucket that has records, but fewer than a batch.
        """
        self._members = [np.flatnonzero(buckets == b) for b in np.unique(buckets)]
        for members in self._members:
            if len(members) < batch_size:
                bucket = int(buckets[members[0]])
                name = "{} x {}".format(*names[bucket]) if names else str(bucket)
                raise ValueError(
                    f"bucket {name} (height x width) of data.buckets has {len(members)} records, fewer than "
                    f"train.batch_size {batch_size}; remove it, lower the batch size, or raise data.repeats"
                )
        self._batch_size, self._seed = batch_size, seed
        self._counts = np.array([len(members) for members in self._members], np.int64)
        self._shuffled = [
            grain.MapDataset.range(len(members)).seed(_mix(seed, b)).shuffle().repeat()
            for b, members in enumerate(self._members)
        ]
        self._epoch_of = lru_cache(2)(self._epoch)

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_epoch_of"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._epoch_of = lru_cache(2)(self._epoch)

    def __len__(self) -> int:
        return sys.maxsize // 2

    def __getitem__(self, position: int) -> int:
        number, row = divmod(position, self._batch_size)
        bucket, batch = self.batch(number)
        return int(self._members[bucket][self._shuffled[bucket][batch * self._batch_size + row]])

    def batch(self, number: int) -> tuple[int, int]:
        """Return (index of the bucket among those with records, number among its batches) of a batch."""
        epoch = max(number * self._batch_size // int(self._counts.sum()), 0)
        while self._batches(epoch + 1).sum() <= number:  # each bucket rounds down, so that it is a few epochs at most
            epoch += 1
        bucket, k = self._epoch_of(epoch)[number - int(self._batches(epoch).sum())]
        return int(bucket), int(k)

    def _batches(self, epochs: int) -> np.ndarray:
        """Return how many batches each bucket has had after a number of epochs."""
        return epochs * self._counts // self._batch_size

    def _epoch(self, epoch: int) -> np.ndarray:
        """Return the batches of an epoch: the buckets are shuffled, and the batches of each come in turn."""
        numbers, counts = self._batches(epoch), self._batches(epoch + 1) - self._batches(epoch)
        shuffled = np.random.default_rng([self._seed, epoch]).permutation(np.repeat(np.arange(len(counts)), counts))
        ordered = np.empty(len(shuffled), np.int64)
        for bucket, number in enumerate(numbers):
            places = np.flatnonzero(shuffled == bucket)
            ordered[places] = number + np.arange(len(places))
        return np.stack([shuffled, ordered], axis=1)


def _mix(seed: int, bucket: int) -> int:
    return int(np.random.SeedSequence([seed, bucket]).generate_state(1)[0])
