"""Files of diffusers and transformers to parameter trees and back."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import reference_pipeline
import safetensors.numpy
from flax.traverse_util import flatten_dict

from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.pipeline import Pipeline
from lcm_jax.weights import diffusers_folder as folders
from lcm_jax.weights import layout, naming, trees
from lcm_jax.weights.errors import ModelError

torch = pytest.importorskip("torch")

NETWORKS = ("unet", "vae", "text_encoder")  # of the Stable Diffusion 1.x shape; SDXL's are in test_family_pipelines.py


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """The folder of a LatentConsistencyModelPipeline, written by diffusers."""
    folder = tmp_path_factory.mktemp("models")
    reference_pipeline.build(folder / "tokenizer", "lcm").save_pretrained(folder / "student")
    return folder / "student"


@pytest.fixture(scope="module")
def abstract(student):
    return StableDiffusion.from_configs(read_all(student)[0]).abstract_params()


@pytest.fixture
def copy(student, tmp_path):
    return shutil.copytree(student, tmp_path / "copy")


def read_all(folder, variant=None):
    """(configs, tensors) of every network, and the scheduler's config."""
    configs, tensors = {}, {}
    for name in NETWORKS:
        configs[name], tensors[name] = folders.read_component(folder, name, variant)
    configs["scheduler"] = layout.read_json(folder / "scheduler" / "scheduler_config.json")
    return configs, tensors


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and a[key].shape == b[key].shape, key
        assert a[key].tobytes() == b[key].tobytes(), key


def round_trip(folder, abstract, target, variant=None, **how):
    """Reads `folder`, writes `target`, and returns the tensors of both as they are in the files."""
    configs, tensors = read_all(folder, variant)
    params = {name: trees.to_params(name, tensors[name], abstract[name]) for name in NETWORKS}
    with folders.new_folder(target) as temporary:
        folders.write_pipeline(
            temporary,
            configs,
            params,
            folder / "tokenizer",
            configs["scheduler"],
            index=layout.read_index(folder),
            variant=variant,
            **how,
        )
    again_configs, again = read_all(target, variant)
    assert again_configs == configs
    return tensors, again


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_read_then_write_is_bit_identical(student, abstract, tmp_path, dtype, variant):
    # The folders are written by diffusers and transformers, from PyTorch's own half precision.
    folder = tmp_path / "theirs"
    shutil.copytree(student, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for name, network in reference_pipeline.networks(student=True).items():
        half = type(network)(network.config) if name == "text_encoder" else type(network).from_config(network.config)
        half.load_state_dict(network.state_dict())
        half.to(getattr(torch, dtype)).save_pretrained(folder / name, variant=variant)
    mine = tmp_path / "mine"
    theirs, again = round_trip(folder, abstract, mine, variant)
    for name in NETWORKS:
        assert {str(tensor.dtype) for tensor in theirs[name].values()} == {dtype}
        expected = {naming.modern_key(name, key): tensor for key, tensor in theirs[name].items()}
        assert_same_tensors(expected, again[name])
    suffix = f".{variant}" if variant else ""
    assert (mine / "unet" / f"diffusion_pytorch_model{suffix}.safetensors").is_file()
    assert (mine / "text_encoder" / f"model{suffix}.safetensors").is_file()
    assert files_of(folder / "tokenizer") == files_of(mine / "tokenizer")
    assert json.loads((mine / "model_index.json").read_text()) == json.loads((student / "model_index.json").read_text())


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded_files_both_ways(student, abstract, tmp_path, variant):
    networks = reference_pipeline.networks(student=True)
    folder = tmp_path / "theirs"
    shutil.copytree(student, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for name, network in networks.items():
        network.save_pretrained(folder / name, variant=variant, max_shard_size="20KB")
    assert len(list((folder / "unet").glob("*-of-*"))) > 2

    mine = tmp_path / "mine"
    theirs, again = round_trip(folder, abstract, mine, variant, max_shard_bytes=20_000)
    for name in NETWORKS:
        expected = {naming.modern_key(name, key): tensor for key, tensor in theirs[name].items()}
        assert_same_tensors(expected, again[name])
    shards = list((mine / "unet").glob("*-of-*"))
    assert len(shards) > 2 and all(path.stat().st_size < 40_000 for path in shards)

    # Other readers find the shards by the names that we give them.
    for name, network in networks.items():
        loaded = type(network).from_pretrained(mine / name, variant=variant).state_dict()
        for key, tensor in network.state_dict().items():
            assert torch.equal(tensor, loaded[key]), key


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_bin_files_are_read_where_there_are_no_safetensors(copy, tmp_path, variant, shards):
    middle = f".{variant}" if variant else ""
    expected = read_all(copy)[1]
    for name in NETWORKS:
        stem = "pytorch_model" if name == "text_encoder" else "diffusion_pytorch_model"
        (copy / name / f"{layout.FILES[name]}.safetensors").unlink()
        state = {key: torch.from_numpy(tensor) for key, tensor in expected[name].items()}
        if shards == 1:
            torch.save(state, copy / name / f"{stem}{middle}.bin")
            continue
        placed = {key: f"{stem}{middle}-{i % shards + 1:05d}-of-00003.bin" for i, key in enumerate(state)}
        for file in set(placed.values()):
            torch.save({key: state[key] for key in state if placed[key] == file}, copy / name / file)
        index = {"metadata": {}, "weight_map": placed}
        (copy / name / f"{stem}.bin.index{middle}.json").write_text(json.dumps(index))
    found = read_all(copy, variant)[1]
    for name in NETWORKS:
        assert_same_tensors(found[name], expected[name])
    pipe = Pipeline.from_pretrained(copy, variant=variant)
    assert np.array_equal(pipe.params["unet"]["conv_in"]["bias"], expected["unet"]["conv_in.bias"])

    # safetensors come first where both are there.
    other = {key: tensor + 1 for key, tensor in expected["unet"].items()}
    safetensors.numpy.save_file(other, copy / "unet" / f"diffusion_pytorch_model{middle}.safetensors")
    assert_same_tensors(folders.read_component(copy, "unet", variant)[1], other)


def rename_weights(folder, ending: str, variant: str | None, shards: bool, spelling: int = 0) -> None:
    """Rewrites the weights of a component under other names; spelling: of the index of a variant's shards."""
    whole = next(folder.glob("*.safetensors"))
    tensors, stem = safetensors.numpy.load_file(whole), whole.stem
    whole.unlink()
    stem = "pytorch_model" if (stem, ending) == ("model", "bin") else stem
    middle = f".{variant}" if variant else ""
    save = lambda part, name: (  # noqa: E731
        safetensors.numpy.save_file(part, folder / name, {"format": "pt"})
        if ending == "safetensors"
        else torch.save({key: torch.from_numpy(tensor) for key, tensor in part.items()}, folder / name)
    )
    if not shards:
        save(tensors, f"{stem}{middle}.{ending}")
        return
    names = [f"{stem}{middle}-0000{i}-of-00002.{ending}" for i in (1, 2)]
    if spelling == 2:
        names = [f"{stem}-0000{i}-of-00002{middle}.{ending}" for i in (1, 2)]
    placed = {key: names[i % 2] for i, key in enumerate(tensors)}
    for name in names:
        save({key: tensors[key] for key in tensors if placed[key] == name}, name)
    index = [
        f"{stem}.{ending}.index{middle}.json",
        f"{stem}{middle}.{ending}.index.json",
        f"{stem}.{ending}{middle}.index.json",
    ][spelling]
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": placed}))


MIXTURES = [  # by network: ending, variant, whether sharded, spelling of the index
    {"unet": ("safetensors", "fp16", False), "vae": ("safetensors", None, False), "text_encoder": ("bin", None, False)},
    {"unet": ("safetensors", None, True), "vae": ("bin", "fp16", False), "text_encoder": ("safetensors", "fp16", True)},
    {"unet": ("safetensors", "fp16", True), "vae": ("bin", None, False), "text_encoder": ("bin", "fp16", False)},
    {"unet": ("safetensors", "fp16", True, 2), "vae": ("safetensors", "fp16", False)},
    {"text_encoder": ("safetensors", "fp16", False)},
]


@pytest.mark.parametrize("mixture", MIXTURES)
def test_what_diffusers_loads_from_a_mixture_is_loaded(copy, mixture):
    """safetensors and .bin, whole and sharded, of which only some networks have the variant."""
    for part, how in mixture.items():
        rename_weights(copy / part, *how)
    theirs = reference_pipeline.diffusers.LatentConsistencyModelPipeline.from_pretrained(copy, variant="fp16")
    for part in NETWORKS:
        expected = {naming.modern_key(part, k): t.numpy() for k, t in getattr(theirs, part).state_dict().items()}
        expected.pop(None, None)
        found = folders.read_component(copy, part, "fp16")[1]
        assert_same_tensors({naming.modern_key(part, key): tensor for key, tensor in found.items()}, expected)


@pytest.mark.parametrize("spelling", [0, 1, 2])
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_every_spelling_of_an_index_is_read(copy, ending, spelling):
    for part in NETWORKS:
        expected = folders.read_component(copy, part)[1]
        rename_weights(copy / part, ending, "fp16", True, spelling)
        assert_same_tensors(folders.read_component(copy, part, "fp16")[1], expected)


def test_shards_and_whole_weights_in_one_folder(copy):
    """diffusers takes the shards of its networks, transformers the whole file of its own."""
    for part in NETWORKS:
        whole = next((copy / part).glob("*.safetensors"))
        content = whole.read_bytes()
        rename_weights(copy / part, "safetensors", None, True)
        tensors = {key: tensor + 1 for key, tensor in safetensors.numpy.load(content).items()}
        safetensors.numpy.save_file(tensors, whole, {"format": "pt"})
    theirs = reference_pipeline.diffusers.LatentConsistencyModelPipeline.from_pretrained(copy)
    for part, key in [("unet", "conv_in.bias"), ("text_encoder", "text_model.final_layer_norm.bias")]:
        state = {naming.modern_key(part, k): t.numpy() for k, t in getattr(theirs, part).state_dict().items()}
        found = {naming.modern_key(part, k): t for k, t in folders.read_component(copy, part)[1].items()}
        np.testing.assert_array_equal(found[key], state[key])


def test_a_hub_model_of_mixed_variants_gives_its_files():
    names = {
        "unet": ["config.json", "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"],
        "vae": ["config.json", "diffusion_pytorch_model.safetensors"],
        "text_encoder": ["config.json", "pytorch_model.bin"],
    }
    files = ["model_index.json", *(f"{part}/{name}" for part, each in names.items() for name in each)]
    needed = layout.needed_files("m", files, "fp16")
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in needed
    assert "unet/diffusion_pytorch_model.safetensors" not in needed
    assert {"vae/diffusion_pytorch_model.safetensors", "text_encoder/pytorch_model.bin"} <= set(needed)
    with pytest.raises(ModelError, match="no weights of the unet in the variant bf16"):
        layout.needed_files("m", files, "bf16")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_json_in_the_encodings_of_windows_is_read(copy, encoding):
    path = copy / "unet" / "config.json"
    expected = layout.read_json(path)
    path.write_text(json.dumps(expected | {"_note": "ä"}, ensure_ascii=False), encoding=encoding)
    assert layout.read_json(path) == expected | {"_note": "ä"}
    path.write_text(json.dumps({"_note": "ä"}, ensure_ascii=False), encoding="latin-1")
    with pytest.raises(ModelError, match="unet/config.json is not UTF-8 .*at byte 11.*; save it as UTF-8"):
        layout.read_json(path)


def test_bfloat16_and_not_a_numbers_keep_their_bits(tmp_path):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**16, (5, 7), np.uint16)  # all sorts of numbers, infinities and payloads of NaN among them
    params = {"layer": {"kernel": bits.view(ml_dtypes.bfloat16), "bias": bits[0].view(np.float16)}}
    folders.write_component(tmp_path, "unet", {}, params)
    tensors = folders.read_component(tmp_path, "unet")[1]
    assert tensors["layer.weight"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(tensors["layer.weight"].view(np.uint16), bits.T)
    again = trees.to_params("unet", tensors, params)
    np.testing.assert_array_equal(again["layer"]["kernel"].view(np.uint16), bits)
    np.testing.assert_array_equal(again["layer"]["bias"].view(np.uint16), bits[0])


def test_every_key_has_a_path_and_comes_back(abstract):
    for tree in abstract.values():
        for path, leaf in flatten_dict(tree).items():
            assert naming.to_path(naming.to_key(path), len(leaf.shape)) == path
    keys = [
        "down_blocks.0.resnets.1.conv1.weight",
        "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.weight",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight",
        "time_embedding.linear_1.weight",
        "time_embedding.cond_proj.weight",
        "encoder.mid_block.attentions.0.to_out.0.bias",
        "quant_conv.weight",
        "text_model.embeddings.token_embedding.weight",
        "text_model.encoder.layers.11.layer_norm2.weight",
    ]
    for key in keys:
        assert naming.to_key(naming.to_path(key, 2)) == key
    assert naming.to_path(keys[0], 4) == ("down_blocks_0", "resnets_1", "conv1", "kernel")
    assert naming.to_path(keys[3], 2) == ("time_embedding", "linear_1", "kernel")
    assert naming.to_path(keys[7], 2)[-1] == "embedding"
    assert naming.to_path(keys[8], 1)[-1] == "scale"


def test_old_names_are_read_and_the_present_ones_written(student, abstract, tmp_path):
    """Stable Diffusion 1.x: query, key, value, proj_attn; position_ids; keys with and without `text_model.`"""
    configs, tensors = read_all(student)
    to_old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, tensor in tensors["vae"].items():
        for new, name in to_old.items():
            key = key.replace(f"mid_block.attentions.0.{new}.", f"mid_block.attentions.0.{name}.")
        old[key] = tensor
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in old
    params = trees.to_params("vae", old, abstract["vae"])
    assert_same_tensors(trees.from_params(params), tensors["vae"])

    bare = {key.removeprefix("text_model."): tensor for key, tensor in tensors["text_encoder"].items()}
    full = {f"text_model.{key}": tensor for key, tensor in bare.items()}
    for stored in (bare, full):
        stored = stored | {"text_model.embeddings.position_ids": np.arange(12)[None]}
        params = trees.to_params("text_encoder", stored, abstract["text_encoder"])
        assert_same_tensors(trees.from_params(params), full)


def test_all_wrong_keys_in_one_error(student, abstract):
    tensors = read_all(student)[1]["unet"]
    shape = list(tensors["conv_in.weight"].shape)
    broken = dict(tensors)
    del broken["conv_out.bias"], broken["time_embedding.linear_1.weight"]
    broken["extra.0.weight"] = np.zeros((2, 3), np.float32)
    broken["conv_in.weight"] = np.zeros((9, *shape[1:]), np.float32)
    broken["mid_block.resnets.0.norm1.weight"] = np.zeros(5, np.float32)
    broken["mid_block.resnets.0.norm1.bias"] = broken["mid_block.resnets.0.norm1.bias"].astype(np.float64)
    with pytest.raises(ModelError) as caught:
        trees.to_params("unet", broken, abstract["unet"], "some/folder")
    first, second = str(caught.value).splitlines()
    assert first.startswith("unet of some/folder") and "(2 keys missing -, 1 extra +, 3 of another shape" in first
    assert second.split("; ") == [
        "- conv_out.bias",
        "- time_embedding.linear_1.weight",
        "+ extra.0.weight float32[2, 3]",
        f"! conv_in.weight {[9, *shape[1:]]}, which should be {shape}",
        "! mid_block.resnets.0.norm1.bias float64, which is not one of float32, bfloat16, float16",
        "! mid_block.resnets.0.norm1.weight [5], which should be [16]",
    ]
    with pytest.raises(ModelError, match=r"\d+ more -$") as caught:
        trees.to_params("unet", {}, abstract["unet"])
    assert len(str(caught.value).splitlines()) == 2 and len(str(caught.value)) < 1000


def test_a_key_twice_under_two_names_is_extra(student, abstract):
    tensors = read_all(student)[1]["vae"]
    name = "encoder.mid_block.attentions.0.query.weight"
    twice = tensors | {name: np.ones((16, 16), np.float32)}
    with pytest.raises(ModelError, match=f"1 extra(.|\n)*{name}"):
        trees.to_params("vae", twice, abstract["vae"])


def test_a_narrower_type_is_written_on_request(student, tmp_path):
    _, tensors = read_all(student)
    params = {"conv_in": {"bias": tensors["unet"]["conv_in.bias"]}}
    folders.write_component(tmp_path, "unet", {}, params, dtype="bfloat16")
    stored = folders.read_component(tmp_path, "unet")[1]["conv_in.bias"]
    assert stored.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(stored, tensors["unet"]["conv_in.bias"].astype(ml_dtypes.bfloat16))
    huge = {"norm": {"bias": np.full(3, 1e6, np.float32)}}
    with pytest.raises(ModelError, match="norm.bias; use bfloat16"):
        trees.from_params(huge, "float16")
    with pytest.raises(ModelError, match="dtype is 'int8'; choose"):
        trees.from_params(huge, "int8")


# --- files that cannot be read ---


@pytest.mark.parametrize("size", [0, 5, 100, -8])
def test_a_truncated_file_is_named(copy, size):
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelError, match="truncated or not a safetensors file") as caught:
        folders.read_component(copy, "unet")
    assert str(path) in str(caught.value) and "copy it again" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_file_a_missing_variant_and_broken_json(copy):
    with pytest.raises(ModelError, match=r"model.fp16.safetensors is missing .*contains config.json, model"):
        folders.read_component(copy, "text_encoder", "fp16")
    shutil.rmtree(copy / "vae")
    with pytest.raises(ModelError, match="has no vae/ folder"):
        folders.read_component(copy, "vae")
    with pytest.raises(ModelError, match="there is no folder .*copy/export; use one that has a vae/ folder"):
        folders.read_component(copy / "export", "vae")
    (copy / "unet" / "config.json").write_text('{"sample_size": ')
    with pytest.raises(ModelError, match="unet/config.json is not valid JSON"):
        folders.read_component(copy, "unet")
    (copy / "unet" / "config.json").unlink()
    with pytest.raises(ModelError, match="unet/config.json is missing"):
        folders.read_component(copy, "unet")


def test_a_shard_is_missing_or_lacks_a_tensor(tmp_path):
    def index(**placed):
        (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))

    safetensors.numpy.save_file({"a": np.ones(2)}, tmp_path / "m-00001-of-00002.safetensors")
    index(a="m-00001-of-00002.safetensors", b="m-00001-of-00002.safetensors")
    with pytest.raises(ModelError, match="promises 1 tensor that its shards lack: 'b'"):
        folders.read_tensors(tmp_path, "m")
    index(a="m-00001-of-00002.safetensors", b="m-00002-of-00002.safetensors")
    with pytest.raises(ModelError, match="names the shard .m-00002-of-00002.safetensors., which is missing"):
        folders.read_tensors(tmp_path, "m")
    index(a="../m-00001-of-00002.safetensors")
    with pytest.raises(ModelError, match="outside its folder"):
        folders.read_tensors(tmp_path, "m")


def test_locate(student, tmp_path, monkeypatch):
    assert layout.locate(student) == layout.locate(str(student)) == student
    with pytest.raises(ModelError, match="no model 'shape-lcm': did you mean 'shapes-lcm'"):
        layout.locate("shape-lcm")
    with pytest.raises(ModelError, match="no model 'some/where/else': use a model"):
        layout.locate("some/where/else")
    with pytest.raises(ModelError, match="has no model_index.json; use the top folder"):
        layout.locate(student / "unet")
    for name, what, base in [
        ("model.ckpt", "a file", " --base=BASE"),
        ("unet", "one network", " --base=BASE"),
        ("run", "orbax checkpoints", ""),
        ("run/checkpoints/3", "orbax checkpoints", ""),
    ]:
        (tmp_path / "run" / "checkpoints" / "3").mkdir(parents=True, exist_ok=True)
        (tmp_path / "model.ckpt").touch()
        shutil.copytree(student / "unet", tmp_path / "unet", dirs_exist_ok=True)
        with pytest.raises(ModelError) as caught:
            layout.locate(tmp_path / name)
        command = f"`python -m lcm_jax.convert --input={tmp_path / name} --output=DIR --format=diffusers{base}`"
        assert str(caught.value).startswith(f"{tmp_path / name} is {what}, ") and command in str(caught.value)
    assert layout.locate(tmp_path / "unet", allow_single_network=True) == tmp_path / "unet"
    monkeypatch.setattr(layout, "ASSETS", tmp_path)
    with pytest.raises(ModelError, match="bundled model 'shapes-lcm' is not at"):
        layout.locate("shapes-lcm")


@pytest.mark.parametrize(
    "name, entry, message",
    [
        ("unet", ["diffusers", "UNet3DConditionModel"], "unet is 'UNet3DConditionModel'; only UNet2DConditionModel"),
        ("text_encoder_2", ["transformers", "CLIPTextModelWithProjection"], "tokenizer_2 is None; only CLIPTokenizer"),
        ("controlnet", ["diffusers", "ControlNetModel"], "with controlnet is not supported"),
        ("vae", None, "vae is None; only AutoencoderKL"),
    ],
)
def test_another_kind_of_model_is_refused(copy, name, entry, message):
    path = copy / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: entry}))
    with pytest.raises(ModelError, match=message):
        layout.read_index(copy)


# --- writing ---


def test_nothing_is_written_over_unless_asked(copy, tmp_path):
    before = files_of(copy)
    with pytest.raises(ModelError, match="exists already"), folders.new_folder(copy):
        pass
    assert files_of(copy) == before
    with folders.new_folder(copy, overwrite=True) as temporary:
        (temporary / "new").write_text("new")
    assert files_of(copy) == {"new": b"new"}
    with pytest.raises(ModelError, match="is not a model folder"), folders.new_folder(copy, overwrite=True):
        pass
    assert files_of(copy) == {"new": b"new"}
    with pytest.raises(ModelError, match="is a file"), folders.new_folder(copy / "new", overwrite=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_full_disk_leaves_what_was_there(copy, tmp_path):
    """The system itself refuses: no file may grow beyond 20 kB."""
    before = files_of(copy)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        with pytest.raises(ModelError, match="File too large.*untouched. Free some space"):
            with folders.new_folder(copy, overwrite=True) as temporary:
                folders.write_component(temporary, "vae", {}, {"a": {"bias": np.ones(20_000, np.float32)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert files_of(copy) == before
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize("code, advice", [(errno.EACCES, "Choose another place"), (errno.ENOSPC, "Free some space")])
def test_only_a_full_disk_wants_space(copy, code, advice):
    before = files_of(copy)
    with pytest.raises(ModelError, match=f"{os.strerror(code)}.*what was there is untouched. {advice}"):
        with folders.new_folder(copy, overwrite=True):
            raise OSError(code, os.strerror(code))
    assert files_of(copy) == before


def test_a_link_to_a_folder_stays_a_link(copy, tmp_path):
    (tmp_path / "link").symlink_to(copy)
    with folders.new_folder(tmp_path / "link", overwrite=True) as temporary:
        (temporary / "new").write_text("new")
    assert (tmp_path / "link").is_symlink() and files_of(copy) == {"new": b"new"}


def test_components_that_are_not_written_become_null(student, abstract, tmp_path):
    folder = shutil.copytree(student, tmp_path / "theirs")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    (folder / "model_index.json").write_text(json.dumps(index))
    round_trip(folder, abstract, tmp_path / "mine")
    written = json.loads((tmp_path / "mine" / "model_index.json").read_text())
    assert written["safety_checker"] == [None, None] and written["requires_safety_checker"] is False
    assert written["unet"] == ["diffusers", "UNet2DConditionModel"]


def test_what_comes_to_a_folder_after_its_removal_goes_with_the_process(tmp_path):
    code = (
        "import pathlib, sys; from lcm_jax.files import remove; folder = pathlib.Path(sys.argv[1]); "
        "folder.mkdir(); remove(folder); folder.mkdir(); (folder / 'late').touch()"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "part"], check=True, timeout=100)
    assert not (tmp_path / "part").exists()
