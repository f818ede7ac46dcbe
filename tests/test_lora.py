"""LoRA files in both namings, and what they do to a model."""

import json

import numpy as np
import pytest
from small_lora import CROSS, assert_same, base, example

from lcm_jax.weights import lora as loras
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.lora import LoRA


@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_both_namings_and_back_are_bit_identical(dtype, alpha):
    lora = example(dtype, alpha)
    kohya, metadata = loras.to_kohya(lora)
    assert loras.is_lora(kohya) and loras.detect_naming(kohya) == "kohya"
    assert f"lora_unet_{CROSS.replace('.', '_')}_to_out_0.lora_down.weight" in kohya
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight" in kohya
    again = loras.read_lora(kohya, metadata, base())
    assert_same(again, lora)
    peft, metadata = loras.to_peft(again)
    assert loras.is_lora(peft) and loras.detect_naming(peft) == "peft"
    assert f"unet.{CROSS}.to_k.lora_A.weight" in peft
    for model in (None, base()):  # PEFT's names are whole
        assert_same(loras.read_lora(peft, metadata, model), lora)
    assert loras.to_kohya(loras.read_lora(peft, metadata))[0].keys() == kohya.keys()


def test_the_settings_for_peft_name_what_differs():
    settings = json.loads(loras.to_peft(example())[1]["lora_adapter_metadata"])
    assert (settings["unet.r"], settings["unet.lora_alpha"]) == (2, 3.0)
    assert list(settings["unet.rank_pattern"].values()) == [4]
    assert list(settings["unet.alpha_pattern"].values()) == [1.5]
    assert settings["text_encoder.target_modules"] == ["encoder.layers.0.mlp.fc1", "encoder.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize(
    "name", ["{m}.to_q.lora.{d}.weight", "{m}.to_q.lora_linear_layer.{d}.weight", "{m}.processor.to_q_lora.{d}.weight"]
)
def test_old_names_of_diffusers_are_read(name):
    update = example(alpha=None).updates["unet"][f"{CROSS}.to_q"]
    tensors = {f"unet.{name.format(m=CROSS, d=d)}": getattr(update, d) for d in ("down", "up")}
    found = loras.read_lora(tensors, base=base())
    assert found.updates["unet"][f"{CROSS}.to_q"].scale == 1.0


def test_names_of_the_single_file_are_read():
    unet = base()["unet"]
    table = loras.module_names("unet", unet, "sdxl")
    assert table["input_blocks_1_1_transformer_blocks_0_attn2_to_k"] == f"{CROSS}.to_k"
    update = example().updates["unet"][f"{CROSS}.to_k"]
    name = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k"
    tensors = {
        f"{name}.lora_down.weight": update.down,
        f"{name}.lora_up.weight": update.up,
        f"{name}.alpha": update.alpha,
    }
    assert list(loras.read_lora(tensors, base=base(), family="sdxl").updates["unet"]) == [f"{CROSS}.to_k"]


def test_merging_adds_every_adapter_at_its_weight_and_leaves_the_model():
    model, lora = base(), example(np.float32)
    before = {key: tensor.copy() for key, tensor in model["unet"].items()}
    merged = loras.merge(model, [(lora, 0.5), (lora, 0.25)])
    for component, tensors in model.items():
        for key, tensor in tensors.items():
            update = lora.updates[component].get(key.removesuffix(".weight"))
            if update is None:
                assert merged[component][key] is tensor
                continue
            up, down = update.up.astype(np.float64), update.down.astype(np.float64)
            scale = 0.75 * float(update.alpha) / len(down)
            product = np.einsum("or,r...->o...", up.reshape(len(up), -1), down)
            np.testing.assert_allclose(merged[component][key], tensor + scale * product, rtol=1e-4, atol=1e-5)
    for key, tensor in model["unet"].items():
        assert tensor.tobytes() == before[key].tobytes()
    half = {"unet": {key: tensor.astype(np.float16) for key, tensor in model["unet"].items()}}
    with pytest.raises(ModelError, match=r"5 tensors overflow in float16: (unet\.\S+,? ?){5}; use a smaller"):
        loras.merge(half | {"text_encoder": model["text_encoder"]}, [(lora, 1e6)])
    one = LoRA({"unet": {f"{CROSS}.to_q": lora.updates["unet"][f"{CROSS}.to_q"]}}, {})
    with pytest.raises(ModelError, match=rf"1 tensor overflows in float16: unet.{CROSS}.to_q.weight; use"):
        loras.merge(half, [(one, 1e6)])


# ---- what cannot be read --------------------------------------------------------------------------------------------


def test_a_lora_of_another_family_is_named():
    kohya, metadata = loras.to_kohya(example())
    with pytest.raises(ModelError, match="1 of 7 modules of this LoRA have another shape .*width 12, the model to 16"):
        loras.read_lora(kohya, metadata, base(width=16))
    other = {key.replace("down_blocks_0", "down_blocks_2"): tensor for key, tensor in kohya.items()}
    with pytest.raises(ModelError, match="12 of 21 keys of this LoRA belong to no module of the model"):
        loras.read_lora(other, metadata, base())


@pytest.mark.parametrize(
    "key, message",
    [
        ("unet.a.dora_scale", "DoRA"),
        ("lora_unet_a.hada_w1_a", "LoHa"),
        ("unet.a.lokr_w1", "LoKr"),
        ("lora_unet_a.lora_mid.weight", "Tucker"),
    ],
)
def test_other_adapters_are_refused_by_name(key, message):
    with pytest.raises(ModelError, match=message):
        loras.read_lora({key: np.zeros((2, 2))}, base=base())


def test_half_an_update_no_rank_in_common_and_no_base():
    kohya, _ = loras.to_kohya(example())
    with pytest.raises(ModelError, match="pass the base model as base"):
        loras.read_lora(kohya)
    lost = next(key for key in kohya if key.endswith("lora_up.weight"))
    with pytest.raises(ModelError, match="has only down and alpha"):
        loras.read_lora({key: tensor for key, tensor in kohya.items() if key != lost}, base=base())
    with pytest.raises(ModelError, match="have no rank in common"):
        loras.read_lora(kohya | {lost: kohya[lost][:, :1]}, base=base())
    with pytest.raises(ModelError, match="no LoRA in it"):
        loras.read_lora({})
