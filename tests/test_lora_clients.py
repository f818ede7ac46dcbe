"""LoRA files and their real client: diffusers loads what we write and we what it saves, and the pictures agree."""

import logging
import re

import jax
import numpy as np
import pytest
import reference_families
from numbered_noise import draw_noise
from reference_families import LATENTS, PROMPTS, SIZE, to_torch
from safetensors.numpy import save_file

import lcm_jax
from lcm_jax.weights import lora as loras
from lcm_jax.weights import trees
from lcm_jax.weights.errors import ModelError

torch = pytest.importorskip("torch")

FAMILIES = ("sd15-taesd", "sdxl")
# Attention, feed-forward, convolutions of every kind, the embedding of time, and the text encoders. (diffusers knows
# a kohya file's text encoder by its out_proj: without one it takes none of the others. Nor can it read add_embedding
# in kohya's naming, which kohya's scripts never train.)
TARGETS = (
    r"(attn\d\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2)|conv\d?|conv_shortcut|time_emb_proj|time_embedding\.linear_\d"
    r"|(q|k|v|out)_proj|fc\d)$"
)


@pytest.fixture(scope="module", params=FAMILIES)
def models(request, tmp_path_factory):
    """(diffusers' pipeline, the folder it wrote, tensors by component)"""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = reference_families.build(folder, request.param)
    theirs.save_pretrained(folder / "model")
    names = {"unet", "text_encoder", "text_encoder_2"} & set(theirs.components)
    tensors = {n: {k: t.numpy() for k, t in getattr(theirs, n).state_dict().items()} for n in sorted(names)}
    for component in names - {"unet"}:  # the names of files, and of transformers before version 5
        tensors[component] = {
            key if key.startswith(("text_model.", "text_projection")) else f"text_model.{key}": tensor
            for key, tensor in tensors[component].items()
        }
    return theirs, folder / "model", tensors


def adapter(tensors, seed: int = 0) -> loras.LoRA:
    """A random LoRA of every module that can have one, strong enough to be seen; ranks differ, and so does alpha."""
    rng, updates = np.random.default_rng(seed), {}
    for component, each in tensors.items():
        for key, weight in each.items():
            module = key.removesuffix(".weight")
            if weight.ndim < 2 or not key.endswith(".weight") or not re.search(TARGETS, module):
                continue
            rank = 3 if "to_k" in module else 2
            down = rng.normal(size=(rank, *weight.shape[1:])).astype(np.float32)
            up = 0.3 * rng.normal(size=(weight.shape[0], rank, *(1,) * (weight.ndim - 2))).astype(np.float32)
            down /= np.sqrt(down[0].size)
            updates.setdefault(component, {})[module] = loras.Update(down, up, np.asarray(1.5, np.float32))
    assert {"unet", "text_encoder"} <= updates.keys()
    return loras.LoRA(updates, {})


def pictures(theirs, ours):
    """The same two pictures by both, float[2, H, W, 3] in 0..1."""
    latents, _ = draw_noise(3, 2, 1, LATENTS[1:])
    arguments = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"} | SIZE
    found = ours(PROMPTS, latents=np.asarray(latents), **arguments).images
    return theirs(PROMPTS, latents=to_torch(latents), **arguments).images, found


def agree(theirs, ours):
    expected, found = pictures(theirs, ours)
    assert np.abs(expected - found).max() * 255 <= 2
    return found


@pytest.mark.parametrize("naming", ["kohya", "peft"])
def test_diffusers_loads_what_we_write(models, naming, tmp_path, caplog):
    theirs, folder, tensors = models
    ours = lcm_jax.Pipeline.from_pretrained(folder)
    plain = agree(theirs, ours)
    file = tmp_path / "style.safetensors"
    written, metadata = (loras.to_kohya if naming == "kohya" else loras.to_peft)(adapter(tensors))
    save_file(written, file, {"format": "pt", **metadata})

    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        theirs.load_lora_weights(str(file))
        ours.load_lora(file)
        changed = agree(theirs, ours)
        layers = sum("lora_A" in name for n in tensors for name, _ in getattr(theirs, n).named_parameters())
    finally:
        logger.removeHandler(caplog.handler)
        theirs.unload_lora_weights()
    assert not [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING], "no key is left over"
    assert layers == sum(map(len, adapter(tensors).updates.values()))
    assert np.abs(changed - plain).max() > 0.1, "the LoRA is seen"

    ours.unload_lora()
    np.testing.assert_array_equal(agree(theirs, ours), plain)
    assert [function._cache_size() for function in ours._compiled.values()] == [1], "compiled once for all of them"


def test_we_load_what_diffusers_saves(models, tmp_path):
    peft = pytest.importorskip("peft")
    theirs, folder, _ = models
    ours = lcm_jax.Pipeline.from_pretrained(folder)
    plain = agree(theirs, ours)
    torch.manual_seed(1)
    layers, metadata = {}, {}
    for name in sorted({"unet", "text_encoder", "text_encoder_2"} & set(theirs.components)):
        network = getattr(theirs, name)
        chosen = ["to_q", "to_v", "conv1"] if name == "unet" else ["q_proj", "fc1"]
        config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=chosen, init_lora_weights=False)
        peft.inject_adapter_in_model(config, network)  # transformers' add_adapter wants a peft that is not out yet
        layers[f"{name}_lora_layers"] = peft.get_peft_model_state_dict(network)
        metadata[f"{name}_lora_adapter_metadata"] = network.peft_config["default"].to_dict()
    try:
        theirs.save_lora_weights(str(tmp_path), **layers, **metadata)
        ours.load_lora(tmp_path / "pytorch_lora_weights.safetensors", name="theirs")
        found = {path[0] for path in ours._adapters["theirs"][0]}
        assert found == {key.removesuffix("_lora_layers") for key in layers}
        assert np.abs(agree(theirs, ours) - plain).max() > 0.1
    finally:
        theirs.unload_lora_weights()


def test_several_at_weights_and_back_to_the_same_bits(models, tmp_path):
    _, folder, tensors = models
    for seed in (1, 2):
        written, metadata = loras.to_peft(adapter(tensors, seed))
        save_file(written, tmp_path / f"{seed}.safetensors", metadata)
    ours = lcm_jax.Pipeline.from_pretrained(folder)
    read, before, untouched = ours.params, jax.device_get(ours.params), ours.params["vae"]
    assert ours.load_lora(tmp_path / "1.safetensors", 0.5) == "1"
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, untouched, ours.params["vae"])), "no copy of what stays"
    one = jax.device_get(ours.params)
    ours.load_lora(tmp_path / "2.safetensors", -0.25, name="other")
    assert ours.lora_weights == {"1": 0.5, "other": -0.25}
    both = jax.device_get(ours.params["unet"])
    expected = loras.merge(tensors, [(adapter(tensors, 1), 0.5), (adapter(tensors, 2), -0.25)])["unet"]
    for key, tensor in trees.from_params(both).items():  # matrix products of two libraries
        np.testing.assert_allclose(
            tensor, expected[key], rtol=1e-6, atol=1e-6 * np.abs(expected[key]).max(), err_msg=key
        )

    same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, jax.device_get(b))  # noqa: E731
    with pytest.raises(ModelError, match="named '1' is loaded already"):
        ours.load_lora(tmp_path / "1.safetensors")
    with pytest.raises(ModelError, match="no LoRA named '2': loaded are 1, other"):
        ours.unload_lora("2")
    with pytest.raises(ModelError, match="weight of LoRA 'other' is nan"):
        ours.set_lora_weight("other", float("nan"))
    wider = {key: np.zeros((len(t), 999), t.dtype) for key, t in tensors["unet"].items() if "attn2.to_k" in key}
    written, metadata = loras.to_kohya(adapter(tensors | {"unet": tensors["unet"] | wider}))
    save_file(written, tmp_path / "wider.safetensors", metadata)
    with pytest.raises(ModelError, match="prompts of width 999, the model to .*; use the base it was trained on"):
        ours.load_lora(tmp_path / "wider.safetensors")
    same(both, ours.params["unet"])
    assert ours.lora_weights == {"1": 0.5, "other": -0.25}
    ours.unload_lora("other")
    same(one, ours.params)
    ours.set_lora_weight("1", 2.0)
    ours.set_lora_weight("1", 0.5)
    same(one, ours.params)
    ours.save_pretrained(tmp_path / "merged")
    same(one, lcm_jax.Pipeline.from_pretrained(tmp_path / "merged").params)
    ours.unload_lora()
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, read, ours.params)), "the very arrays that were read"
    same(before, ours.params)
    assert ours.lora_weights == {}
