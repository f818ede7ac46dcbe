from itertools import islice

import numpy as np
import pytest

from lcm_jax.data.loader import batches


def _source(count: int) -> list[dict[str, np.ndarray]]:
    return [{"id": np.int32(i), "square": np.full(2, i * i, np.float32)} for i in range(count)]


def _ids(iterator, count: int) -> list[list[int]]:
    return [batch["id"].tolist() for batch in islice(iterator, count)]


def test_batches_stack_whole_records():
    batch = next(batches(_source(10), 4, seed=0))
    assert batch["id"].shape == (4,) and batch["square"].shape == (4, 2)
    np.testing.assert_array_equal(batch["square"][:, 0], batch["id"].astype(np.float32) ** 2)


@pytest.mark.parametrize("count", [12, 13])  # epochs that end with a batch, and within one
@pytest.mark.parametrize("first", [1, 3, 4, 11])
def test_a_resumed_reader_continues_exactly(count, first):
    whole = _ids(batches(_source(count), 4, seed=3), first + 8)
    assert _ids(batches(_source(count), 4, seed=3, first=first), 8) == whole[first:]


def test_threads_do_not_change_the_order():
    assert _ids(batches(_source(20), 4, seed=1, threads=1), 12) == _ids(batches(_source(20), 4, seed=1, threads=4), 12)


def test_seeds_do():
    assert _ids(batches(_source(20), 4, seed=1), 5) != _ids(batches(_source(20), 4, seed=2), 5)


def test_every_epoch_is_whole_and_has_its_own_order():
    read = np.concatenate(_ids(batches(_source(12), 4, seed=0), 9)).reshape(3, 12).tolist()
    assert all(sorted(epoch) == list(range(12)) for epoch in read)
    assert read[0] != read[1] != read[2] != read[0]
    assert read[0] != list(range(12))


def test_records_fewer_than_a_batch_are_an_error():
    with pytest.raises(ValueError, match="3 records.*train.batch_size 4"):
        batches(_source(3), 4, seed=0)
    assert sorted(next(batches(_source(4), 4, seed=0))["id"].tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("first", [0, 3])
def test_processes_read_the_rows_of_one(processes, first):
    """Batch b is the same for any number of processes, and what the random map makes of its records as well."""

    def read(**more) -> list[list[list[float]]]:
        noisy = lambda record, rng: record | {"noise": rng.uniform()}  # noqa: E731
        found = islice(batches(_source(20), 8, seed=1, first=first, random_map=noisy, **more), 7)
        return [np.stack([batch["id"], batch["noise"]], 1).tolist() for batch in found]

    parts = [read(process=process, processes=processes) for process in range(processes)]
    assert [sum(rows, []) for rows in zip(*parts, strict=True)] == read()


def test_a_batch_that_processes_cannot_share_is_an_error():
    with pytest.raises(ValueError, match="train.batch_size 8 is not a multiple of the number of processes, 3"):
        batches(_source(20), 8, seed=0, processes=3)
