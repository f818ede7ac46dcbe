"""Settings of LoRAs against PEFT itself, names that trainers write, and files that are damaged."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_lora import CROSS, TEXT, assert_same, base, example

from lcm_jax.weights import lora as loras
from lcm_jax.weights.errors import ModelError

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k = torch.nn.Linear(6, 5), torch.nn.Linear(6, 5)
        self.conv = torch.nn.Conv2d(4, 8, 3)


class Network(torch.nn.Module):
    """Modules of a UNet in name and kind."""

    def __init__(self):
        super().__init__()
        self.attn1, self.attn2 = Block(), Block()


SETTINGS = [
    {"r": 4, "lora_alpha": 32},
    {"r": 4, "lora_alpha": 3, "use_rslora": True},
    {"r": 4, "lora_alpha": 8, "rank_pattern": {"attn1.to_q": 2}, "alpha_pattern": {"to_k": 5, "attn2.to_q": 1}},
    {"r": 2, "lora_alpha": 2, "alpha_pattern": {"^attn1.to_k": 12, r"attn2\.to_k": 7, ".*conv": 3}},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_an_adapter_counts_as_in_peft(settings, ending, tmp_path):
    torch.manual_seed(0)
    network = Network().eval()
    before = {key: tensor.numpy().copy() for key, tensor in network.state_dict().items()}
    config = peft.LoraConfig(**settings, target_modules=["to_q", "to_k", "conv"], init_lora_weights=False)
    model = peft.get_peft_model(network, config)
    model.save_pretrained(tmp_path / "style", safe_serialization=True)
    expected = {key: tensor.numpy() for key, tensor in model.merge_and_unload().state_dict().items()}
    file = tmp_path / "style" / "adapter_model.safetensors"
    if ending == "bin":
        torch.save({k: torch.from_numpy(t) for k, t in load_file(file).items()}, file.with_suffix(".bin"))
        file.unlink()
        file = file.with_suffix(".bin")
    for path in (tmp_path / "style", file):
        lora = loras.open_lora(path, {"unet": before})
        merged = loras.merge({"unet": before}, [(lora, 1.0)])["unet"]
        assert merged.keys() == expected.keys()
        for key, tensor in expected.items():
            np.testing.assert_allclose(merged[key], tensor, rtol=1e-5, atol=1e-5, err_msg=key)
        assert np.abs(merged["attn2.to_k.weight"] - before["attn2.to_k.weight"]).max() > 0.1
    # What diffusers writes among the metadata of a file counts the same.
    whole = {f"unet.{key}": value for key, value in config.to_dict().items()}
    tensors = {key.replace("base_model.model.", "unet."): tensor for key, tensor in loras.read_file(file)[0].items()}
    text = json.dumps(whole, default=lambda value: sorted(value) if isinstance(value, set) else value.value)
    save_file(tensors, tmp_path / "unet.safetensors", {loras.METADATA: text})
    assert_same(loras.open_lora(tmp_path / "unet.safetensors", {"unet": before}), lora)


@pytest.fixture
def folder(tmp_path):
    """A PEFT folder of one module; returns (folder, write(settings))."""
    folder = tmp_path / "style"
    folder.mkdir()
    update = example().updates["unet"][f"{CROSS}.to_q"]
    name = f"base_model.model.{CROSS}.to_q"
    save_file(
        {f"{name}.lora_A.weight": update.down, f"{name}.lora_B.weight": update.up}, folder / "adapter_model.safetensors"
    )

    def write(**settings):
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 16, **settings}
        (folder / "adapter_config.json").write_text(json.dumps(settings))

    write()
    return folder, write


def test_the_strength_and_what_it_is_without(folder, tmp_path):
    folder, _ = folder
    assert loras.open_lora(folder, base()).updates["unet"][f"{CROSS}.to_q"].scale == 8.0
    alone = tmp_path / "adapter_model.safetensors"
    shutil.copy(folder / "adapter_model.safetensors", alone)
    with pytest.raises(ModelError, match="alpha is unknown: PEFT keeps it in adapter_config.json"):
        loras.open_lora(alone, base())
    with pytest.raises(
        ModelError, match="has none of pytorch_lora_weights.safetensors, adapter_model.* use a LoRA file, or a"
    ):
        loras.open_lora(tmp_path.parent, base())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"use_dora": True}, "use_dora=True is not supported; merge the LoRA with the tool that made it"),
        ({"bias": "all"}, "bias='all' is not supported; only none is"),
        ({"peft_type": "LOHA"}, "peft_type='LOHA' is not supported; only LORA is"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
        ({"modules_to_save": ["conv_in"]}, r"modules_to_save=\['conv_in'\] is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"unheard_of": 3}, "unheard_of=3 is not supported"),
        ({"r": 4}, "states rank 4 for .*to_q, its tensors have 2; use the settings that belong"),
        ({"r": "2"}, "r='2' is not supported; it must be an integer from 1"),
        ({"lora_alpha": None}, "lora_alpha=None is not supported; it must be a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan is not supported"),
        ({"use_rslora": "yes"}, "use_rslora='yes' is not supported; it must be true or false"),
        ({"alpha_pattern": {"to_q": [1]}}, "alpha_pattern=.* is not supported; it must be an object of numbers"),
        ({"alpha_pattern": {"(x+x+)+y": 1}}, "has the pattern .* which is not supported; use modules' names"),
        ({"rank_pattern": {"(": 1}}, r"has the pattern '\(', which is not supported"),
    ],
)
def test_what_would_change_the_weights_is_refused_by_name(folder, settings, message):
    folder, write = folder
    write(**settings)
    with pytest.raises(ModelError, match=message) as caught:
        loras.open_lora(folder, base())
    assert str(folder) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_what_changes_nothing_is_passed_over(folder):
    folder, write = folder
    write(
        use_dora=False, bias="none", modules_to_save=None, layers_to_transform=[1], future_option=None, loftq_config={}
    )
    assert loras.open_lora(folder, base()).updates["unet"][f"{CROSS}.to_q"].scale == 8.0


# ---- names and numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefixes", [("unet", "text_encoder"), ("lora_unet", "lora_te"), ("lora_unet", "lora_te1")])
def test_names_of_onetrainer_are_read(prefixes):
    lora = example()
    tensors = {}
    for prefix, (component, updates) in zip(prefixes, lora.updates.items(), strict=True):
        assert component == ("unet", "text_encoder")[prefix != prefixes[0]]
        for module, update in updates.items():
            name = f"{prefix}.{module}"
            tensors |= {f"{name}.lora_down.weight": update.down, f"{name}.lora_up.weight": update.up}
            tensors[f"{name}.alpha"] = update.alpha
    assert loras.is_lora(tensors) and f"{prefixes[1]}.{TEXT}.mlp.fc1.alpha" in tensors
    for model in (None, base()):
        assert_same(loras.read_lora(tensors, lora.metadata, model), lora)


@pytest.mark.parametrize(
    "key, message",
    [
        ("lora_unet_a.diff", "a full difference of weights"),
        ("lora_unet_a.diff_b", "a full difference of weights"),
        ("lora_unet_a.w_norm", "a full difference of norms"),
        ("lora_unet_a.b_norm", "a full difference of norms"),
        ("unet.a.lora_B.bias", "a LoRA with biases"),
    ],
)
def test_full_differences_are_refused_by_name(key, message):
    kohya, metadata = loras.to_kohya(example())
    with pytest.raises(ModelError, match=f"{key} belongs to {message}.*, which is not supported: merge it") as caught:
        loras.read_lora(kohya | {key: np.zeros((2, 2))}, metadata, base())
    assert len(str(caught.value).splitlines()) == 1


def test_nan_infinity_and_an_alpha_of_two_numbers_are_named(tmp_path):
    kohya, _ = loras.to_kohya(example())
    path = tmp_path / "style.safetensors"
    up = next(key for key in kohya if key.endswith("lora_up.weight"))
    alpha = next(key for key in kohya if key.endswith("alpha"))
    for key, tensor, message in [
        (up, np.full_like(kohya[up], np.nan), "contains NaN; use another file"),
        (up, np.full_like(kohya[up], np.inf), "contains infinity; use another file"),
        (alpha, np.ones(2, np.float32), r"has the shape \[2\], not one number; copy the file again"),
    ]:
        save_file(kohya | {key: tensor}, path)
        with pytest.raises(ModelError, match=f"{path}: {key} {message}") as caught:
            loras.read_file(path)
        assert len(str(caught.value).splitlines()) == 1
    save_file(kohya | {alpha: np.ones((1, 1), np.float32)}, path)
    assert loras.open_lora(path, base()).updates
    broken = base()
    broken["unet"][f"{CROSS}.to_q.weight"][0, 0] = np.nan
    with pytest.raises(ModelError, match=rf"unet.{CROSS}.to_q.weight of the model contains NaN or infinity"):
        loras.merge(broken, [(example(), 1.0)])
