"""One opener for every format: what is opened is the same model, and nothing is read before it is used."""

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_model

from lcm_jax import convert as command
from lcm_jax.conversion import FORMATS, convert
from lcm_jax.models.families import FAMILIES
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.pipeline import Pipeline
from lcm_jax.training.checkpoint import Checkpoints
from lcm_jax.training.state import create_state
from lcm_jax.weights import diffusers_folder as folders
from lcm_jax.weights import orbax_tree
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.model import compute_digests, merge_base, open_model, published, read_params


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model.write(tmp_path_factory.mktemp("models") / "model", unet=tiny_model.SHALLOW)


@pytest.fixture(scope="module")
def formats(model) -> dict[str, Path]:
    """The model in every format, by its name; a run whose student and EMA are the model's UNet plus 1 and plus 2."""
    paths = {"diffusers": model, "ldm": model.with_name("m.safetensors"), "orbax": model.with_name("orbax")}
    for format in ("ldm", "orbax"):
        convert(model, paths[format], format, log=lambda line: None)
    paths["run"] = model.with_name("run")
    paths["run"].mkdir()
    config = {"objective": {"name": "diffusion"}, "teacher": str(model)}
    (paths["run"] / "config.json").write_text(json.dumps(config))
    stored = open_model(model)
    unet = read_params(stored, "unet", abstract_of(stored)["unet"])
    plus = lambda n: {"unet": jax.tree.map(lambda x: jnp.asarray(x + n), unet)}  # noqa: E731
    checkpoints = Checkpoints(paths["run"] / "checkpoints", keep=1)
    checkpoints.save(create_state(plus(1), optax.sgd(0.1)).replace(step=jnp.int32(5), ema=plus(2)))
    checkpoints.close()
    return paths


def abstract_of(stored):
    return StableDiffusion.from_configs(stored.configs).abstract_params()


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_a_pipeline_opens_every_format(formats, model):
    expected = Pipeline.from_pretrained(model)
    assert isinstance(jax.tree.leaves(expected.params)[0], jax.Array)
    for format in ("ldm", "orbax"):
        pipe = Pipeline.from_pretrained(formats[format], base=model if format == "ldm" else None)
        assert_same(pipe.params, expected.params)
        assert pipe.model.scheduler == expected.model.scheduler
        assert pipe.tokenize(["a red circle"]).tolist() == expected.tokenize(["a red circle"]).tolist()
    for ema, added in ((None, 2), (False, 1)):
        params = Pipeline.from_pretrained(formats["run"], ema=ema).params
        assert_same(params["unet"], jax.tree.map(lambda x, n=added: x + n, expected.params["unet"]))
        assert_same(params["vae"], expected.params["vae"])


def test_what_a_file_lacks_is_named_with_its_remedy(formats, model, tmp_path):
    with pytest.raises(ModelError, match=r"m.safetensors has no tokenizer; pass a sd1 model .* as base \(--base\)"):
        Pipeline.from_pretrained(formats["ldm"])
    stored = open_model(model)
    config = {**stored.configs["vae"], "_class_name": "AutoencoderKL"}
    folders.write_tensors(tmp_path, "vae", config, stored.tensors["vae"])  # as a run of an autoencoder exports it
    for path in (tmp_path, tmp_path / "vae"):
        with pytest.raises(ModelError, match="has no text_encoder, unet; pass a model in diffusers layout .* as base"):
            Pipeline.from_pretrained(path)
        assert open_model(path, base=model).tensors.keys() == stored.tensors.keys()


def test_opening_reads_no_tensor(formats, model, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("lcm_jax.weights.stored.np.memmap", refuse)
    monkeypatch.setattr(orbax_tree, "read_leaves", refuse)
    for name, path in formats.items():
        stored = open_model(path, base=model if name == "ldm" else None)
        assert {spec.dtype.name for part in stored.tensors.values() for spec in part.specs.values()} == {"float32"}
        with pytest.raises(AssertionError, match="a tensor was read"):
            stored.tensors["unet"]["conv_in.weight"]


def test_parameters_are_read_cast_and_put_one_at_a_time(model):
    stored = open_model(model)
    abstract = abstract_of(stored)["unet"]
    unet, events = stored.tensors["unet"], []

    def put(array):
        events.append((array.dtype.name, array.ndim))
        return len(events)

    class Recorded(type(unet)):
        def __getitem__(self, key):
            events.append(key)
            return unet[key]

    recorded = replace(stored, tensors={"unet": Recorded(unet.specs, None)})
    cast = lambda leaf: jnp.bfloat16 if leaf.ndim > 1 else np.float32  # noqa: E731
    params = read_params(recorded, "unet", abstract, cast, put)
    assert jax.tree.structure(params) == jax.tree.structure(abstract)
    assert [type(event) for event in events] == [str, tuple] * len(unet), "each is put before the next is read"
    assert {event for event in events if type(event) is tuple} == {("float32", 1), ("bfloat16", 2), ("bfloat16", 4)}
    mapped = jax.tree.leaves(read_params(stored, "unet", abstract))
    assert not any(leaf.flags.owndata or leaf.flags.writeable for leaf in mapped), "they are views of the file"


def test_a_checkpoint_is_read_in_groups_each_once(formats, model, monkeypatch):
    monkeypatch.setattr(orbax_tree, "GROUP_BYTES", 60_000)
    read, sizes = orbax_tree.read_leaves, []

    def counted(*arguments):
        leaves = read(*arguments)
        sizes.append(sum(leaf.nbytes for leaf in leaves.values()))
        return leaves

    monkeypatch.setattr(orbax_tree, "read_leaves", counted)
    opened = open_model(formats["orbax"])
    assert compute_digests(opened) == compute_digests(open_model(model))
    total = sum(spec.nbytes for part in opened.tensors.values() for spec in part.specs.values())
    assert sum(sizes) == total and len(sizes) > 6


def test_published_configs_have_no_tensors():
    stored = published("lcm-sdxl")
    assert stored.family == "sdxl" and stored.configs == FAMILIES["lcm-sdxl"]
    assert stored.tensors.keys() == {"unet", "vae", "text_encoder", "text_encoder_2"}
    with pytest.raises(ModelError, match="the published configs of lcm-sdxl have no weights; use a model"):
        read_params(stored, "vae", {"conv": {"bias": jax.ShapeDtypeStruct((3,), np.float32)}})
    with pytest.raises(ModelError, match="family 'sd9' is not supported; use one of sd15"):
        published("sd9")


def test_a_stored_model_does_not_change(formats, model):
    file, base = open_model(formats["ldm"]), open_model(model)
    configs = json.dumps([dict(file.configs), dict(base.configs)])
    merged = merge_base(file, base)
    assert merged.tokenizer == base.tokenizer and file.tokenizer is None
    assert json.dumps([dict(file.configs), dict(base.configs)]) == configs
    with pytest.raises(FrozenInstanceError):
        file.family = "sdxl"


def test_convert_is_a_function(formats, model, tmp_path):
    lines: list[str] = []
    digests = convert(formats["ldm"], None, None, dry_run=True, log=lines.append)
    assert digests == compute_digests(open_model(model)) and lines[0].endswith(
        "m.safetensors: sd1, predicts v_prediction"
    )
    target = tmp_path / "half.safetensors"
    half = convert(model, target, "ldm", component="vae", dtype="float16", log=lines.append)
    assert half.keys() == {"vae"} and half["vae"] != digests["vae"] and target.is_file()
    for arguments, message in [
        (("nowhere", tmp_path / "a", "diffusers"), "there is no model 'nowhere'"),
        ((model, tmp_path / "a", "onnx"), "format 'onnx' is not supported; use one of diffusers, ldm, orbax"),
        ((model, None, "ldm"), "target is missing"),
        ((model, target, "ldm"), r"exists already; .*overwrite=True"),
    ]:
        with pytest.raises(ModelError, match=message):
            convert(*arguments, log=lines.append)
    assert command.FORMATS == FORMATS
