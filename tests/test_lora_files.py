"""Adapters of a UNet as files: written in both namings, compared, and read again to train them further."""

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_lora import assert_same

import lcm_jax
from lcm_jax import conversion
from lcm_jax.models import lora as adapter_trees
from lcm_jax.models.lora import LoRASettings
from lcm_jax.models.unet import UNet2DCondition
from lcm_jax.weights import layout, lora_files, trees
from lcm_jax.weights import lora as loras
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.lora import LoRA, Update

CONFIG = {
    "block_out_channels": (8,),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
SETTINGS = LoRASettings(rank=4, alpha=3.0, targets=("to_q", "to_out.0", "conv1", "proj_in"))
PEFT, KOHYA = "pytorch_lora_weights.safetensors", "kohya.safetensors"


def unet(width=12):
    network = UNet2DCondition.from_config(CONFIG | {"cross_attention_dim": width})
    inputs = np.zeros((1, 4, 4, 4)), np.zeros(1), np.zeros((1, 1, width))
    return jax.eval_shape(lambda: network.init(jax.random.key(0), *inputs)["params"])


PARAMS = unet()
RNG = np.random.default_rng(0)
ADAPTERS = jax.tree.map(
    lambda leaf: RNG.normal(size=leaf.shape).astype(np.float32),
    jax.eval_shape(lambda: adapter_trees.init(jax.random.key(0), PARAMS, SETTINGS)),
)
BASE = {"unet": trees.from_params(PARAMS).specs}


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_updates_and_back_are_bit_identical():
    updates = lora_files.to_updates(ADAPTERS, 3.0)
    conv = updates["mid_block.resnets.0.conv1"]
    assert (conv.down.shape, conv.up.shape) == ((4, 8, 3, 3), (8, 4, 1, 1)) and conv.scale == 0.75
    loras.check(LoRA({"unet": updates}, {}), BASE)
    same(lora_files.to_adapters(updates, PARAMS), ADAPTERS)
    # Of 1 x 1 convolutions, people also store matrices.
    name = "mid_block.attentions.0.proj_in"
    flat = updates[name]._replace(down=updates[name].down[:, :, 0, 0], up=updates[name].up[:, :, 0, 0])
    same(lora_files.to_adapters(updates | {name: flat}, PARAMS), ADAPTERS)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_both_files_are_read_again(dtype, tmp_path):
    folder = tmp_path / "runs" / "export"
    lora_files.write_adapters(folder, ADAPTERS, 3.0, dtype)
    assert sorted(path.name for path in folder.iterdir()) == [KOHYA, PEFT]
    kohya, wanted = load_file(folder / KOHYA), np.dtype(getattr(ml_dtypes, dtype, dtype))
    assert {tensor.dtype for key, tensor in kohya.items() if not key.endswith("alpha")} == {wanted}
    assert {float(tensor) for key, tensor in kohya.items() if key.endswith("alpha")} == {3.0}
    expected = jax.tree.map(lambda leaf: leaf.astype(wanted).astype(np.float32), ADAPTERS)
    for path in (folder / KOHYA, folder / PEFT, folder, folder.parent):
        same(lora_files.read_adapters(path, PARAMS, SETTINGS), expected)
    assert_same(loras.open_lora(folder / KOHYA, BASE), loras.open_lora(folder / PEFT))


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = tmp_path / "export"
    lora_files.write_adapters(folder, ADAPTERS, 3.0)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    unchanged = lambda: {path.name: path.read_bytes() for path in folder.iterdir()} == before  # noqa: E731
    with pytest.raises(ModelError, match="exists already; use another folder"):
        lora_files.write_adapters(folder, ADAPTERS, 3.0)
    write = lora_files.write_safetensors

    def one_bit(path, tensors, metadata):
        key = sorted(tensors)[-1]
        write(path, tensors | {key: np.nextafter(tensors[key], np.float32(9))}, metadata)

    monkeypatch.setattr(lora_files, "write_safetensors", one_bit)
    with pytest.raises(
        ModelError, match="verification of pytorch_lora_weights.safetensors failed for unet.up_blocks.0"
    ):
        lora_files.write_adapters(folder, ADAPTERS, 3.0, overwrite=True)
    assert unchanged() and [path.name for path in tmp_path.iterdir()] == ["export"]
    monkeypatch.undo()
    large = jax.tree.map(lambda leaf: 1e6 * leaf, ADAPTERS)
    for adapters, dtype, message in [
        (large, "float16", r"\d+ tensors overflow in float16: .*; use bfloat16 or float32"),
        (jax.tree.map(lambda leaf: np.nan * leaf, ADAPTERS), "float32", "have NaN or infinity.*training has diverged"),
        (ADAPTERS, "int8", "dtype is 'int8'; choose one of float32, bfloat16, float16"),
    ]:
        with pytest.raises(ModelError, match=message):
            lora_files.write_adapters(folder, adapters, 3.0, dtype, overwrite=True)
        assert unchanged()
    lora_files.write_adapters(folder, large, 3.0, overwrite=True)
    assert not unchanged()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rank": 2}, r"has rank 4 in \S+, and lora.rank is 2; set both the same"),
        ({"alpha": 4.0}, r"has alpha 3 in \S+, and lora.alpha is 4; set both the same"),
        ({"targets": (*SETTINGS.targets, "conv2")}, r"lacks \d of the modules of lora.targets: .*conv2"),
        ({"targets": SETTINGS.targets[1:]}, r"has also \d of the modules .*to_q.*; set lora.targets"),
    ],
)
def test_adapters_that_do_not_fit_the_settings(settings, message, tmp_path):
    lora_files.write_adapters(tmp_path / "export", ADAPTERS, 3.0)
    given = {"rank": 4, "alpha": 3.0, "targets": SETTINGS.targets} | settings
    with pytest.raises(ModelError, match=message) as caught:
        lora_files.read_adapters(tmp_path / "export", PARAMS, LoRASettings(**given))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_adapters_of_another_model_of_text_encoders_and_of_none(tmp_path):
    settings = LoRASettings(rank=4, alpha=3.0, targets=("attn2.to_k",))
    shapes = jax.eval_shape(lambda: adapter_trees.init(jax.random.key(0), PARAMS, settings))
    lora_files.write_adapters(tmp_path / "a", jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes), 3.0)
    with pytest.raises(
        ModelError, match=r"a: 4 of 4 modules .* of width 12, the model to 16; use the base it was trained"
    ):
        lora_files.read_adapters(tmp_path / "a", unet(16), settings)
    update = Update(np.ones((4, 6), np.float32), np.ones((6, 4), np.float32), np.asarray(3, np.float32))
    text = LoRA({"text_encoder": {"text_model.encoder.layers.0.self_attn.q_proj": update}}, {})
    for name, (tensors, metadata) in {"kohya": loras.to_kohya(text), "peft": loras.to_peft(text)}.items():
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata)
        with pytest.raises(
            ModelError, match="changes a text encoder .* which is not trained; use a LoRA of a UNet alone"
        ):
            lora_files.read_adapters(tmp_path / f"{name}.safetensors", PARAMS, SETTINGS)
    with pytest.raises(ModelError, match=r"there is no LoRA '.*none'; use a file, a folder.*\(shapes-lcm-lora\)"):
        lora_files.read_adapters(tmp_path / "none", PARAMS, SETTINGS)


def test_names_of_a_lora(tmp_path, monkeypatch):
    lora_files.write_adapters(tmp_path / "style" / "export", ADAPTERS, 3.0)
    file = tmp_path / "style" / "export" / PEFT
    for name in (tmp_path / "style", tmp_path / "style" / "export", file):
        assert loras.find_file(name) == file and loras.short_name(loras.find_file(name)) == "style"
    assert loras.short_name(file.with_name(KOHYA)) == "style" and loras.short_name(Path("a/b.safetensors")) == "b"
    with pytest.raises(ModelError, match=rf"has none of {PEFT}, adapter_model.safetensors, .*; use a LoRA file"):
        loras.find_file(tmp_path)
    # A bundled one, for the pipeline, for --lora and for convert.
    monkeypatch.setattr(layout, "ASSETS", tmp_path)
    with pytest.raises(ModelError, match="the bundled LoRA 'shapes-lcm-lora' is not at .*; install lcm_jax again"):
        loras.find_file("shapes-lcm-lora")
    (tmp_path / "style" / "export").rename(tmp_path / "shapes-lcm-lora")
    assert loras.short_name(loras.find_file("shapes-lcm-lora")) == "shapes-lcm-lora"
    assert loras.file_and_weight("shapes-lcm-lora:0.5") == (Path("shapes-lcm-lora"), 0.5)
    several = loras.files_and_weights(["a:0.8,b", "c:-1"])  # of an option that is given twice
    assert several == [(Path("a"), 0.8), (Path("b"), 1.0), (Path("c"), -1.0)]
    conversion.convert("shapes-lcm-lora", tmp_path / "peft.safetensors", "lora-peft", log=lambda _: None)
    assert_same(loras.open_lora(tmp_path / "peft.safetensors"), loras.open_lora(Path("shapes-lcm-lora")))
    with pytest.raises(ModelError, match="'shapes-lcm-lora' is a LoRA; use the model shapes, and add it with --lora"):
        lcm_jax.Pipeline.from_pretrained("shapes-lcm-lora")
    settings = json.loads(loras.read_file(Path("shapes-lcm-lora"))[1]["lora_adapter_metadata"])
    assert (settings["unet.r"], settings["unet.lora_alpha"]) == (4, 3.0)


def test_a_lora_is_recognized_by_the_header_of_its_file(tmp_path, monkeypatch):
    for name, key in (("a lora", "unet.conv_in.lora_A.weight"), ("a model", "conv_in.weight")):
        save_file({key: np.zeros((2**10, 2**10), np.float32)}, tmp_path / name)
    read = []
    monkeypatch.setattr(np, "memmap", lambda *arguments: read.append(arguments))
    assert conversion._is_lora(tmp_path / "a lora") and not conversion._is_lora(tmp_path / "a model")
    assert not read, "a tensor was mapped"
