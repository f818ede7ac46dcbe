"""The latent cache: whole, resumed after a kill, by several processes, and whatever can be wrong with it."""

import json
import os
import pickle
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tiny_model
from shards import write_shards
from whole_runs import ROOT

from lcm_jax.data.captioned import UnreadableRecord
from lcm_jax.data.encoding import Plan, write_cache
from lcm_jax.data.latents import LatentCache, open_cache, read_object, shard_path
from lcm_jax.data.loader import batches
from lcm_jax.data.shapes import Shapes
from lcm_jax.data.tar_shards import TarSource
from lcm_jax.errors import RunError, phase

FIELDS = {"data": "ten shapes", "vae": "one", "format": "3"}


class Encoder:
    """Mean over 8x8 blocks in place of a network; remembers the sizes of its batches."""

    def __init__(self):
        self.sizes = []

    def __call__(self, images: np.ndarray, token_ids: np.ndarray) -> dict[str, np.ndarray]:
        self.sizes.append(len(images))
        assert len(images) == len(token_ids)
        return {"moments": blocks(images).astype(ml_dtypes.bfloat16)}


def blocks(images: np.ndarray) -> np.ndarray:
    count, height, width, _ = images.shape
    return images.reshape(count, height // 8, 8, width // 8, 8, 3).mean((2, 4), dtype=np.float32) / 127.5 - 1


def tokenize(captions) -> np.ndarray:
    return np.array([[len(caption), caption.count("a")] for caption in captions], np.int64)


def plan(encode, records=None, **fields) -> Plan:
    return Plan(Shapes("train", 10) if records is None else records, lambda: encode, tokenize, FIELDS | fields)


def write(folder: Path, encode, records=None, **more) -> LatentCache:
    write_cache(folder, plan(encode, records), **{"shard_size": 4, "log": lambda line: None} | more)
    return open_cache(folder, FIELDS)


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of a complete cache, whose files are these alone."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- whole ----------------------------------------------------------------------------------------------------------


def test_a_cache_has_every_record_in_shards(tmp_path):
    encode, records = Encoder(), Shapes("train", 10)
    cache = write(tmp_path / "cache", encode, records)
    assert encode.sizes == [64, 64, 64], "4 + 4 + 2 records, padded to one shape"
    assert len(cache) == 10 and cache.buckets is None
    for i in range(10):
        record = cache[i]
        assert {name: array.dtype.name for name, array in record.items()} == {
            "moments": "bfloat16",
            "token_ids": "int32",
            "time_ids": "float32",
        }
        expected = blocks(records[i]["image"][None])[0].astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(record["moments"], expected)
        np.testing.assert_array_equal(record["token_ids"], tokenize([records[i]["caption"]])[0])
        np.testing.assert_array_equal(record["time_ids"], np.float32([64, 64, 0, 0, 64, 64]))
        assert cache.read(i)["number"].tolist() == [i]
    with pytest.raises(IndexError):
        cache[10]
    names = [f"{i:05d}.array_record" for i in range(3)]
    assert sorted(contents(tmp_path / "cache")) == [*names, "manifest.json", "settings.json"]
    again, said = Encoder(), []
    write(tmp_path / "cache", again, log=said.append)
    assert again.sizes == [] and said[0].startswith("latent cache of 10 records, ")


def test_a_cache_feeds_the_loader_and_other_processes(tmp_path):
    cache = write(tmp_path, Encoder())
    copy = pickle.loads(pickle.dumps(cache))
    np.testing.assert_array_equal(copy[3]["moments"], cache[3]["moments"])
    batch = next(batches(cache, 4, seed=0))
    assert batch["moments"].shape == (4, 8, 8, 3) and batch["moments"].dtype == ml_dtypes.bfloat16
    assert batch.keys() == {"moments", "token_ids", "time_ids"} and batch["token_ids"].shape == (4, 2)


def test_encoded_prompts_take_the_place_of_tokens(tmp_path):
    def encode(images, token_ids):
        context = np.broadcast_to(token_ids[:, :, None], (*token_ids.shape, 3))
        return Encoder()(images, token_ids) | {"context": context.astype(ml_dtypes.bfloat16)}

    cache = write(tmp_path, encode)
    assert cache[2].keys() == {"moments", "context", "time_ids"}
    np.testing.assert_array_equal(cache[2]["context"][:, 0], cache.read(2)["token_ids"])


def test_images_of_several_shapes(tmp_path):
    shapes = [(16, 24), (24, 16), (16, 24), (16, 24), (24, 16)]
    records = [{"image": np.full((*shape, 3), i, np.uint8), "caption": "a"} for i, shape in enumerate(shapes)]
    cache = write(tmp_path, Encoder(), records)
    numbers = [int(cache.read(i)["number"][0]) for i in range(5)]
    assert sorted(numbers) == list(range(5))
    assert cache.buckets is not None and cache.buckets.dtype == np.uint8
    for i, number in enumerate(numbers):
        height, width = shapes[number]
        assert cache[i]["moments"].shape == (height // 8, width // 8, 3)
        assert cache.buckets[i] == (0 if height == 16 else 1)
        np.testing.assert_array_equal(cache[i]["time_ids"], np.float32([height, width, 0, 0, height, width]))


class Damaged(Shapes):
    def __getitem__(self, i):
        if i in (2, 7):
            raise UnreadableRecord(f"{i:05d}.jpg", "ImageError" if i == 2 else "no caption")
        return super().__getitem__(i)


def test_unreadable_records_are_left_out_and_counted(tmp_path):
    said = []
    cache = write(tmp_path, Encoder(), Damaged("train", 10), log=said.append)
    assert [int(cache.read(i)["number"][0]) for i in range(len(cache))] == [0, 1, 3, 4, 5, 6, 8, 9]
    assert read_object(tmp_path / "manifest.json")["unreadable"] == {
        "ImageError": {"count": 1, "examples": ["00002.jpg"]},
        "no caption": {"count": 1, "examples": ["00007.jpg"]},
    }
    assert "without 2 unreadable ones (1 ImageError, 1 no caption)" in said[-1]


def test_no_other_record_replaces_an_unreadable_one_of_tar_shards_in_buckets(tmp_path):
    shards = write_shards(tmp_path / "shards")
    source = TarSource(shards=shards, size=16, held_out=6, buckets=((16, 24), (24, 16)))
    records = source.open(0, tmp_path, lambda line: None).strict
    cache = write(tmp_path / "cache", Encoder(), records)
    assert len(cache) == 17 and len(records) == 18
    [(cause, left_out)] = read_object(tmp_path / "cache" / "manifest.json")["unreadable"].items()
    assert cause == "ImageError" and left_out["count"] == 1 and "01.tar, byte" in left_out["examples"][0]
    assert cache.shapes == [[2, 3]] and cache[0]["moments"].shape == (2, 3, 3), "all images are wide"


# ---- interrupted, and by several ------------------------------------------------------------------------------------


def test_a_cache_is_resumed_at_the_first_missing_shard_by_any_number_of_processes(tmp_path):
    """Three threads as processes, with a barrier, complete what one began: the bytes are those of one."""
    write(tmp_path / "whole", Encoder())

    def stops(images, token_ids):
        if len(encode.sizes) == 1:
            raise KeyboardInterrupt
        return encode(images, token_ids)

    encode, said = Encoder(), []
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "parts", stops)
    (tmp_path / "parts" / ".00001.array_record.1").write_bytes(b"of a process that was killed")
    assert shard_path(tmp_path / "parts", 0).exists() and not shard_path(tmp_path / "parts", 1).exists()
    with pytest.raises(ValueError, match="parts is not a complete latent cache; make it with python -m lcm_jax.cache"):
        open_cache(tmp_path / "parts", FIELDS)

    encoders, barrier = [Encoder() for _ in range(3)], threading.Barrier(3)
    threads = [
        threading.Thread(
            target=write_cache,
            args=(tmp_path / "parts", plan(encoders[number])),
            kwargs={
                "shard_size": 4,
                "process": number,
                "processes": 3,
                "wait": lambda name: barrier.wait(60),
                "log": said.append,
            },
        )
        for number in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [each.sizes for each in encoders] == [[], [64], [64]]
    assert said[0].endswith("parts: 1 shards are complete")
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_another_run_that_makes_the_same_cache_waits_for_the_first(tmp_path):
    began, free, said = threading.Event(), threading.Event(), []

    def slowly(images, token_ids):
        began.set()
        assert free.wait(60)
        return Encoder()(images, token_ids)

    first = threading.Thread(target=write, args=(tmp_path, slowly))
    first.start()
    assert began.wait(60)
    second = threading.Thread(target=write, args=(tmp_path, None), kwargs={"log": said.append})
    second.start()
    while not said:
        time.sleep(0.01)
    free.set()
    first.join(), second.join()
    assert said[0].startswith(f"waiting for process {os.getpid()} on") and len(open_cache(tmp_path, FIELDS)) == 10


def test_a_full_disk_leaves_the_shards_that_are_complete(tmp_path):
    limits, encode = resource.getrlimit(resource.RLIMIT_FSIZE), Encoder()

    def fills(images, token_ids):
        if len(encode.sizes) == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        return encode(images, token_ids)

    try:
        with pytest.raises(RunError, match="^the disk is full .* while encoding images; free some space; shards stay$"):
            with phase("encoding images", memory="", kept="shards stay"):
                write(tmp_path / "cache", fills)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "cache").glob("*.array_record")] == ["00000.array_record"]
    again = Encoder()
    write(tmp_path / "cache", again)
    assert again.sizes == [64, 64]
    write(tmp_path / "whole", Encoder())
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


# ---- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIELDS)
def test_a_cache_of_other_fields_is_refused_with_both_values(name, tmp_path):
    write(tmp_path / "whole", Encoder())
    shutil.copytree(tmp_path / "whole", tmp_path / "begun")
    (tmp_path / "begun" / "manifest.json").unlink()
    other = plan(None, **{name: "another"})
    message = rf"was made with other settings: {name} \('{FIELDS[name]}' there, 'another' here\); restore them, or use"
    with pytest.raises(ValueError, match=message):
        open_cache(tmp_path / "whole", other.fields)
    for folder in ("whole", "begun"):
        with pytest.raises(ValueError, match=f"{folder} {message}"):
            write_cache(tmp_path / folder, other, shard_size=4, log=lambda line: None)
    more = plan(None, text_encoder="new")
    with pytest.raises(ValueError, match=r"text_encoder \(None there, 'new' here\)"):
        open_cache(tmp_path / "whole", more.fields)
    with pytest.raises(ValueError, match=r"shard_size \(4 there, 5 here\)"):
        write(tmp_path / "begun", None, shard_size=5)


def test_a_value_that_is_not_finite_names_the_image_and_the_remedy(tmp_path):
    def overflows(images, token_ids):
        moments = blocks(images).astype(ml_dtypes.bfloat16)
        moments[1, 0, 0, 0] = np.nan
        return {"moments": moments}

    records = Shapes("train", 10)
    half = Plan(records, lambda: overflows, tokenize, FIELDS, "float16")
    with pytest.raises(ValueError) as error:
        write_cache(tmp_path, half, log=lambda line: None)
    assert str(error.value) == (
        f"record 1 ({records[1]['caption']!r}): 1 of 192 moments are not finite, computed in float16; SDXL's "
        "autoencoder overflows in half precision: set --config.train.dtype=bfloat16 or float32, or use a model with "
        "the autoencoder that was fixed for it"
    )
    assert not list(tmp_path.glob("*.array_record")) and not list(tmp_path.glob(".*"))
    with pytest.raises(ValueError, match="computed in float32; check the weights of the model, and the image"):
        write(tmp_path / "other", overflows)


def test_a_damaged_file_is_named_with_the_remedy(tmp_path):
    write(tmp_path, Encoder())
    whole, shard = contents(tmp_path), shard_path(tmp_path, 1)
    data = bytearray(whole[shard.name])
    data[200] ^= 1  # within the first record, which padding follows
    bit_flips = [bytes(data), whole[shard.name][: len(data) // 2], None]
    for damaged in bit_flips:
        shard.unlink()
        if damaged is not None:
            shard.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"00001.array_record is missing or damaged \(.*\); delete it and manifest"
        ):
            cache = open_cache(tmp_path, FIELDS)
            for i in range(len(cache)):
                cache[i]
    shard.unlink(missing_ok=True)
    (tmp_path / "manifest.json").unlink()
    write(tmp_path, Encoder())
    assert contents(tmp_path) == whole
    for content in (b"{", b"\xff", b"[]", b"{}"):
        (tmp_path / "manifest.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"manifest.json is damaged \(.*\); delete it, and make the cache again$"):
            open_cache(tmp_path, FIELDS)


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="has other files than a latent cache .thesis.tex.; use another folder, or em"):
        write(tmp_path, Encoder())


# ---- the command ----------------------------------------------------------------------------------------------------


def command(teacher: Path, folder: Path, *more: str) -> subprocess.Popen:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(ROOT),
    }
    settings = [f"--config.teacher={teacher}", "--config.data.length=80", "--shard_size=4", f"--output={folder}"]
    return subprocess.Popen(
        [sys.executable, "-m", "lcm_jax.cache", "--config=shapes", *settings, *more],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_the_command_is_killed_and_resumed_by_two_processes(tmp_path):
    """The bytes are those of an undisturbed run of one process."""
    teacher = tiny_model.write(tmp_path / "teacher", unet=tiny_model.SHALLOW)
    killed = command(teacher, tmp_path / "parts")
    deadline = time.monotonic() + 120
    while not shard_path(tmp_path / "parts", 2).exists():
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    done = len(list((tmp_path / "parts").glob("*.array_record")))
    assert 3 <= done < 20 and not (tmp_path / "parts" / "manifest.json").exists()

    whole = command(teacher, tmp_path / "whole")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    join = (f"--coordinator=127.0.0.1:{port}", "--num_processes=2")
    both = [command(teacher, tmp_path / "parts", *join, f"--process_id={number}") for number in (0, 1)]
    outputs = [each.communicate(timeout=240)[0] for each in (whole, *both)]
    assert [each.returncode for each in (whole, *both)] == [0, 0, 0], "\n".join(outputs)
    assert "80/80 images" in outputs[0] and "latent cache of 80 records" in outputs[0]
    assert f"parts: {done} shards are complete" in outputs[1] and "latent cache of 80 records" in outputs[1]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    settings = json.loads((tmp_path / "whole" / "settings.json").read_text())
    fields = settings["fields"].keys()
    assert {name for name in fields if not name.startswith("data.")} == {
        *("vae", "text_encoder", "tokenizer", "dtype", "format")
    }
    assert {"data.source", "data.length", "data.size"} <= fields


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--help"], "python -m lcm_jax.cache --config=lcd:sd15 --output="),
        (["--config=shapes"], "error: --output is missing; use the folder of the cache"),
        (["--output=x"], "error: --config is missing; use a file, or a name from"),
    ],
)
def test_help_and_mistakes(arguments, message, monkeypatch, capsys):
    from lcm_jax import cache

    monkeypatch.setattr("sys.argv", ["cache", *arguments])
    try:
        cache.run()
        printed = capsys.readouterr().out
    except SystemExit as error:
        printed = str(error)
    finally:
        cache.FLAGS.unparse_flags()
    assert message in printed
