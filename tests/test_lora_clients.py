"""LoRA files and their real client: diffusers loads what we write and we what it saves, and the pictures agree."""

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_families
from numbered_noise import draw_noise
from reference_families import LATENTS, PROMPTS, SIZE, to_torch
from safetensors.numpy import save_file

import lcm_jax
from lcm_jax.models import lora as adapters
from lcm_jax.models.layers import apply
from lcm_jax.models.unet import UNet2DCondition
from lcm_jax.sampling.adapters import _merge_kernel
from lcm_jax.weights import lora as loras
from lcm_jax.weights import lora_files, trees
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
    assert [function._cache_size() for function in ours._programs.jitted.values()] == [1], (
        "compiled once for all of them"
    )


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


def test_outputs_and_gradients_equal_those_of_peft():
    peft = pytest.importorskip("peft")
    torch.manual_seed(2)
    config = reference_families.SMALL | {"use_linear_projection": False}
    theirs = reference_families.diffusers.UNet2DConditionModel(**config)
    unet = UNet2DCondition.from_config(dict(theirs.config))
    rng = np.random.default_rng(0)
    z, context = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 6, 4, 4), (2, 5, 16)))
    t = np.asarray([3, 700], np.int32)
    shapes = jax.eval_shape(lambda: unet.init(jax.random.key(0), z, t, context)["params"])
    params = trees.to_params("unet", {key: tensor.numpy() for key, tensor in theirs.state_dict().items()}, shapes)

    targets = [target for target in adapters.DEFAULT_TARGETS if "samplers" not in target]  # of one level
    peft.inject_adapter_in_model(peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets), theirs)
    settings = adapters.LoRASettings(3, 5.0, tuple(targets))
    begun = {adapters.module_name(path) for path in adapters.target_paths(shapes, settings)}
    theirs_too = {name.partition(".lora_A")[0]: p for name, p in theirs.named_parameters() if "lora_A" in name}
    assert theirs_too.keys() == begun, "the same modules"
    for down in theirs_too.values():  # uniform up to the bound that ours has too
        assert 0.6 < np.abs(down.detach().numpy()).max() * np.sqrt(down[0].numel()) <= 1 + 1e-6
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    named = {name: p for name, p in theirs.named_parameters() if "lora_" in name}

    def updates(tensor):
        both = lambda m: (tensor(named[f"{m}.lora_{side}.default.weight"]).numpy() for side in "AB")  # noqa: E731
        return {module: loras.Update(*both(module), np.asarray(5.0, np.float32)) for module in begun}

    output = theirs(to_torch(z), torch.from_numpy(t), torch.from_numpy(context)).sample
    output.square().mean().backward()

    @jax.jit
    def run(trees):
        def loss(trees):
            with adapters.applied(trees, settings.scale):
                found = apply(unet, params, z, t, context)
            return jnp.square(found).mean(), found

        return jax.grad(loss, has_aux=True)(trees)

    gradient, found = run(lora_files.to_adapters(updates(torch.detach), shapes))
    expected = output.detach().numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    wanted = updates(lambda p: p.grad)
    for module, update in lora_files.to_updates(gradient, 5.0).items():
        for mine, other in zip(update[:2], wanted[module][:2], strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-4 * np.abs(other).max(), err_msg=module)


def test_diffusers_loads_what_a_run_exports(models, tmp_path, caplog):
    """Both files; alpha is not the rank. With LCMScheduler and without guidance the images are ours."""
    theirs, folder, _ = models
    ours = lcm_jax.Pipeline.from_pretrained(folder)
    settings = adapters.LoRASettings(3, 7.0, tuple(adapters.DEFAULT_TARGETS))
    shapes = jax.eval_shape(lambda: adapters.init(jax.random.key(0), ours.params["unet"], settings))
    rng = np.random.default_rng(5)
    trained = jax.tree.map(lambda leaf: np.float32(0.3 * rng.normal(size=leaf.shape)), shapes)
    lora_files.write_adapters(tmp_path / "run" / "export", trained, settings.alpha)
    assert ours.load_lora(tmp_path / "run") == "run"
    again = lora_files.read_adapters(tmp_path / "run", ours.params["unet"], settings, ours.family)
    jax.tree.map(np.testing.assert_array_equal, again, trained)
    logger, scheduler = logging.getLogger("diffusers"), theirs.scheduler
    logger.addHandler(caplog.handler)
    try:
        theirs.scheduler = reference_families.diffusers.LCMScheduler.from_config(scheduler.config)
        latents, _ = draw_noise(3, 2, 1, LATENTS[1:])
        arguments = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "np"} | SIZE
        found = None
        for name in ("pytorch_lora_weights.safetensors", "kohya.safetensors"):
            theirs.load_lora_weights(str(tmp_path / "run" / "export"), weight_name=name)
            layers = [key for key, _ in theirs.unet.named_parameters() if "lora_A" in key]
            assert len(layers) == len(adapters.modules(trained))
            if ours.family != "sdxl":
                expected = theirs(PROMPTS, latents=to_torch(latents), **arguments).images
                if found is None:
                    found = ours(PROMPTS, latents=np.asarray(latents), sampler="lcm", **arguments).images
                assert np.abs(expected - found).max() * 255 <= 2
            theirs.unload_lora_weights()
    finally:
        theirs.scheduler = scheduler
        logger.removeHandler(caplog.handler)
    # It warns of every LoRA that changes no text encoder, which is "safe to ignore if" that was meant.
    messages = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert not [text for text in messages if "No LoRA keys associated to CLIPTextModel" not in text], (
        "no key is left over"
    )


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
    compiled = _merge_kernel._cache_size()
    ours.set_lora_weight("1", 2.0)
    ours.set_lora_weight("1", 0.5)
    same(one, ours.params)
    assert _merge_kernel._cache_size() == compiled, "another weight compiles nothing"
    ours.save_pretrained(tmp_path / "merged")
    same(one, lcm_jax.Pipeline.from_pretrained(tmp_path / "merged").params)
    ours.unload_lora()
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, read, ours.params)), "the very arrays that were read"
    same(before, ours.params)
    ours.save_pretrained(tmp_path / "half", dtype="float16")
    half = lcm_jax.Pipeline.from_pretrained(tmp_path / "half")
    read = half.params
    with pytest.raises(ModelError, match=r"\d+ tensors overflow in float16: \S+weight, .*; use a smaller weight"):
        half.load_lora(tmp_path / "1.safetensors", 1e7)
    assert half.params is read and half.lora_weights == {}
