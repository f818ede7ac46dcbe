from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from lcm_jax.data.latents import LatentCache, cache_latents
from lcm_jax.data.loader import batches
from lcm_jax.data.shapes import Shapes

# ---- loader ---------------------------------------------------------------------------------------------------------


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


# ---- latent cache ---------------------------------------------------------------------------------------------------


class Encoder:
    """Mean over 8x8 blocks in place of a network; remembers what it was given."""

    def __init__(self, fail_at: int | None = None):
        self.sizes, self.fail_at = [], fail_at

    def __call__(self, images: np.ndarray) -> np.ndarray:
        if len(self.sizes) == self.fail_at:
            raise RuntimeError("killed")
        self.sizes.append(len(images))
        return _blocks(images)


def _blocks(images: np.ndarray) -> np.ndarray:
    return images.reshape(-1, 8, 8, 8, 8, 3).mean((2, 4), dtype=np.float32) / 127.5 - 1


def _tokenize(captions: list[str]) -> np.ndarray:
    return np.array([[len(caption), caption.count("a")] for caption in captions], np.int64)


def _cache(folder, encode, source=None, fingerprint=None) -> LatentCache:
    source = Shapes("train", 10) if source is None else source
    fingerprint = {"vae": "one"} if fingerprint is None else fingerprint
    return cache_latents(source, lambda: encode, _tokenize, folder, fingerprint, batch_size=4, log=lambda line: None)


def test_cache_holds_every_record_and_fills_up_the_last_batch(tmp_path):
    encode, source = Encoder(), Shapes("train", 10)
    cache = _cache(tmp_path, encode, source)
    assert encode.sizes == [4, 4, 4]  # one shape, so one compilation, though 10 = 4 + 4 + 2
    assert len(cache) == 10
    for i in range(10):
        record = cache[i]
        assert record["moments"].dtype == np.float32 and record["token_ids"].dtype == np.int32
        np.testing.assert_allclose(record["moments"], _blocks(source[i]["image"][None])[0], atol=1e-3)  # of float16
        np.testing.assert_array_equal(record["token_ids"], _tokenize([source[i]["caption"]])[0])
        np.testing.assert_array_equal(record["time_ids"], np.float32([64, 64, 0, 0, 64, 64]))


def test_cache_is_reused(tmp_path):
    first = _cache(tmp_path, Encoder())
    again = Encoder()
    second = _cache(tmp_path, again, fingerprint={"vae": "one"})
    assert again.sizes == [] and second.folder == first.folder
    np.testing.assert_array_equal(second[9]["moments"], first[9]["moments"])


def test_another_fingerprint_has_a_folder_of_its_own(tmp_path):
    first, encode = _cache(tmp_path, Encoder()), Encoder()
    second = _cache(tmp_path, encode, fingerprint={"vae": "two"})
    assert encode.sizes and second.folder != first.folder
    assert len(list(tmp_path.iterdir())) == 2


def test_order_of_the_fingerprint_does_not_matter(tmp_path):
    _cache(tmp_path, Encoder(), fingerprint={"vae": "one", "data": "d"})
    again = Encoder()
    _cache(tmp_path, again, fingerprint={"data": "d", "vae": "one"})
    assert again.sizes == []


def test_a_cache_that_was_cut_off_is_not_taken_for_a_whole_one(tmp_path, monkeypatch):
    with monkeypatch.context() as killed:
        killed.setattr("lcm_jax.files.remove", lambda folder: None)  # a killed process deletes nothing
        with pytest.raises(RuntimeError, match="killed"):
            _cache(tmp_path, Encoder(fail_at=2))
    assert [".part-" in path.name for path in tmp_path.iterdir() if path.is_dir()] == [True]
    encode = Encoder()
    cache = _cache(tmp_path, encode)
    assert len(cache) == 10 and encode.sizes == [4, 4, 4]
    assert list(tmp_path.iterdir()) == [Path(cache.folder)], "what the killed process left is gone"


def test_cache_feeds_the_loader(tmp_path):
    cache = _cache(tmp_path, Encoder())
    batch = next(batches(cache, 4, seed=0))
    assert batch["moments"].shape == (4, 8, 8, 3) and batch["token_ids"].shape == (4, 2)
