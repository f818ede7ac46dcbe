"""Tensors that stay in their file until they are used: read one at a time, and written one at a time."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from lcm_jax.weights.errors import ModelError, overflowing

# safetensors' names of dtypes.
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
NAMES = {name: short for short, name in DTYPES.items()}
Advance = Callable[[int], None]  # receives the number of bytes done
# Keys of what float8 weights are multiplied by, as ComfyUI's and torchao's files have them.
SCALED = re.compile(r"(^|\.)(scaled_fp8|scale_weight|weight_scale|scale_input|input_scale)$")


class Tensors(Mapping[str, np.ndarray]):
    """Tensors by key: each `[key]` reads one, and nothing is kept.

    specs: by key an array of the tensor's shape and dtype whose numbers do not matter. read: key -> the tensor.
    """

    def __init__(self, specs: Mapping[str, np.ndarray], read: Callable[[str], np.ndarray]):
        self.specs, self._read = specs, read

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self.specs:
            raise KeyError(key)
        return self._read(key)

    def __contains__(self, key: object) -> bool:
        return key in self.specs

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


class NoTensors(Mapping[str, np.ndarray]):
    """The tensors of a model of which only the configs are known: every use raises ModelError."""

    def __init__(self, name: str):
        self._name = name

    def _refuse(self, *_: object):
        raise ModelError(f"{self._name} have no weights; use a model folder or file")

    __getitem__ = __contains__ = __iter__ = __len__ = _refuse


def placeholder(dtype: str | np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Return an array of this shape and dtype for a table of specs; it holds one number in memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def get_specs(tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Return arrays of the shapes and dtypes of `tensors`, by key; nothing is read."""
    return tensors.specs if isinstance(tensors, Tensors) else tensors


def total_bytes(tensors: Mapping[str, np.ndarray]) -> int:
    """Return the size of the tensors in bytes."""
    return sum(tensor.nbytes for tensor in get_specs(tensors).values())


def map_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Return (tensors, metadata) of a file, which must stay as it is. `[key]` maps one tensor until it is freed.

    Raises ModelError if the file is missing, truncated, not safetensors, or of a dtype that numpy cannot hold.
    """
    try:
        with safe_open(path, "np") as file:  # checks the header, and the size of the file against it
            metadata = file.metadata() or {}
        with open(path, "rb") as file:
            begin = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(begin - 8))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: the model is incomplete, copy it again") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} is truncated or not a safetensors file ({error}): copy it again") from None
    header.pop("__metadata__", None)
    if other := sorted({entry["dtype"] for entry in header.values()} - DTYPES.keys()):
        raise ModelError(
            f"{path} has tensors of {', '.join(other)}, which is not supported: save it in float16 or wider"
        )
    specs = {key: placeholder(DTYPES[entry["dtype"]], tuple(entry["shape"])) for key, entry in header.items()}

    def read(key: str) -> np.ndarray:
        like = specs[key]
        if not like.size:  # nothing can be mapped
            return np.empty(like.shape, like.dtype)
        offset = begin + header[key]["data_offsets"][0]
        return np.memmap(path, like.dtype, "r", offset, like.shape).view(np.ndarray)

    return Tensors(specs, read), metadata


def widen(tensors: Tensors, path: Path) -> Tensors:
    """Return `tensors`, of the file `path`, with those in float8 as float16, which is exact.

    Raises ModelError for float8 that is scaled by other tensors, and for types whose numbers float16 cannot hold.
    """
    float8 = {key: like for key, like in tensors.specs.items() if like.dtype.name.startswith("float8")}
    if not float8:
        return tensors
    if scaled := next((key for key in tensors if SCALED.search(key)), None):
        raise ModelError(
            f"{path} has float8 weights with scales beside them ({scaled}), which are not supported: use the file in "
            "float16 or bfloat16"
        )
    if other := next((key for key, like in float8.items() if like.dtype.name == "float8_e8m0fnu"), None):
        raise ModelError(f"{path}: {other} is float8_e8m0fnu, which is not supported: use the file in float16")
    specs = dict(tensors.specs) | {key: placeholder("float16", like.shape) for key, like in float8.items()}
    return Tensors(specs, lambda key: tensors[key].astype(specs[key].dtype, copy=False))


def write_safetensors(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
    advance: Advance = lambda _: None,
) -> None:
    """Write a file, one tensor after another. Raises ModelError for a dtype that safetensors do not have."""
    specs = get_specs(tensors)
    if other := sorted({like.dtype.name for like in specs.values()} - NAMES.keys()):
        raise ModelError(f"{path}: safetensors do not support {', '.join(other)}; use float32, bfloat16 or float16")
    header: dict = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    order = sorted(specs, key=lambda key: (-specs[key].dtype.itemsize, key))  # so that each is aligned
    for key in order:
        like = specs[key]
        header[key] = {
            "dtype": NAMES[like.dtype.name],
            "shape": list(like.shape),
            "data_offsets": [end, end + like.nbytes],
        }
        end += like.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            tensor = tensors[key]
            if (tensor.dtype, tensor.shape) != (specs[key].dtype, specs[key].shape):
                raise AssertionError(f"{key} is {tensor.dtype}{tensor.shape}, its specs another")
            file.write(raw_bytes(tensor))
            advance(tensor.nbytes)


def raw_bytes(tensor: np.ndarray) -> memoryview:
    """Return the bytes in C order, without a copy if they lie so."""
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data


def digest(tensors: Mapping[str, np.ndarray], advance: Advance = lambda _: None) -> str:
    """Return the sha256 of the keys, dtypes, shapes and bytes, in hexadecimal."""
    total = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key]
        total.update(f"{key} {tensor.dtype.name} {tensor.shape}".encode())
        total.update(raw_bytes(tensor))
        advance(tensor.nbytes)
    return total.hexdigest()


def cast(tensors: Mapping[str, np.ndarray], dtype: str) -> Tensors:
    """Return every tensor in `dtype` (float32, bfloat16, float16), cast when it is read.

    Reads each once, and raises ModelError that counts and names those with a finite number that overflows.
    """
    specs = get_specs(tensors)
    wanted = np.dtype(getattr(ml_dtypes, dtype, dtype))

    def read(key: str) -> np.ndarray:
        with np.errstate(over="ignore"):
            return tensors[key].astype(wanted, copy=False)

    finite = lambda tensor: np.isfinite(tensor.astype(np.float32, copy=False)).all()  # noqa: E731
    changed = [key for key in tensors if specs[key].dtype != wanted]
    if bad := [key for key in changed if not finite(read(key)) and finite(tensors[key])]:
        raise overflowing(bad, dtype, "use bfloat16 or float32")
    return Tensors({key: placeholder(wanted, like.shape) for key, like in specs.items()}, read)
