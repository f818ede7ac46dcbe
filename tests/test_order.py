"""No record is lost or seen twice in an epoch, across restarts and other numbers of workers and processes: by ids."""

from collections.abc import Mapping
from itertools import islice
from typing import Any

import numpy as np
import pytest
from absl import flags

from lcm_jax.data.buckets import check_buckets, nearest_bucket
from lcm_jax.data.loader import batches
from lcm_jax.data.order import BucketOrder
from lcm_jax.data.prepared import SKIPPED
from lcm_jax.data.substitutes import Substitutes

BUCKETS = np.random.default_rng(0).permutation(np.repeat([0, 2, 3], [23, 8, 13]))  # 1 has no record
SIZES = ((8, 8), (8, 16), (16, 8), (8, 24))
BATCH, SEED = 4, 5


class Ids:
    """Records that are their own ids, with an image of the size of their bucket if there are; 7 cannot be read."""

    def __init__(self, bucketed: bool):
        failure = ("data.shards", "fetch the shards again")
        groups = BUCKETS if bucketed else None
        self.sizes = [SIZES[bucket] if bucketed else (8, 8) for bucket in BUCKETS]
        self.substitutes = Substitutes(len(BUCKETS), str, lambda line: None, failure, groups=groups)

    def __len__(self) -> int:
        return len(BUCKETS)

    def __getitem__(self, i: int) -> dict[str, Any]:
        number, failures = self.substitutes.read(i, self.read)
        image = np.zeros(self.sizes[number], np.uint8)
        return {"id": np.int32(i), "image": image} | ({SKIPPED: failures} if failures else {})

    def read(self, number: int) -> int:
        if number == 7:
            raise OSError("gone")
        return number


def ids(first: int, count: int, bucketed: bool, **options: Any) -> list[list[int]]:
    more: Mapping = {"buckets": BUCKETS, "bucket_sizes": SIZES} if bucketed else {}
    reader = batches(Ids(bucketed), BATCH, seed=SEED, first=first, **more, **options)
    return [batch["id"].tolist() for batch in islice(reader, count)]


@pytest.mark.parametrize("bucketed", [False, True])
def test_every_epoch_has_every_record_once(bucketed):
    """As each bucket is read: without buckets there is one, of all records."""
    buckets = BUCKETS if bucketed else np.zeros(len(BUCKETS), int)
    found: dict[int, list[int]] = {int(bucket): [] for bucket in np.unique(buckets)}
    whole = ids(0, 60, bucketed)
    for batch in whole:
        assert len(set(buckets[batch])) == 1, "a batch has records of one bucket"
        found[int(buckets[batch[0]])] += batch
    for bucket, read in found.items():
        members = np.flatnonzero(buckets == bucket).tolist()
        epochs = [read[i : i + len(members)] for i in range(0, len(read), len(members))]
        assert len(epochs) >= 3 and all(sorted(epoch) == members for epoch in epochs[:-1])
        assert len(set(epochs[-1])) == len(epochs[-1]) and epochs[0] != epochs[1]
    assert whole != sorted(whole) and ids(0, 60, bucketed) == whole


@pytest.mark.parametrize("bucketed", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_restarts_on_any_number_of_processes_read_on(bucketed, processes):
    """A run of 40 batches that stops at any step, and goes on with another number of processes."""
    whole = ids(0, 40, bucketed)
    for first in (0, 1, 7, 11, 22, 35):
        parts = [ids(first, 5, bucketed, process=process, processes=processes) for process in range(processes)]
        assert [sum(rows, []) for rows in zip(*parts, strict=True)] == whole[first : first + 5]


@pytest.fixture(scope="module")
def parsed_flags():
    flags.FLAGS.mark_as_parsed()  # which commands do; grain's workers read its flags
    yield
    flags.FLAGS.unparse_flags()


@pytest.mark.parametrize("bucketed", [False, True])
def test_workers_do_not_change_the_order_and_their_skips_are_counted(bucketed, parsed_flags):
    substitutes = Ids(bucketed).substitutes
    assert ids(9, 13, bucketed, workers=2, threads=1, substitutes=substitutes) == ids(9, 13, bucketed)
    assert substitutes.counts() == {"OSError": 1}


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_buckets_is_random_access(seed):
    """Of many sets: batch by batch what a reader of each bucket in turn has, epochs of as many batches as there are."""
    rng = np.random.default_rng(seed)
    batch = int(rng.integers(1, 6))
    buckets = rng.permutation(np.repeat(np.arange(4), rng.integers(batch + 8, 40, 4)))
    order, taken, count = BucketOrder(buckets, batch, seed), np.zeros(4, int), np.bincount(buckets)
    for number in range(50):
        bucket, place = order.batch(number)
        assert place == taken[bucket]
        taken[bucket] += 1
        epochs = taken * batch / count
        assert epochs.max() - epochs.min() <= 2, "all buckets are read equally often"
        rows = [order[number * batch + row] for row in range(batch)]
        assert (buckets[rows] == bucket).all() and len(set(rows)) == batch or place * batch % count[bucket] > 0
    again = BucketOrder(buckets, batch, seed)
    assert [again.batch(number) for number in (49, 3, 20)] == [order.batch(number) for number in (49, 3, 20)]
    assert BucketOrder(buckets, batch, seed).batch(10**9)[1] > 0


def test_a_bucket_with_fewer_records_than_a_batch_is_an_error():
    with pytest.raises(
        ValueError,
        match=r"^bucket 16 x 8 \(height x width\) of data.buckets has 8 records, fewer than train.batch_size 10; r",
    ):
        batches(Ids(True), 10, seed=0, buckets=BUCKETS, bucket_sizes=SIZES)


def test_images_go_to_the_nearest_bucket():
    sizes = np.array([[100, 100], [0, 0], [50, 100], [200, 100], [9, 100], [143, 100], [140, 100], [70, 100]])
    assert nearest_bucket(sizes, ((8, 8), (8, 16), (16, 8))).tolist() == [0, 0, 1, 2, 1, 2, 0, 1]
    assert nearest_bucket(sizes, ((64, 64),)).tolist() == [0] * 8
    assert check_buckets([[64, 64], (64, 96)]) == ((64, 64), (64, 96))


@pytest.mark.parametrize("buckets", [3, (64,), ((64, 64), (32, 32)), ((64, 0),), ((64, 64.0),), (("64", 64),), "64"])
def test_buckets_that_are_none_are_an_error(buckets):
    with pytest.raises(ValueError, match=r"^data.buckets .*; use \(height, width\) pairs in pixels, each of another"):
        check_buckets(buckets)
