"""The table of data sources: each works with each config by flags alone, and a mistake is one line."""

from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from folders import write_folder
from record_files import make_rows, write_array_record, write_parquet, write_tfds
from shards import write_shards
from whole_runs import load_config

from lcm_jax.data import shapes
from lcm_jax.data.batches import image_batches, make_batches
from lcm_jax.data.encoding import Plan, write_cache
from lcm_jax.data.latents import open_cache
from lcm_jax.data.sources import SOURCES, check_data, load_dataset
from lcm_jax.recipes import make_task
from lcm_jax.recipes.distillation import largest_size

SMALL = {
    "data.size": 16,
    "data.length": 24,
    "data.held_out": 6,
    "train.batch_size": 4,
    "sample.prompts": 6,
    "sample.scored_prompts": 6,
    "report.prompts": 6,
    "report.reference": 6,
}
LIBRARIES = {"parquet": "pyarrow", "tfds": "tensorflow_datasets"}  # optional
TAR = {"data.source": "tar", "metrics": ("frechet",)}  # nothing judges what an image of other captions has


@pytest.fixture(scope="module")
def pattern(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data")
    write_folder(folder / "folder")
    write_array_record(folder / "shards" / "0.array_record", make_rows())
    for name, write in {"parquet": write_parquet, "tfds": write_tfds}.items():
        if find_spec(LIBRARIES[name]):
            write(folder / name / "0.parquet" if name == "parquet" else folder / name, make_rows())
    return write_shards(folder / "tar")


def small(config: str, pattern: str, **more):
    config = load_config(config)
    folder = Path(pattern).parent.parent
    shards = {"parquet": str(folder / "parquet" / "*"), "array_record": str(folder / "shards" / "*")}
    keys = {
        "data.shards": shards.get(more.get("data.source", ""), pattern),
        "data.folder": str(folder / "folder"),
        "data.tfds": "my_set",
        "data.tfds_dir": str(folder / "tfds"),
    }
    config.update_from_flattened_dict(SMALL | keys | more)
    return config


def encode(images: np.ndarray, token_ids: np.ndarray) -> dict[str, np.ndarray]:
    return {"moments": images.reshape(-1, 2, 8, 2, 8, 3).mean((2, 4), dtype=np.float32)}


def tokenize(captions: list[str]) -> np.ndarray:
    return np.array([[len(caption), caption.count("e")] for caption in captions])


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("config", ["shapes", "lcd"])
def test_every_source_and_encoding_works_with_every_config(config, name, pattern, tmp_path):
    pytest.importorskip(LIBRARIES.get(name, "grain"))
    config = small(config, pattern, **{"data.source": name})
    dataset = load_dataset(config, tmp_path, log=lambda line: None)
    assert len(dataset.train) == (24 if name == "shapes" else 18) and len(dataset.held_out) == 6
    assert dataset.train[5]["image"].shape == dataset.held_out[5]["image"].shape == (16, 16, 3)
    assert dataset.prompts(6) == dataset.prompts(6) and len(dataset.prompts(5)) == 5
    assert len(dataset.compositional_prompts(3)) == (3 if name == "shapes" else 0)
    again = load_dataset(config, tmp_path, log=lambda line: None)
    assert again.fingerprint == dataset.fingerprint
    config.data.size = 24
    other = load_dataset(config, tmp_path, log=lambda line: None)
    assert {field for field, value in other.manifest.items() if value != dataset.manifest[field]} == {"size"}
    config.data.size = 16

    def read(encoding: str, first: int, count: int, **more) -> list[dict[str, np.ndarray]]:
        config.data.encode = encoding
        if encoding == "step":
            return list(islice(image_batches(config, dataset, tokenize, first, **more), count))
        plan = Plan(dataset.train, lambda: encode, tokenize, {"data": dataset.fingerprint})
        write_cache(tmp_path / "latents", plan, log=lambda line: None)
        return list(islice(make_batches(config, open_cache(tmp_path / "latents", plan.fields), first), count))

    images, moments, masked = read("step", 0, 8), read("cache", 0, 8), read("step", 0, 8, masks=True)
    for step, cached, painted in zip(images, moments, masked, strict=True):
        np.testing.assert_array_equal(cached["moments"], encode(step["image"], step["token_ids"])["moments"])
        for name in ("token_ids", "time_ids"):
            np.testing.assert_array_equal(step[name], cached[name])
        assert painted.keys() - step.keys() == {"mask"} and step["time_ids"].shape == (4, 6)
        np.testing.assert_array_equal(step["image"], painted["image"])
        assert painted["mask"].shape == (4, 16, 16, 1) and painted["mask"].dtype == np.uint8
    for first in (3, 7):  # within an epoch and in another, which has masks of its own
        for expected, resumed in zip(masked[first:], read("step", first, 8 - first, masks=True), strict=True):
            for name, value in expected.items():
                np.testing.assert_array_equal(resumed[name], value, err_msg=name)
    assert len({mask.tobytes() for batch in masked for mask in batch["mask"]}) > 16


def test_images_alone_for_an_autoencoder(pattern, tmp_path):
    config = small("shapes", pattern, **{"data.encode": "step"})
    batch = next(image_batches(config, load_dataset(config, tmp_path), None, 0))
    assert batch.keys() == {"image"} and batch["image"].shape == (4, 16, 16, 3)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"data.source": "files"}, "^data.source 'files' is not supported; use shapes or tar or folder or parq"),
        ({"data.source": "tar"}, "^metrics 'verifier' is not supported for data.source .* from --config.metrics$"),
        (
            {"data.source": "tar", "data.shards": "", "metrics": ("frechet",)},
            "^data.shards is empty; set --config.data.shards to the shards, ",
        ),
        (
            {"data.source": "tar", "data.shards": "none/*.tar", "metrics": ("frechet",)},
            "^data.shards 'none/.*' matches no file; set --config.d",
        ),
        ({"train.batch_size": 25}, "^the data has 24 records, fewer than train.batch_size 25; lower it$"),
        ({"sample.scored_prompts": 7}, "^sample.scored_prompts 7 is more than data.held_out 6; raise that, or lower s"),
        ({"sample.prompts": 7}, "^sample.prompts 7 is more than data.held_out 6; raise that, or lower sample.prompts"),
        ({"report.reference": 7}, "^report.reference 7 is more than data.held_out 6; raise that, or lower report.ref"),
        ({"data.workers": -1}, "^data.workers -1 is not supported; use a whole number of at least 0 and at most 256$"),
        (
            {"data.max_skipped": 2.0},
            "^data.max_skipped 2.0 is not supported; use a number of at least 0 and at most 1$",
        ),
        ({"data.filters": ("x>1",)}, "^data.filters is not supported for data.source=shapes; remove it$"),
        ({"data.buckets": ((16, 24),)}, "^data.buckets is not supported for data.source=shapes; remove it$"),
        (TAR | {"data.filters": ("x=1",)}, "^data.filters 'x=1' is not supported; use a field, one of"),
        (
            TAR | {"data.buckets": ((16, 4),)},
            r"^data.buckets \(\(16, 4\),\) is not supported; use whole numbers of at le",
        ),
        (TAR | {"data.buckets": ((16,),)}, r"^data.buckets \(\(16,\),\) is not supported; use .height, width. pairs"),
        (TAR | {"data.caption_field": ""}, "^data.caption_field '' is not supported; use a name such as caption"),
        ({"data.encode": "once"}, "^data.encode 'once' is not supported; use cache or step$"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_read(mistake, message, pattern, tmp_path):
    config = small("shapes", pattern, teacher="a teacher that is never read", **mistake)
    with pytest.raises(ValueError, match=message) as caught:
        make_task(config, tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_key_that_a_source_requires_is_named():
    config = load_config("shapes_vae")
    assert check_data(config).length == 200_000
    config.data.source = "tar"
    del config.data.shards
    with pytest.raises(ValueError, match="^the config has no data.shards, which data.source=tar requires; add it"):
        check_data(config)


def test_sizes_are_multiples_of_the_autoencoder(pattern):
    config = small("lcd", pattern, **{"data.buckets": ((16, 24), (24, 32), (32, 16))})
    assert largest_size(config.data, 8) == (24, 32)
    for name, value, message in [
        (
            "buckets",
            ((16, 24), (20, 16)),
            r"^data.buckets \(20, 16\) is not supported; use a multiple of 8, for the aut",
        ),
        ("size", 20, "^data.size 20 is not supported; use a multiple of 8, for the autoencoder$"),
    ]:
        config.data[name] = value
        with pytest.raises(ValueError, match=message):
            largest_size(config.data, 8)
        config.data.buckets = ()


def test_data_that_is_held_out_must_leave_some_to_train_on(pattern, tmp_path):
    config = small("lcd", pattern, **{"data.held_out": 24})
    with pytest.raises(ValueError, match="^data.held_out 24 leaves none of the 24 records of data.shards to train on"):
        load_dataset(config, tmp_path, log=lambda line: None)
    config.data.held_out = 21
    with pytest.raises(ValueError, match="^the data has 3 records, fewer than train.batch_size 4"):
        image_batches(config, load_dataset(config, tmp_path, log=lambda line: None), tokenize, 0)


@pytest.mark.parametrize("split", ["val", "test", "composition"])
def test_prompts_are_spread_evenly_over_the_tasks(split):
    tasks = [task for task in shapes.TASKS if shapes.captions(split, task)]
    prompts = shapes.evaluation_prompts(split, 4 * len(tasks) + 1)
    assert [shapes.parse(prompt).task for prompt in prompts] == [tasks[0], *(t for t in tasks for _ in range(4))]
    assert set(prompts) <= set(shapes.captions(split)) and len(set(prompts)) > 3 * len(tasks)
