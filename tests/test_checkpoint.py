"""Checkpoints survive what happens to files: kills, truncation, flipped bits, another mesh."""

import json
import logging
import shutil
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from lcm_jax.training import checkpoint, sharding
from lcm_jax.training.checkpoint import CheckpointError, Checkpoints, check_root
from lcm_jax.training.state import create_state
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.orbax_folder import checkpoint_root
from lcm_jax.weights.orbax_tree import read_leaves, write_tree

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def state_at(step: int):
    """A state in which every value is its own, NaN-free, at `step`."""
    rng = np.random.default_rng(step)
    params = {"dense": {"kernel": np.zeros((64, 16)), "bias": np.zeros(16)}, "scale": np.zeros(7)}
    state = create_state(params, OPTIMIZER)
    fill = lambda x: jnp.asarray(rng.standard_normal(x.shape) * 100, x.dtype)  # noqa: E731
    return jax.tree.map(fill, state).replace(step=jnp.int32(step))


def abstract(mesh=None):
    shapes = jax.eval_shape(lambda: state_at(0))
    shardings = sharding.tree_shardings(mesh or sharding.make_mesh(8, 1), shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def three_saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = Checkpoints(folder, keep=3)
    for step in (10, 20, 30):
        checkpoints.save(state_at(step))
    checkpoints.close()
    return folder


@pytest.fixture
def three(three_saved, tmp_path) -> Path:
    """A folder with checkpoints at 10, 20 and 30, to be damaged."""
    return Path(shutil.copytree(three_saved, tmp_path / "run" / "checkpoints"))


def restore(folder: Path, keep: int = 3, mesh=None):
    """(state, what was said)."""
    said: list[str] = []
    checkpoints = Checkpoints(folder, keep)
    try:
        return checkpoints.restore(abstract(mesh), said.append), said
    finally:
        checkpoints.close()


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def arrays_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_the_newest_comes_back_to_the_last_bit(three):
    state, said = restore(three)
    assert_same_bits(state, state_at(30))
    assert type(state.opt_state) is tuple and not said


def test_an_empty_folder_holds_nothing(tmp_path):
    assert restore(tmp_path / "none") == (None, [])


def test_the_newest_few_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    for step in (1, 2, 3, 4):
        checkpoints.save(state_at(step))
    checkpoints.save(state_at(4))  # once more, as at the end of a run: no error
    checkpoints.close()
    assert steps(tmp_path / "c") == ["3", "4"]


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwrite(path: Path):
    path.write_bytes(bytes(path.stat().st_size))


def flip_one_bit(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, overwrite, flip_one_bit, Path.unlink], ids=lambda f: f.__name__)
def test_a_damaged_newest_gives_way_to_the_one_before(damage, three):
    damage(arrays_file(three / "30"))
    state, said = restore(three)
    assert_same_bits(state, state_at(20))
    aside = three.with_name("checkpoints-unreadable")
    assert len(said) == 1 and "\n" not in said[0]
    assert said[0].startswith("checkpoint 30 cannot be read (") and f"moved to {aside / '30'}" in said[0]
    assert steps(three) == ["10", "20"] and arrays_file(aside / "30")

    # The run goes on, and writes the same step again.
    checkpoints = Checkpoints(three, keep=3)
    checkpoints.save(state_at(30))
    checkpoints.close()
    assert_same_bits(restore(three)[0], state_at(30))


def test_a_flipped_bit_is_named(three):
    flip_one_bit(arrays_file(three / "30"))
    assert "checksum mismatch in " in restore(three)[1][0]


def test_a_checkpoint_from_before_there_were_checksums_is_read(three):
    path = three / "30" / "_CHECKPOINT_METADATA"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"custom_metadata": {}}))
    assert_same_bits(restore(three)[0], state_at(30))


def test_what_is_read_beside_a_damaged_array_ends_unheard(tmp_path, monkeypatch):
    heard: list[BaseException] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: heard.append(unraisable.exc_value))
    rng = np.random.default_rng(0)
    tree = {"unet": {f"kernel_{i}": rng.standard_normal((300, 300)).astype(np.float32) for i in range(40)}}
    write_tree(tmp_path / "one", tree, lambda name: tree["unet"][name.split(".")[1]], lambda written: None)
    for path in (tmp_path / "one").rglob("*"):
        if path.is_file() and path.stat().st_size > 2**16:
            content = bytearray(path.read_bytes())
            content[1000::2000] = bytes(b ^ 1 for b in content[1000::2000])
            path.write_bytes(content)
    for _ in range(5):
        with pytest.raises(ModelError, match="cannot be read"):
            read_leaves(tmp_path / "one", 0, [("unet", name) for name in tree["unet"]])
    collected = Exception("a read that nobody awaits any more")
    collected.__cause__ = GeneratorExit()
    sys.unraisablehook(SimpleNamespace(exc_value=collected))
    assert not heard
    sys.unraisablehook(SimpleNamespace(exc_value=ValueError("of something else")))
    assert [str(error) for error in heard] == ["of something else"]


def test_where_all_are_damaged_nothing_starts_over(three):
    for step in ("10", "20", "30"):
        truncate(arrays_file(three / step))
    for _ in range(2):  # and not when it is tried again, either
        with pytest.raises(CheckpointError, match="none of the checkpoints in .* read; 10, 20, 30 are kept in"):
            restore(three)
    assert steps(three.with_name("checkpoints-unreadable")) == ["10", "20", "30"]


def test_a_machine_without_memory_does_not_condemn_a_checkpoint(three, monkeypatch):
    def exhausted(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7 bytes")

    monkeypatch.setattr(Checkpoints, "_compare", exhausted)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        restore(three)
    assert steps(three) == ["10", "20", "30"] and not three.with_name("checkpoints-unreadable").exists()


@pytest.mark.parametrize("name", ["40.orbax-checkpoint-tmp", "40.orbax-checkpoint-tmp-1700000000000000"])
def test_a_save_that_was_interrupted_is_not_there(name, three):
    half = Path(shutil.copytree(three / "30", three / name))
    arrays_file(half).unlink()
    for path in half.rglob("commit_success.txt"):
        path.unlink()
    state, said = restore(three)
    assert_same_bits(state, state_at(30))
    assert not said
    checkpoints = Checkpoints(three, keep=3)
    checkpoints.save(state_at(40))
    checkpoints.close()
    assert_same_bits(restore(three)[0], state_at(40))
    assert steps(three) == ["20", "30", "40"], "and takes no room any more"


def test_another_mesh_reads_it(three, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
    state, said = restore(three, mesh=sharding.make_mesh(2, 4))
    assert_same_bits(state, state_at(30))
    assert not said and state.params["dense"]["kernel"].addressable_data(0).shape == (16, 16)

    # And back: saved in pieces, read whole.
    checkpoints = Checkpoints(three, keep=3)
    checkpoints.save(state.replace(step=state.step + 1))
    checkpoints.close()
    state, said = restore(three, mesh=sharding.make_mesh(8, 1))
    assert not said and state.step == 31 and state.params["dense"]["kernel"].sharding.is_fully_replicated
    assert_same_bits(state.opt_state, state_at(30).opt_state)


def test_donated_buffers_do_not_reach_the_file(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    state = state_at(1)
    checkpoints.save(state)
    state = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state)
    checkpoints.close()
    assert_same_bits(restore(tmp_path / "c")[0], state_at(1))


def test_the_library_is_silent(tmp_path, monkeypatch, caplog):
    absl = logging.getLogger("absl")
    monkeypatch.setattr(absl, "propagate", True)
    absl.setLevel(logging.INFO)  # as absl's own `app.run` does
    with caplog.at_level(logging.INFO):
        restore(tmp_path / "c")
    assert not [record for record in caplog.records if record.levelno < logging.WARNING]


def test_every_mth_is_kept_beside_the_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2, keep_every=4)
    for step in range(1, 11):
        checkpoints.save(state_at(step))
    checkpoints.close()
    assert sorted(map(int, steps(tmp_path / "c"))) == [4, 8, 9, 10]


def test_a_checkpoint_without_room_is_not_begun(three, monkeypatch):
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state_at(40)))
    room = lambda free: lambda path: SimpleNamespace(total=10**12, used=0, free=free)  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", room(needed - 1))
    monkeypatch.setattr(checkpoint, "GB", 1)  # bytes, of so small a state
    with closing(Checkpoints(three, keep=3)) as checkpoints:
        message = (
            rf"^a checkpoint cannot be written to {three}: it needs {needed}.00 GB, and the disk has {needed - 1}.00"
        )
        with pytest.raises(
            CheckpointError, match=message + " GB free; free some space; checkpoint 30 in .* is kept; run"
        ):
            checkpoints.save(state_at(40))
        assert steps(three) == ["10", "20", "30"]
        monkeypatch.setattr(shutil, "disk_usage", room(needed))
        checkpoints.save(state_at(40))
    assert steps(three) == ["20", "30", "40"]


def test_unreadable_checkpoints_are_ignored_only_if_that_is_asked_for(three):
    for step in ("10", "20", "30"):
        truncate(arrays_file(three / step))
    said: list[str] = []
    with closing(Checkpoints(three, keep=3)) as checkpoints:
        assert checkpoints.restore(abstract(), said.append, ignore_unreadable=True) is None
    assert len(said) == 4 and said[3].startswith(f"none of the checkpoints in {three} can be read; 10, 20, 30 are kept")
    assert said[3].endswith("; training from the beginning")
    assert steps(three.with_name("checkpoints-unreadable")) == ["10", "20", "30"]


def test_a_run_whose_checkpoints_are_elsewhere_does_not_begin_anew(three, tmp_path):
    workdir, elsewhere = three.parent, tmp_path / "elsewhere"
    check_root(workdir, "", "")
    check_root(tmp_path / "new", str(elsewhere), "")
    message = (
        f"^checkpoint.folder is {elsewhere}, which has no checkpoint, and this run has some in {workdir}, up to 30; "
    )
    with pytest.raises(
        CheckpointError, match=message + "move its checkpoints/ and best/, or set checkpoint.folder to ''"
    ):
        check_root(workdir, str(elsewhere), "")
    shutil.move(three, elsewhere / "checkpoints")
    check_root(workdir, str(elsewhere), "")
    with pytest.raises(
        CheckpointError, match=f"is {workdir}, .* in {elsewhere}, .*set checkpoint.folder to '{elsewhere}'"
    ):
        check_root(workdir, "", str(elsewhere))


def test_a_remote_folder_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as where it is not installed
    with pytest.raises(
        CheckpointError, match="^checkpoint.folder gs://bucket/run cannot be read .*pip install lcm_jax.gcs."
    ) as e:
        check_root(tmp_path, "gs://bucket/run", "")
    assert "\n" not in str(e.value)
    assert str(checkpoint_root(tmp_path, "gs://bucket/run") / "checkpoints") == "gs://bucket/run/checkpoints"


def test_only_the_arrays_that_are_asked_for_are_read(three, monkeypatch):
    """A student is sampled from a checkpoint of which the optimizer's arrays, two thirds of it, stay on the disk."""
    asked = []
    handler = ocp.type_handlers.NumpyHandler
    read = handler.deserialize
    monkeypatch.setattr(
        handler,
        "deserialize",
        lambda self, infos, args=None: asked.extend(i.name for i in infos) or read(self, infos, args),
    )
    leaves = read_leaves(three, 30, [("ema", "dense", "kernel")])
    assert np.array_equal(leaves["ema", "dense", "kernel"], state_at(30).ema["dense"]["kernel"])
    assert asked == ["ema.dense.kernel"]
