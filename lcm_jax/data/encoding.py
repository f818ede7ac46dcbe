"""Making a latent cache: shard by shard, by one process or several, resumable after a kill."""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from lcm_jax import files, locks
from lcm_jax.data.captioned import Records, UnreadableRecord, time_ids
from lcm_jax.data.latents import READER, Tokenize, check_fields, is_complete, pack, read_object, shard_path
from lcm_jax.progress import progress

# images uint8[B, H, W, 3], token_ids -> bfloat16 arrays: "moments" [B, h, w, 2c], and of frozen text encoders "context"
# [B, L, D], and of SDXL's "pooled" [B, P]. They may still be on their way from a device.
Encoder = Callable[[np.ndarray, np.ndarray], Mapping[str, Any]]

SHARD_SIZE = 4096  # records: about 0.6 GB of Stable Diffusion 1.5
BATCH_PIXELS, MAX_BATCH = 2**22, 64  # of images encoded at once on a device: 16 of 512 x 512
WRITER = "group_size:1,zstd:1"  # one record can be read without others
MAX_NAMED = 100  # unreadable records of each cause that the manifest names; all are counted
OWN_FILES = ("lock", "index")  # in a folder without a cache: of this file, and of the source of the data


@dataclass(frozen=True)
class Plan:
    """The contents of a cache.

    records: random access to {"image": uint8[H, W, 3], "caption": str}, with "time_ids" if images were cropped; raises
    UnreadableRecord for one that is left out. make_encoder: returns an `Encoder`; called only if there is something to
    encode. fields: what the values depend on, by name. computed_in: the dtype of the encoder's computation, by which
    values differ in their rounding alone: an unfinished cache is completed in the same, and used by runs of any.
    devices: that encode a batch together. name(i): of record i, in messages.
    """

    records: Records
    make_encoder: Callable[[], Encoder]
    tokenize: Tokenize
    fields: Mapping[str, str]
    computed_in: str = "float32"
    devices: int = 1
    name: Callable[[int], str] = "record {}".format


def write_cache(
    folder: Path,
    plan: Plan,
    *,
    shard_size: int = SHARD_SIZE,
    process: int = 0,
    processes: int = 1,
    wait: Callable[[str], None] = lambda name: None,
    log: Callable[[str], None] = print,
) -> None:
    """Complete the cache in `folder`: write the shards that are missing, then the manifest.

    Process i of n writes shards i, i + n, ...; each of them calls this. wait(name): returns when all have called it.
    The bytes depend on the plan and on shard_size alone. If another run makes the same cache, wait for it.
    Raises ValueError if the folder has another cache or other files, or a value is not finite; what is complete stays.
    """
    settings = {"computed_in": plan.computed_in, "shard_size": shard_size, "records": len(plan.records)}
    with ExitStack() as held:
        if process == 0 and not is_complete(folder):
            folder.mkdir(parents=True, exist_ok=True)
            waiting = lambda holder: log(f"waiting for {holder}, which makes the same latent cache {folder}")  # noqa: E731
            held.enter_context(locks.lock(folder / "lock", waiting))
        wait("cache locked")
        if is_complete(folder):
            manifest = read_object(folder / "manifest.json")
            check_fields(folder, manifest["fields"], plan.fields)
            log(f"{summary(manifest)} in {folder}")
            return
        if process == 0:
            _begin(folder, {**settings, "fields": dict(plan.fields)}, log)
        wait("cache begun")
        there = read_object(folder / "settings.json")
        check_fields(folder, {**there, **there["fields"], "fields": None}, {**settings, **plan.fields, "fields": None})

        began, shards = time.monotonic(), -(-len(plan.records) // shard_size)
        parts = {
            shard_path(folder, shard): range(len(plan.records))[shard * shard_size : (shard + 1) * shard_size]
            for shard in range(process, shards, processes)
        }
        missing = {path: numbers for path, numbers in parts.items() if not path.exists()}
        total = sum(map(len, missing.values()))
        with progress(total) if process == 0 else nullcontext(lambda done: None) as update:
            encode, done = None, 0
            for path, numbers in missing.items():
                encode = encode or plan.make_encoder()
                _write_shard(path, plan, encode, numbers, lambda count, done=done: update(done + count))
                done += len(numbers)
        wait("cache encoded")
        if process == 0:
            manifest = there | _collect(folder, shards)
            files.write_text(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")
            log(f"{summary(manifest)} in {folder}; {time.monotonic() - began:.0f} s")
            (folder / "lock").unlink(missing_ok=True)
        wait("cache complete")


def summary(manifest: Mapping[str, Any]) -> str:
    """Return the size of a cache as a phrase. manifest: of a complete one."""
    count, causes = sum(manifest["shards"]), manifest["unreadable"]
    size = f"latent cache of {count} records, {manifest['bytes'] / max(count, 1) / 1e3:.1f} kB each"
    if not causes:
        return size
    listed = ", ".join(f"{each['count']} {cause}" for cause, each in causes.items())
    return f"{size}, without {sum(each['count'] for each in causes.values())} unreadable ones ({listed})"


def _begin(folder: Path, settings: Mapping[str, Any], log: Callable[[str], None]) -> None:
    if (folder / "settings.json").exists():
        log(f"resuming latent cache {folder}: {len(list(folder.glob('*.array_record')))} shards are complete")
        for unfinished in folder.glob(".*.array_record.*"):  # of processes that were killed
            unfinished.unlink()
        return
    if others := sorted(path.name for path in folder.iterdir() if path.name not in OWN_FILES and path.name[0] != "."):
        raise ValueError(f"{folder} has other files than a latent cache ({others[0]}); use another folder, or empty it")
    files.write_text(folder / "settings.json", json.dumps(settings, indent=1) + "\n")


# ---- a shard --------------------------------------------------------------------------------------------------------


class _Attempts:
    """Random access to (number, record, or the error of an unreadable one)."""

    def __init__(self, records: Records, numbers: range):
        self.records, self.numbers = records, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> tuple[int, Mapping[str, Any] | UnreadableRecord]:
        number = self.numbers[i]
        try:
            return number, self.records[number]
        except UnreadableRecord as error:
            return number, error


def _write_shard(path: Path, plan: Plan, encode: Encoder, numbers: range, update: Callable[[int], None]) -> None:
    """Write the records of `numbers` to a shard, and as its last record {"unreadable", "shapes", "buckets"} in JSON.

    update: is called with the number of records that are done.
    """
    unreadable: list[tuple[str, str]] = []
    shapes: list[tuple[int, ...]] = []
    with files.whole_file(path) as temporary, closing(ArrayRecordWriter(str(temporary), WRITER)) as writer:
        pending = None
        # The device encodes a batch while the one before is written, and threads read the next.
        for group in chain(_groups(plan, numbers, unreadable), [None]):
            started = None if group is None else (group, *_start(group, plan, encode))
            if pending is not None:
                for row in _rows(*pending, plan):
                    writer.write(pack(row))
                    shapes.append(row["moments"].shape[:2])
                update(len(shapes) + len(unreadable))
            pending = started
        distinct = sorted(set(shapes))
        buckets = [distinct.index(shape) for shape in shapes]
        last = {"unreadable": unreadable, "shapes": distinct, "buckets": buckets}
        writer.write(json.dumps(last).encode())


def _groups(plan: Plan, numbers: range, unreadable: list) -> Iterator[list[tuple[int, Mapping[str, Any]]]]:
    """Yield (number, record) in batches of one shape; add the names and causes of others to `unreadable`."""
    threads = min(8, os.cpu_count() or 2)
    source = grain.MapDataset.source(_Attempts(plan.records, numbers))  # pyright: ignore[reportArgumentType]
    waiting: dict[tuple[int, ...], list] = {}
    for number, record in source.to_iter_dataset(grain.ReadOptions(threads, prefetch_buffer_size=8 * threads)):
        if isinstance(record, UnreadableRecord):
            unreadable.append(record.args)
            continue
        shape = record["image"].shape
        group = waiting.setdefault(shape, [])
        group.append((number, record))
        if len(group) == _batch_size(shape, plan):
            yield waiting.pop(shape)
    yield from waiting.values()


def _batch_size(shape: tuple[int, ...], plan: Plan) -> int:
    return plan.devices * min(max(BATCH_PIXELS // (shape[0] * shape[1]), 1), MAX_BATCH)


def _start(group: Sequence, plan: Plan, encode: Encoder) -> tuple[np.ndarray, Mapping[str, Any]]:
    """Return the token ids of a batch, and its arrays on their way; padded, so that `encode` compiles once a shape."""
    images = [record["image"] for _, record in group]
    padded = np.minimum(np.arange(_batch_size(images[0].shape, plan)), len(group) - 1)
    token_ids = np.asarray(plan.tokenize([record["caption"] for _, record in group]), np.int32)
    return token_ids, encode(np.stack([images[i] for i in padded]), token_ids[padded])


def _rows(
    group: Sequence, token_ids: np.ndarray, encoded: Mapping[str, Any], plan: Plan
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the arrays of each record. Raises ValueError that names a record with a value that is not finite."""
    arrays = {name: np.asarray(array)[: len(group)] for name, array in encoded.items()}
    for i, (number, record) in enumerate(group):
        row = {name: array[i] for name, array in arrays.items()}
        for name, values in row.items():
            if not np.isfinite(values).all():
                bad = values.size - np.isfinite(values).sum()
                raise ValueError(
                    f"{plan.name(number)} ({record['caption'][:100]!r}): {bad} of {values.size} {name} are not finite, "
                    f"computed in {plan.computed_in}; {remedy(plan.computed_in)}"
                )
        sizes = np.asarray(time_ids(record), np.float32)
        yield row | {"token_ids": token_ids[i], "time_ids": sizes, "number": np.array([number])}


def remedy(dtype: str) -> str:
    """Return the remedy for values that are not finite, by the dtype of the computation."""
    if dtype == "float16":
        return (
            "SDXL's autoencoder overflows in half precision: set --config.train.dtype=bfloat16 or float32, or use a "
            "model with the autoencoder that was fixed for it"
        )
    return "check the weights of the model, and the image"


def _collect(folder: Path, shards: int) -> dict[str, Any]:
    """Return the part of the manifest that the last records of shards add up to; write buckets.npy if shapes differ."""
    counts, causes, places = [], Counter(), []
    names: dict[str, list[str]] = {}
    for shard in range(shards):
        reader = ArrayRecordReader(str(shard_path(folder, shard)), READER)
        counts.append(reader.num_records() - 1)
        last = json.loads(reader.read([counts[-1]])[0])
        for name, cause in last["unreadable"]:
            causes[cause] += 1
            names.setdefault(cause, []).append(name)
        places.append([tuple(last["shapes"][bucket]) for bucket in last["buckets"]])
    shapes = sorted({shape for each in places for shape in each})
    if len(shapes) > 1:
        with files.whole_file(folder / "buckets.npy") as temporary, temporary.open("wb") as file:
            np.save(file, np.array([shapes.index(shape) for each in places for shape in each], np.uint8))
    return {
        "shards": counts,
        "shapes": shapes,
        "bytes": sum(shard_path(folder, shard).stat().st_size for shard in range(shards)),
        "unreadable": {
            cause: {"count": count, "examples": names[cause][:MAX_NAMED]} for cause, count in causes.most_common()
        },
    }
