"""Single files that hold a part of a model, under whatever keys, ending and dtype, and what their metadata say."""

import json
import shutil
import struct

import ml_dtypes
import numpy as np
import pytest
from reference_single_file import SMALL, build, components, published
from safetensors.numpy import load_file, save_file

from lcm_jax.models.families import FAMILIES
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.weights import diffusers_folder as folders
from lcm_jax.weights import trees
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.model import StoredModel, merge_base, open_file
from lcm_jax.weights.single_file import left_out, to_diffusers, to_ldm
from lcm_jax.weights.single_file_configs import infer_configs
from lcm_jax.weights.single_file_family import detect_family

torch = pytest.importorskip("torch")


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert (a[key].dtype, a[key].shape, a[key].tobytes()) == (b[key].dtype, b[key].shape, b[key].tobytes()), key


def base(name: str) -> StoredModel:
    """A model of this name's configs, every number of which is 7."""
    tensors = {
        part: {key: np.full_like(tensor, 7) for key, tensor in each.items()} for part, each in components(name).items()
    }
    configs = SMALL[name] | {"scheduler": FAMILIES["sd15"]["scheduler"], "model_index": {}}
    return StoredModel("base", name.split()[0], configs, tensors, "tokenizer", {"_class_name": "Base"})


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_text_encoders_and_autoencoder_without_a_unet_are_all_read(name, tmp_path):
    parts = {part: each for part, each in components(name).items() if part != "unet"}
    save_file(to_ldm(parts, name), tmp_path / "m.safetensors")
    model = open_file(tmp_path / "m.safetensors")
    assert (model.family, model.left_out) == (name, ())
    assert model.tensors.keys() == model.configs.keys() == parts.keys()
    model = merge_base(model, base(name))
    for part, tensors in parts.items():
        assert_same_tensors(model.tensors[part], tensors)
    assert {float(tensor.max()) for tensor in model.tensors["unet"].values()} == {7.0}
    StableDiffusion.from_configs(model.configs)


def test_keys_without_a_place_are_listed():
    for name in ("sd1", "sd2", "sdxl"):
        file, extra = published(name)
        assert left_out(file, name) == list(extra)
        assert left_out(file | {"v_pred": np.zeros(0), "x.y": np.zeros(0)}, name) == [*extra, "x.y"]
    lone = {key: tensor for key, tensor in to_ldm({"vae": components("sd1")["vae"]}, "vae").items()}
    assert left_out(lone | {"loss.a": np.zeros(1)}, "vae") == ["loss.a"]


@pytest.mark.parametrize(
    "name, part, family", [("lcm-sdxl", "unet", "sdxl"), ("sd21", "unet", "sd2"), ("sdxl", "vae", "vae")]
)
def test_a_network_with_diffusers_keys_in_full_size(name, part, family):
    """As SDXL-Lightning, DMD2 and the repaired autoencoder of SDXL are published."""
    with torch.device("meta"):
        shapes = {key: tuple(tensor.shape) for key, tensor in build(FAMILIES[name][part]).state_dict().items()}
    zeros = {key: np.broadcast_to(np.zeros((), np.float16), shape) for key, shape in shapes.items()}
    assert detect_family(shapes) == family
    config = infer_configs(shapes, family, "epsilon", 0.13025)[part]
    for option, value in FAMILIES[name][part].items():
        if option not in ("sample_size", "force_upcast"):
            assert config[option] == value, option
    found = to_diffusers(zeros, family)[part]
    assert {key: tensor.shape for key, tensor in found.items()} == shapes
    if part == "unet":
        with pytest.raises(ModelError, match="1 keys are unknown to or duplicated.*: odd.0.weight"):
            to_diffusers(zeros | {"odd.0.weight": np.zeros(1)}, family)


def widened() -> dict:
    """The UNet of the small sd1 model, reading a text of 768, by which a lone UNet is known."""
    unet = dict(components("sd1")["unet"])
    for key, tensor in unet.items():
        if "attn2.to_k" in key or "attn2.to_v" in key:
            unet[key] = np.resize(tensor, (len(tensor), 768))
    return unet


@pytest.mark.parametrize("layout", ["diffusers", "ldm"])
@pytest.mark.parametrize("ending", ["bin", "PTH", "SAFETENSORS", "ckpt"])
def test_a_lone_unet_takes_the_place_of_the_bases(layout, ending, tmp_path):
    unet = widened()
    file = unet if layout == "diffusers" else to_ldm({"unet": unet}, "sd1")
    path = tmp_path / f"unet.{ending}"
    if ending in ("SAFETENSORS", "ckpt"):  # the content says what it is, not the name
        save_file(file | {"v_pred": np.zeros(0, np.float32)}, path)
    else:
        torch.save({key: torch.from_numpy(tensor) for key, tensor in file.items()}, path)
    model = open_file(path)
    assert model.family == "sd1" and model.tensors.keys() == {"unet"} and not model.left_out
    rest = base("sd1")
    rest.configs["unet"] = rest.configs["unet"] | {"attention_head_dim": 4, "cross_attention_dim": 768}
    model = merge_base(model, rest)
    assert_same_tensors(model.tensors["unet"], unet)
    assert model.configs["unet"]["attention_head_dim"] == 4, "what the file does not say is the base's"
    assert {float(tensor.max()) for tensor in model.tensors["vae"].values()} == {7.0}
    velocity = ending in ("SAFETENSORS", "ckpt")
    assert model.configs["scheduler"]["prediction_type"] == ("v_prediction" if velocity else "epsilon")


# ---- metadata -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["modelspec.prediction_type", "modelspec.predict_key"])
def test_the_metadata_say_what_is_predicted(key, tmp_path):
    path = tmp_path / "m.safetensors"
    for value, mark, expected in [
        ("v", False, "v_prediction"),
        ("V", True, "v_prediction"),
        ("v_prediction", False, "v_prediction"),
        ("epsilon", False, "epsilon"),
        ("", True, "v_prediction"),
        ("", False, None),
    ]:
        marks = {"v_pred": np.zeros(0, np.float32)} if mark else {}
        save_file(to_ldm(components("sdxl"), "sdxl") | marks, path, {key: value})
        assert open_file(path).configs["scheduler"].get("prediction_type") == expected
        assert open_file(path, prediction_type="epsilon").configs["scheduler"]["prediction_type"] == "epsilon"
    for value, mark, message in [
        ("epsilon", True, f"v_pred is v_prediction, metadata {key} is epsilon; pass --prediction_type"),
        ("flow", False, f"metadata {key}='flow' is not supported; pass --prediction_type"),
    ]:
        marks = {"v_pred": np.zeros(0, np.float32)} if mark else {}
        save_file(to_ldm(components("sdxl"), "sdxl") | marks, path, {key: value})
        with pytest.raises(ModelError, match=message) as caught:
            open_file(path)
        assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1
        open_file(path, prediction_type="epsilon")


def test_ztsnr_counts_beside_v_pred_only():
    file = to_ldm(components("sdxl"), "sdxl") | {"ztsnr": np.zeros(0)}
    assert "rescale_betas_zero_snr" not in infer_configs(file, "sdxl")["scheduler"]
    assert infer_configs(file | {"v_pred": np.zeros(0)}, "sdxl")["scheduler"]["rescale_betas_zero_snr"] is True


# ---- float8, and files that are not what their name says -----------------------------------------------------------


def save_float8(path, tensors: dict) -> None:
    """safetensors of float8, whose writer for numpy does not know these types."""
    header, data = {}, b""
    for key, tensor in tensors.items():
        name = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float32": "F32"}[tensor.dtype.name]
        offsets = [len(data), len(data) + tensor.nbytes]
        header[key] = {"dtype": name, "shape": list(tensor.shape), "data_offsets": offsets}
        data += tensor.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_float8_is_read_as_float16_exactly(dtype, tmp_path):
    every = np.arange(256, dtype=np.uint8).view(dtype)
    save_float8(tmp_path / "m.safetensors", {"a": every.reshape(16, 16), "b": np.ones(2, np.float32)})
    torch_type = getattr(torch, np.dtype(dtype).name)
    torch.save({"a": torch.arange(256, dtype=torch.uint8).view(torch_type).reshape(16, 16)}, tmp_path / "m.bin")
    for name in ("m.safetensors", "m.bin"):
        tensors, _ = folders.open_file(tmp_path / name)
        assert tensors.specs["a"].dtype == tensors["a"].dtype == np.float16
        np.testing.assert_array_equal(tensors["a"].reshape(-1).astype(np.float64), every.astype(np.float64))
    expected = torch.load(tmp_path / "m.bin")["a"].to(torch.float16).numpy()
    np.testing.assert_array_equal(tensors["a"], expected)
    save_float8(tmp_path / "s.safetensors", {"x.weight": every, "x.scale_weight": np.ones(1, np.float32)})
    with pytest.raises(ModelError, match=r"s.safetensors has float8 weights with scales .*\(x.scale_weight\)"):
        folders.open_file(tmp_path / "s.safetensors")


def test_another_dtype_is_one_clear_error():
    with pytest.raises(ModelError, match="! conv.weight int32, which is not one of float32, bfloat16, float16"):
        abstract = {"conv": {"kernel": np.zeros((2, 3), np.float32)}}
        trees.to_params("unet", {"conv.weight": np.zeros((3, 2), np.int32)}, abstract)


def test_the_content_counts_not_the_ending(tmp_path):
    expected = {"a": np.arange(6, dtype=np.float32)}
    save_file(expected, tmp_path / "m.safetensors")
    torch.save({"a": torch.arange(6.0)}, tmp_path / "m.bin")
    torch.save({"a": torch.arange(6.0)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for name in ("m.safetensors", "m.bin", "old.bin"):
        for ending in (".safetensors", ".SAFETENSORS", ".ckpt", ".CKPT", ".bin", ".pt", ""):
            copy = shutil.copy(tmp_path / name, tmp_path / f"copy{ending}")
            assert_same_tensors(dict(folders.open_file(tmp_path / copy)[0]), expected)
    assert load_file(tmp_path / "m.safetensors").keys() == {"a"}
    for content, message in [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a pointer of Git LFS"),
        (b"<html><body>404</body></html>", "is truncated or not a safetensors file"),
        (b"", "is truncated or not a safetensors file"),
        (b"PK\x03\x04", "is truncated or not a torch.save file"),
    ]:
        (tmp_path / "odd.bin").write_bytes(content)
        with pytest.raises(ModelError, match=f"odd.bin {message}") as caught:
            folders.open_file(tmp_path / "odd.bin")
        assert len(str(caught.value).splitlines()) == 1
