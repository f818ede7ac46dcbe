"""The latent cache: moments and encoded prompts in shards on disk, so that training steps need no encoder.

A cache is a folder. `settings.json`, written first, names what its values depend on. Each shard, an ArrayRecord file,
has the records of one range of the data and appears when it is complete; `manifest.json`, written last, counts them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordReader

Tokenize = Callable[[Sequence[str]], np.ndarray]  # captions -> int32[B, L], for SDXL int32[B, 2, L]

FORMAT = "3"  # change it with the layout of the files, so that older caches are refused
READER = "readahead_buffer_size:0,max_parallelism:0"  # for random access
OPEN_SHARDS = 256  # opening one takes a millisecond, and many systems allow 1,024 open files
DTYPES = {"BF16": ml_dtypes.bfloat16, "F32": np.float32, "I32": np.int32, "I64": np.int64}  # by safetensors' names


class LatentCache:
    """Random access to the records of a complete cache.

    Each is {"moments": bfloat16[h, w, 2c], "time_ids": float32[6]} with "context": bfloat16[L, D] (and for SDXL
    "pooled": bfloat16[P]) if prompts were encoded, else with "token_ids": int32[L] (SDXL: [2, L]). shapes: (h, w)
    of each bucket. buckets: uint8[N], the bucket of each record, or None if there is one. Raises ValueError for a
    damaged file.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        manifest = read_object(self.folder / "manifest.json")
        self._counts, self.shapes = manifest["shards"], manifest["shapes"]
        self._ends = np.cumsum(self._counts)
        self._open = lru_cache(OPEN_SHARDS)(self._open_shard)  # a reader closes when its last user drops it
        path = self.folder / "buckets.npy"
        self.buckets: np.ndarray | None = np.load(path) if path.exists() else None

    def __reduce__(self):  # it travels to worker processes as a path
        return LatentCache, (self.folder,)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        record = self.read(i)
        unused = ("number", "token_ids") if "context" in record else ("number",)
        return {name: array for name, array in record.items() if name not in unused}

    def read(self, i: int) -> dict[str, np.ndarray]:
        """Return all of record i, with "number": int64[1], its number in the data that the cache was made of."""
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        shard = int(np.searchsorted(self._ends, i, side="right"))
        place = int(i - (self._ends[shard] - self._counts[shard]))
        try:
            return unpack(self._open(shard).read([place])[0])
        except RuntimeError as error:  # the checksum of its block differs
            raise self._damaged(shard, str(error)) from error

    def _open_shard(self, shard: int) -> ArrayRecordReader:
        reader, expected = ArrayRecordReader(str(shard_path(self.folder, shard)), READER), self._counts[shard] + 1
        if reader.num_records() != expected:  # 0 if it is missing or cut off, without an error
            raise self._damaged(shard, f"{reader.num_records()} of {expected} records can be read")
        return reader

    def _damaged(self, shard: int, reason: str) -> ValueError:
        return ValueError(
            f"{shard_path(self.folder, shard)} is missing or damaged ({' '.join(reason.split())[:200]}); delete it and "
            "manifest.json, and make the cache again: the other shards are kept"
        )


def open_cache(folder: Path, fields: Mapping[str, str]) -> LatentCache:
    """Open the complete cache in `folder`. fields: of `encoding.Plan`.

    Raises ValueError if there is none, or with the fields in which it differs and both values of each.
    """
    if not is_complete(folder):
        raise ValueError(f"{folder} is not a complete latent cache; make it with python -m lcm_jax.cache")
    check_fields(folder, read_object(folder / "manifest.json")["fields"], fields)
    return LatentCache(folder)


def is_complete(folder: Path) -> bool:
    """Return True if the folder has a cache with all of its shards."""
    return (folder / "manifest.json").exists()


def check_fields(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise ValueError that has each field in which a cache differs from the one that is needed, with both values."""
    names = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
    if names:
        values = ", ".join(f"{name} ({there.get(name)!r} there, {here.get(name)!r} here)" for name in names)
        raise ValueError(
            f"latent cache {folder} was made with other settings: {values}; restore them, or use another folder"
        )


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object of settings.json or manifest.json. Raises ValueError that names a damaged file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict) or not isinstance(value.get("fields"), dict):
            raise ValueError("it has no fields")
        return value
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path} is damaged ({error}); delete it, and make the cache again") from None


def shard_path(folder: Path, shard: int) -> Path:
    """Return the file of a shard."""
    return folder / f"{shard:05d}.array_record"


def pack(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return a record's bytes, those of a safetensors file."""
    return safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()})


def unpack(data: bytes) -> dict[str, np.ndarray]:
    """Return the arrays of a record: safetensors' reader for NumPy does not support bfloat16."""
    return {
        name: np.frombuffer(each["data"], DTYPES[each["dtype"]]).reshape(each["shape"])
        for name, each in safetensors.deserialize(data)
    }
