"""Files of torch.save (.ckpt, .bin, .pt, .pth) read without torch, and without running anything that is in them.

A pickle is a program: it names functions, and the reader calls them. This reader accepts the few names that a state
dict is made of and puts plain data in the place of each; any other name ends the reading. The values are not in the
pickle but beside it, uncompressed, so that a tensor is a read-only view of the mapped file, and takes memory only when
used.
"""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 (gives numpy the names bfloat16 and float8_*)
import numpy as np

from lcm_jax.weights.errors import ModelError

MAGIC = 0x1950A86A20F9469CFC6C  # the first of the pickles in a row that torch wrote before version 1.6
VERSION = 1001
STARTS = (b"PK", b"\x80")  # of a file by torch.save, since 1.6 and before
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
# What has no storage class of its own is a dtype over bytes.
DTYPES = (
    "uint16",
    "uint32",
    "uint64",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
)
KNOWN = {*STORAGES.values(), *DTYPES}
# Classes that Lightning before 1.5 wrote as keys of what its callbacks remember, which is left out anyway.
CALLBACKS = {
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.callbacks.lr_monitor.LearningRateMonitor",
}
# A numpy scalar, as SD 1.4's checkpoint has beside its state dict (a best score, a learning rate), is made of these.
SCALARS = {"numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype", "_codecs.encode"}
BYTES = "bytes"  # the dtype of a storage whose tensors have one


class LeftOut:
    """Stands for what a pickle makes of `SCALARS`: nothing is made, whatever it is given."""

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        pass


class Storage(NamedTuple):
    """The values that one or more tensors are views of, by their name in the file."""

    key: str
    dtype: str  # of KNOWN, or BYTES
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * (1 if self.dtype == BYTES else np.dtype(self.dtype).itemsize)


class Tensor(NamedTuple):
    """A view of a storage, in elements. Nothing has been checked, or read."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_pickle(path: str | Path) -> dict[str, np.ndarray]:
    """Return the tensors of a state dict by name, as stored: read-only views of the file, which must stay as it is.

    If a checkpoint has its state dict under `state_dict`, that one is read; other content (epoch, callbacks) is left
    out. bfloat16 and the float8 types are those of ml_dtypes.
    Raises ModelError for a file that is missing, truncated or not a torch.save file, for tensors that lie outside of
    their storages, and for a name that no state dict contains: no code has been executed then.
    """
    path = Path(path)
    try:
        mapped = np.memmap(path, np.uint8, "r").view(np.ndarray)
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: the model is incomplete, copy it again") from None
    except (OSError, ValueError) as error:  # numpy maps no empty file
        raise ModelError(f"{path} cannot be read ({error}): copy it again") from None
    start = bytes(mapped[:4])
    if start.startswith(STARTS[0]):
        content, storages = read_zip(path, mapped)
    elif start.startswith(STARTS[1]):
        content, storages = read_legacy(path, mapped)
    else:
        raise ModelError(f"{path} is not a torch.save file (it starts with {start!r}); use a .ckpt, .bin or .pt file")
    return {key: view(tensor, storages, f"{path}: {key}") for key, tensor in state_dict(content, path).items()}


# ---- the pickle -----------------------------------------------------------------------------------------------------


class Unpickler(pickle.Unpickler):
    """Builds dicts, lists and numbers, and a Tensor where the file has one; `storages` are those that it mentions.

    A name becomes a string, a method of this object, OrderedDict or LeftOut, whose attributes a pickle cannot set.
    """

    def __init__(self, file: io.BufferedIOBase, path: Path):
        super().__init__(file, encoding="utf-8")
        self.path = path
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and name in DTYPES:
            return name
        known = {
            "collections.OrderedDict": OrderedDict,
            "torch.storage.UntypedStorage": BYTES,
            "torch._utils._rebuild_tensor_v2": self.rebuild_typed,
            "torch._utils._rebuild_tensor_v3": self.rebuild,
            "torch._utils._rebuild_parameter": self.rebuild_parameter,
        }
        if (full := f"{module}.{name}") in CALLBACKS:
            return full
        if full in SCALARS:
            return LeftOut
        if full not in known:
            raise ModelError(
                f"{self.path} references {full}, which is not allowed in a state dict; no code was executed. Use the "
                "safetensors file of this model, or save its bare state dict with torch.save if you trust it"
            )
        return known[full]

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _, count, *window = pid
        if kind != "storage" or type(key) is not str or type(count) is not int or count < 0:
            raise ValueError(f"{pid!r} is not a storage")
        if dtype not in KNOWN | {BYTES} or any(part is not None for part in window):
            raise ValueError(f"{pid!r} is not a supported storage")
        storage = Storage(key, dtype, count)
        if self.storages.setdefault(key, storage).nbytes != storage.nbytes:
            raise ValueError(f"the storage {key!r} has two sizes")
        return storage

    def rebuild_typed(self, storage, offset, shape, strides, requires_grad=False, hooks=None, metadata=None):
        return self.rebuild(storage, offset, shape, strides, requires_grad, hooks, storage.dtype)

    def rebuild(self, storage, offset, shape, strides, requires_grad, hooks, dtype, metadata=None):
        numbers = (offset, *shape, *strides)
        if type(storage) is not Storage or dtype not in KNOWN or len(shape) != len(strides):
            raise ValueError(f"a tensor of dtype {dtype!r} is not a view of a storage")
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError(f"a tensor has the offset, shape and strides {numbers}")
        return Tensor(storage, dtype, offset, tuple(shape), tuple(strides))

    def rebuild_parameter(self, tensor, requires_grad=False, hooks=None):
        return tensor


def unpickle(file: io.BufferedIOBase, path: Path) -> tuple[Any, dict[str, Storage]]:
    """Return the next pickle of `file` and its storages. Raises ModelError if it is broken or has other names."""
    unpickler = Unpickler(file, path)
    try:
        return unpickler.load(), unpickler.storages
    except ModelError:
        raise
    except Exception as error:  # a broken pickle can end in almost any of them
        raise ModelError(f"{path} is truncated or not a torch.save file ({error}): copy it again") from None


def state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the named tensors of what was pickled. Raises ModelError if there are none."""
    # The methods of dict itself, because a pickle may give an OrderedDict attributes of any name.
    if isinstance(content, dict) and isinstance(inner := dict.get(content, "state_dict"), dict):
        content = inner
    if not isinstance(content, dict):
        raise ModelError(f"{path} contains a {type(content).__name__}; use a file with a state dict, a dict of tensors")
    tensors = {key: value for key, value in dict.items(content) if isinstance(value, Tensor)}
    if unnamed := [key for key in tensors if type(key) is not str]:
        raise ModelError(f"{path} has tensors under {unnamed[:5]!r}; the keys of a state dict are strings")
    if not tensors:
        there = ", ".join(repr(key) for key in list(dict.keys(content))[:5]) or "nothing"
        raise ModelError(f"{path} contains no tensors ({there} at its top); use a file with a state dict")
    return tensors


def view(tensor: Tensor, storages: dict[str, np.ndarray], what: str) -> np.ndarray:
    """Return the array of a tensor in the bytes of its storage. Raises ModelError if it is not within them."""
    data = storages[tensor.storage.key]
    dtype = np.dtype(tensor.dtype)
    last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    if 0 not in tensor.shape and (last + 1) * dtype.itemsize > data.nbytes:
        raise ModelError(
            f"{what} reaches {(last + 1) * dtype.itemsize} bytes into a storage of {data.nbytes} (shape "
            f"{list(tensor.shape)}, strides {list(tensor.strides)}, offset {tensor.offset}): copy the file again"
        )
    try:
        if 0 in tensor.shape:
            return np.empty(tensor.shape, dtype)
        strides = [stride * dtype.itemsize for stride in tensor.strides]
        return np.ndarray(tensor.shape, dtype, data, tensor.offset * dtype.itemsize, strides)
    except (ValueError, OverflowError) as error:
        raise ModelError(f"{what} has the shape {list(tensor.shape)} ({error}): copy the file again") from None


# ---- the two containers ---------------------------------------------------------------------------------------------


def read_zip(path: Path, mapped: np.ndarray) -> tuple[Any, dict[str, np.ndarray]]:
    """Return the content of `<name>/data.pkl`, and the bytes of every `<name>/data/<key>`."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            repeated = len(members) < len(archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        # zipfile raises NotImplementedError for an archive of a newer version than it knows.
        raise ModelError(f"{path} is truncated or not a torch.save file ({error}): copy it again") from None
    roots = [name.removesuffix("data.pkl") for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1 or repeated:
        there = ", ".join(list(members)[:5]) or "nothing"
        raise ModelError(f"{path} is a zip file but not a torch.save file: it contains {there}, not one data.pkl")
    root = roots[0]
    if (order := members.get(f"{root}byteorder")) and bytes(member(order, mapped, path)) != b"little":
        raise ModelError(f"{path} was written on a big-endian machine: save it again on another")
    content, storages = unpickle(io.BytesIO(bytes(member(members[f"{root}data.pkl"], mapped, path))), path)
    stored = {}
    for key, storage in storages.items():
        if (info := members.get(f"{root}data/{key}")) is None:
            raise ModelError(f"{path} lacks the storage {key!r}: copy it again")
        stored[key] = member(info, mapped, path)
        if (size := len(stored[key])) != storage.nbytes:
            raise ModelError(f"{path}: the storage {key!r} has {size} bytes, not {storage.nbytes}; copy it again")
    return content, stored


def member(info: zipfile.ZipInfo, mapped: np.ndarray, path: Path) -> np.ndarray:
    """Return the bytes of a member, a view. Raises ModelError if it is compressed, or not within the file."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise ModelError(f"{path}: {info.filename} is compressed or encrypted, which torch.save does not do: unpack it")
    header = bytes(mapped[info.header_offset : info.header_offset + 30])
    start = info.header_offset + 30 + (sum(struct.unpack("<HH", header[26:])) if len(header) == 30 else 0)
    if not header.startswith(b"PK\x03\x04") or start + info.file_size > len(mapped):
        raise ModelError(f"{path} is damaged at {info.filename}: copy it again")
    return mapped[start : start + info.file_size]


def read_legacy(path: Path, mapped: np.ndarray) -> tuple[Any, dict[str, np.ndarray]]:
    """Before torch 1.6: five pickles in a row, the last of them the keys of the storages, which follow with a count."""
    with path.open("rb") as file:
        magic = unpickle(file, path)[0]
        if magic != MAGIC:
            raise ModelError(f"{path} is a pickle but not a torch.save file; use a .ckpt, .bin or .pt file")
        version, system = unpickle(file, path)[0], unpickle(file, path)[0]
        if version != VERSION or not isinstance(system, dict) or system.get("little_endian") is not True:
            raise ModelError(f"{path} has the protocol {version!r} and the system {system!r}: save it again with torch")
        content, storages = unpickle(file, path)
        keys, position = unpickle(file, path)[0], file.tell()
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
        raise ModelError(f"{path} is damaged: the storages that it lists are not those of its tensors; copy it again")
    stored = {}
    for key in keys:
        start, end = position + 8, position + 8 + storages[key].nbytes
        if end > len(mapped) or bytes(mapped[position:start]) != struct.pack("<q", storages[key].count):
            raise ModelError(f"{path} is truncated or damaged at the storage {key!r}: copy it again")
        stored[key], position = mapped[start:end], end
    return content, stored
