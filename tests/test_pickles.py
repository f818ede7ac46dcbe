"""Files of torch.save without torch, and what they may not do."""

import os
import pickle
import subprocess
import sys
import zipfile

import ml_dtypes  # noqa: F401 (names of dtypes)
import numpy as np
import pytest

from lcm_jax.weights import pickles
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.pickles import read_pickle

torch = pytest.importorskip("torch")

DTYPES = [
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
    "complex64",
    "complex128",
    "uint16",
    "uint32",
    "uint64",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
]


@pytest.fixture(params=["zip", "legacy"])
def save(request, tmp_path):
    """Saves an object by torch in one of its two formats and returns the path."""

    def write(content, **how):
        torch.save(content, tmp_path / "m.ckpt", _use_new_zipfile_serialization=request.param == "zip", **how)
        return tmp_path / "m.ckpt"

    return write


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def assert_same(arrays, tensors):
    assert list(arrays) == list(tensors)
    for key, tensor in tensors.items():
        array = arrays[key]
        assert str(tensor.dtype) == f"torch.{array.dtype.name}" and array.shape == tuple(tensor.shape), key
        assert np.ascontiguousarray(array).tobytes() == bits(tensor), key


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_bit_for_bit(save, dtype):
    size = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    numbers = torch.from_numpy(np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 256, 30 * size, np.uint8))
    tensor = numbers.view(getattr(torch, dtype))  # all sorts of bits, infinities and not-a-numbers among them
    tensors = {"whole": tensor.clone().reshape(5, 6), "scalar": tensor[3].clone(), "none": tensor[:0].clone()}
    assert_same(read_pickle(save(tensors)), tensors)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_shared_storages_views_and_strides(save, protocol):
    base = torch.arange(60.0).reshape(3, 4, 5)
    tensors = {
        "base": base,
        "transposed": base.permute(2, 0, 1),
        "row": base[1],
        "every_other": base.flatten()[1::2],
        "last": base.flatten()[59:],
        "repeated": base[0, 0].expand(3, 5),
        "parameter": torch.nn.Parameter(base[0].T),
        "empty": base[:, :0],
    }
    arrays = read_pickle(save(tensors, pickle_protocol=protocol))
    assert_same(arrays, {key: tensor.detach() for key, tensor in tensors.items()})
    assert np.shares_memory(arrays["base"], arrays["transposed"])
    assert not any(array.flags.writeable for array in arrays.values() if array.size)


def test_a_state_dict_with_its_attributes(save):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).to(torch.bfloat16)
    assert_same(read_pickle(save(network.state_dict())), network.state_dict())


def test_the_state_dict_of_a_training_run(save):
    network = torch.nn.Linear(3, 2)
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 3)}}, "param_groups": [{"lr": 0.1}]}
    content = {
        "epoch": 3,
        "global_step": 1000,
        "state_dict": network.state_dict() | {"note": "text", "number": 1.5},
        "optimizer_states": [optimizer],
        "callbacks": {"checkpoint": {"best": 0.1, "list": [1, None]}},
    }
    assert_same(read_pickle(save(content)), network.state_dict())


def test_a_file_of_torch_is_mapped_and_not_read(save):
    """Many gigabytes of file take no memory until a tensor is used."""
    arrays = read_pickle(save({"a": torch.ones(1000)}))
    base = arrays["a"]
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    assert type(base).__name__ == "mmap"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_numpy_scalars_beside_the_state_dict_are_left_out_as_in_sd_1_4(save, protocol):
    scalars = [np.float64(0.25), np.float32(1), np.int64(3), np.bool_(True), np.float16(2)]
    content = {
        "epoch": 1,
        "callbacks": {"best": scalars[0]},
        "lr_schedulers": [{"last": scalars}],
        "state_dict": {"w": torch.ones(2), "scale": np.float32(1)},
    }
    np.testing.assert_equal(read_pickle(save(content, pickle_protocol=protocol)), {"w": np.ones(2, np.float32)})


def test_a_numpy_scalar_as_torch_of_its_time_wrote_it(tmp_path):
    """{"best": scalar, "w": tensor}, the scalar's module under the name that numpy 1 gave it."""
    dtype = b"cnumpy\ndtype\n(" + part("f8") + part(0) + part(1) + b"tR("  # then the state that it is given
    dtype += b"".join(map(part, (3, "<", None, None, None, -1, -1, 0))) + b"tb"
    numbers = b"c_codecs\nencode\n(" + part("\0\0\0\0\0\0\xf0?") + part("latin1") + b"tR"
    scalar = b"cnumpy.core.multiarray\nscalar\n(" + dtype + numbers + b"tR"
    path = archive(tmp_path, b"\x80\x02}" + part("best") + scalar + b"s" + entry()[3:])
    np.testing.assert_equal(read_pickle(path), {"w": np.arange(4, dtype=np.float32)})


def test_what_stands_for_a_numpy_scalar_cannot_be_changed(tmp_path):
    change = b"cnumpy\ndtype\n" + part({"__setstate__": 1}) + b"b"
    with pytest.raises(ModelError, match="truncated or not a torch.save file"):
        read_pickle(archive(tmp_path, b"\x80\x02}" + part("best") + change + b"s" + entry()[3:]))
    assert "__setstate__" in vars(pickles.LeftOut) and callable(pickles.LeftOut.__setstate__)


# --- what is refused ---


class Runs:
    """Calls `function` when it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def touch(path):
    open(path, "w").close()


@pytest.mark.parametrize("kind", ["system", "eval", "own", "getattr", "array", "size"])
def test_a_pickle_that_runs_something_is_refused_by_name(save, tmp_path, kind):
    victim = tmp_path / "victim"
    call, name = {
        "system": (Runs(os.system, f"touch {victim}"), rf"{os.system.__module__}\.system"),
        "eval": (Runs(eval, f"open({str(victim)!r}, 'w')"), r"(builtins|__builtin__)\.eval"),
        "own": (Runs(touch, str(victim)), r"test_pickles\.touch"),
        "getattr": (Runs(getattr, 1, "real"), r"(builtins|__builtin__)\.getattr"),
        "array": (np.ones(2), r"numpy\.\S*multiarray\._reconstruct"),
        "size": (torch.Size([1]), r"torch\.Size"),
    }[kind]
    for content in ({"w": torch.ones(2), "x": call}, {"epoch": call, "state_dict": {"w": torch.ones(2)}}, call):
        with pytest.raises(ModelError, match=rf"m\.ckpt references {name}, which is not allowed in a state dict"):
            read_pickle(save(content))
    assert not victim.exists()
    if kind in ("system", "eval", "own"):  # it would have been seen
        torch.load(save({"x": call}), weights_only=False)
        assert victim.exists()


def test_a_bare_pickle_is_refused(tmp_path):
    for content, message in [
        (Runs(os.system, "true"), rf"references {os.system.__module__}\.system"),
        ({"a": 1}, "a pickle but not a torch.save file"),
        (pickles.MAGIC, "truncated or not a torch.save file"),
    ]:
        (tmp_path / "m.bin").write_bytes(pickle.dumps(content))
        with pytest.raises(ModelError, match=message):
            read_pickle(tmp_path / "m.bin")


def part(value):
    """The opcodes that leave a plain value on the stack."""
    return pickle.dumps(value, 2)[2:-1]


def entry(
    storage=b"ctorch\nFloatStorage\n", count=4, offset=0, shape=(4,), strides=(1,), dtype=None, key="0", after=b""
):
    """The pickle of {"w": tensor}; `after`: opcodes behind the name of the function that rebuilds it."""
    version, dtype = (b"v2", b"") if dtype is None else (b"v3", part(dtype))
    return (
        b"\x80\x02}"
        + part("w")
        + b"ctorch._utils\n_rebuild_tensor_"
        + version
        + b"\n"
        + after
        + b"(("
        + part("storage")
        + storage
        + part(key)
        + part("cpu")
        + part(count)
        + b"tQ"
        + part(offset)
        + part(shape)
        + part(strides)
        + part(False)
        + part(None)
        + dtype
        + b"tRs."
    )


def archive(folder, code, compression=zipfile.ZIP_STORED, **members):
    """A zip file as torch writes it, around any pickle, with a storage of 16 bytes."""
    members = {"data.pkl": code, "byteorder": b"little", "data/0": np.arange(4, dtype=np.float32).tobytes()} | members
    with zipfile.ZipFile(folder / "m.pt", "w", compression) as file:
        for name, content in members.items():
            file.writestr(f"m/{name}", content)
    return folder / "m.pt"


LIGHTNING = "pytorch_lightning.callbacks.model_checkpoint"


def lightning(module, name, after=b""):
    """A checkpoint as Lightning wrote them: {"callbacks": {the class: {"best": 1}}, "w": tensor}."""
    callbacks = b"}" + f"c{module}\n{name}\n".encode() + after + part({"best": 1}) + b"s"
    return b"\x80\x02}" + part("callbacks") + callbacks + b"s" + entry()[3:]


@pytest.fixture
def victim(tmp_path, monkeypatch):
    """Is there when the module that a checkpoint names was imported."""
    folder = tmp_path / "pytorch_lightning" / "callbacks"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("")
    (folder / "__init__.py").write_text(f"open({str(tmp_path / 'victim')!r}, 'w').close()")
    (folder / "model_checkpoint.py").write_text("class ModelCheckpoint: pass")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "victim"


def test_the_class_of_a_lightning_callback_is_read_as_its_name(tmp_path, victim):
    path = archive(tmp_path, lightning(LIGHTNING, "ModelCheckpoint"))
    np.testing.assert_equal(read_pickle(path), {"w": np.arange(4, dtype=np.float32)})
    assert not victim.exists() and not any(name.startswith("pytorch_lightning") for name in sys.modules)


@pytest.mark.parametrize(
    "module, name",
    [
        (LIGHTNING, "os"),
        (f"{LIGHTNING}.ModelCheckpoint", "x"),
        ("pytorch_lightning.trainer", "Trainer"),
        ("pytorch_lightning.callbacks", "Callback"),
    ],
)
def test_other_names_of_lightning_are_refused(tmp_path, victim, module, name):
    with pytest.raises(ModelError, match=f"references {module}.{name}, which is not allowed in a state dict"):
        read_pickle(archive(tmp_path, lightning(module, name)))
    assert not victim.exists()


@pytest.mark.parametrize(
    "after, message",
    [
        (b")R", "'str' object is not callable"),  # a call of the class
        (b")\x81", "NEWOBJ"),
        (part({"__class__": 1}) + b"b", "attribute"),
    ],
)
def test_the_name_of_a_callback_cannot_be_used(tmp_path, victim, after, message):
    with pytest.raises(ModelError, match=message):
        read_pickle(archive(tmp_path, lightning(LIGHTNING, "ModelCheckpoint", after)))
    assert not victim.exists()


@pytest.mark.parametrize(
    "how, message",
    [
        ({"shape": (5,)}, "w reaches 20 bytes into a storage of 16"),
        ({"offset": 1}, "w reaches 20 bytes into a storage of 16"),
        ({"shape": (2, 2), "strides": (3, 1)}, "w reaches 20 bytes into a storage of 16"),
        ({"shape": (2**40, 2**40), "strides": (2**40, 1)}, "w reaches"),
        ({"shape": (2**80,), "strides": (0,)}, "w has the shape"),
        ({"shape": (0, 2**62, 2**62), "strides": (1, 1, 1)}, "w has the shape"),
        ({"shape": (1,) * 70, "strides": (1,) * 70}, "w has the shape"),
        ({"offset": -1}, "offset, shape and strides"),
        ({"strides": (-1,)}, "offset, shape and strides"),
        ({"shape": (2.0,)}, "offset, shape and strides"),
        ({"shape": (True,)}, "offset, shape and strides"),
        ({"strides": (1, 1)}, "not a view of a storage"),
        ({"count": 8, "shape": (8,)}, "storage '0' has 16 bytes, not 32"),
        ({"count": 3, "shape": (3,)}, "storage '0' has 16 bytes, not 12"),
        ({"count": -4}, "not a storage"),
        ({"key": "7"}, "lacks the storage '7'"),
        ({"key": "../../m/data/0"}, "lacks the storage"),
        ({"storage": part("object")}, "not a supported storage"),
        ({"dtype": "object"}, "dtype 'object' is not a view"),
        ({"dtype": "S4"}, "dtype 'S4' is not a view"),
        ({"storage": b"ctorch.storage\nUntypedStorage\n", "count": 16}, "dtype 'bytes' is not a view"),
    ],
)
def test_a_tensor_that_is_not_in_its_storage(tmp_path, how, message):
    with pytest.raises(ModelError, match=message) as caught:
        read_pickle(archive(tmp_path, entry(**how)))
    assert str(tmp_path / "m.pt") in str(caught.value)


def test_a_pickle_cannot_change_the_reader(tmp_path):
    """BUILD sets the attributes of what is on the stack: here, of the function that rebuilds tensors, and of a dict."""
    expected = {"w": np.arange(4, dtype=np.float32)}
    np.testing.assert_equal(read_pickle(archive(tmp_path, entry())), expected)
    with pytest.raises(ModelError, match="__defaults__"):
        read_pickle(archive(tmp_path, entry(after=part((None, {"__defaults__": (1, 2, 3)})) + b"b")))
    np.testing.assert_equal(read_pickle(archive(tmp_path, entry())), expected)
    for attribute in ("get", "items", "keys", "__iter__"):
        ordered = b"\x80\x02ccollections\nOrderedDict\n)R" + part({attribute: "no"}) + b"b" + entry()[3:]
        np.testing.assert_equal(read_pickle(archive(tmp_path, ordered)), expected)


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.3, 0.7, 0.99])
def test_a_truncated_file_is_named(save, fraction):
    path = save({"a": torch.ones(300), "b": torch.ones(200)})
    path.write_bytes(path.read_bytes()[: int(fraction * path.stat().st_size)])
    with pytest.raises(ModelError, match="copy it again|starts with") as caught:
        read_pickle(path)
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_no_damage_is_another_error(save):
    """Whatever byte is wrong: numbers, or a ModelError."""
    path = save({"a": torch.ones(3), "b": torch.ones(2)})
    good, rng = path.read_bytes(), np.random.default_rng(0)
    for position in rng.choice(min(len(good), 1200), 120, replace=False):
        path.write_bytes(good[:position] + bytes([rng.integers(256)]) + good[position + 1 :])
        try:
            assert all(isinstance(array, np.ndarray) for array in read_pickle(path).values())
        except ModelError:
            pass


def test_other_files(tmp_path):
    with pytest.raises(ModelError, match="none.ckpt is missing"):
        read_pickle(tmp_path / "none.ckpt")
    with pytest.raises(ModelError, match="cannot be read"):
        read_pickle(tmp_path)
    (tmp_path / "m.ckpt").write_bytes(b"\x10\x00\x00\x00{}")
    with pytest.raises(ModelError, match="it starts with"):
        read_pickle(tmp_path / "m.ckpt")
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as file:
        file.writestr("a.txt", "text")
    with pytest.raises(ModelError, match="not a torch.save file: it contains a.txt"):
        read_pickle(tmp_path / "m.zip")
    with pytest.raises(ModelError, match="is compressed or encrypted"):
        read_pickle(archive(tmp_path, entry(), zipfile.ZIP_DEFLATED))
    with pytest.raises(ModelError, match="big-endian"):
        read_pickle(archive(tmp_path, entry(), byteorder=b"big"))


@pytest.mark.parametrize(
    "content, message",
    [
        ([1], "contains a list"),
        ({"model": {"a": torch.ones(1)}}, "contains no tensors .'model' at its top"),
        ({}, "contains no tensors"),
        ({1: torch.ones(1)}, "tensors under .1.; the keys"),
    ],
)
def test_a_file_without_a_state_dict(save, content, message):
    with pytest.raises(ModelError, match=message):
        read_pickle(save(content))


def test_the_reader_loads_neither_torch_nor_jax():
    code = "import sys, lcm_jax.weights.pickles; print(sorted({'torch', 'jax', 'flax'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
