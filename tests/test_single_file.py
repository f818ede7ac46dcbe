"""The single files of Stable Diffusion's authors, against the converters of diffusers."""

import re
import subprocess
import sys
from collections.abc import Mapping
from functools import cache

import ml_dtypes
import numpy as np
import pytest
from reference_single_file import (
    MAIN,
    SD1,
    SD2,
    SMALL,
    VAE,
    XL,
    build,
    components,
    family_of,
    networks,
    published,
    tensors_of,
)
from safetensors.numpy import load_file, save_file

from lcm_jax.models.families import FAMILIES
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.weights import single_file
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.model import StoredModel, check_params, merge_base, open_file
from lcm_jax.weights.pickles import read_pickle
from lcm_jax.weights.single_file import open_diffusers, open_ldm, to_diffusers, to_ldm
from lcm_jax.weights.single_file_configs import complete, infer_configs
from lcm_jax.weights.single_file_family import detect_family
from lcm_jax.weights.stored import Tensors
from lcm_jax.weights.trees import to_params

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
theirs = pytest.importorskip("diffusers.loaders.single_file_utils")


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and a[key].shape == b[key].shape, key
        assert a[key].tobytes() == b[key].tobytes(), key


# --- parity ---


@pytest.mark.parametrize("name", SMALL)
def test_the_same_tensors_as_the_converters_of_diffusers(name):
    file, _ = published(name)
    mine = to_diffusers(file, family_of(name))
    checkpoint = {key: torch.from_numpy(np.array(tensor)) for key, tensor in file.items()}
    nets = networks(name)
    expected = {
        "unet": theirs.convert_ldm_unet_checkpoint(checkpoint, nets["unet"].config),
        "vae": theirs.convert_ldm_vae_checkpoint(checkpoint, nets["vae"].config),
    }
    if family_of(name) == "sd2":
        expected["text_encoder"] = theirs.convert_open_clip_checkpoint(nets["text_encoder"], checkpoint)
    else:
        expected["text_encoder"] = theirs.convert_ldm_clip_checkpoint(checkpoint)
    if family_of(name) == "sdxl":
        prefix = "conditioner.embedders.1.model."
        expected["text_encoder_2"] = theirs.convert_open_clip_checkpoint(nets["text_encoder_2"], checkpoint, prefix)
    assert mine.keys() == expected.keys()
    for component, tensors in expected.items():
        tensors = {key: tensor.numpy() for key, tensor in tensors.items() if not key.endswith("position_ids")}
        if component == "unet" and "guided" in name:  # no published name: they know nothing of it
            tensors["time_embedding.cond_proj.weight"] = components(name)["unet"]["time_embedding.cond_proj.weight"]
        assert_same_tensors(mine[component], tensors)
        assert_same_tensors(mine[component], components(name)[component])


@pytest.mark.parametrize("name", SMALL)
def test_round_trips_are_bit_identical(name):
    file, extra = published(name)
    again = to_ldm(to_diffusers(file, family_of(name)), family_of(name))
    assert_same_tensors(again, {key: tensor for key, tensor in file.items() if key not in extra})
    assert all(tensor.flags.c_contiguous for tensor in again.values())
    for component, tensors in to_diffusers(again, family_of(name)).items():
        assert_same_tensors(tensors, components(name)[component])


def test_every_dtype_keeps_its_bits():
    bits = lambda shape: np.arange(np.prod(shape)).astype(np.uint16).reshape(shape)  # noqa: E731
    half = {
        component: {key: bits(tensor.shape).view(ml_dtypes.bfloat16) for key, tensor in tensors.items()}
        for component, tensors in components("sdxl").items()
    }
    for component, tensors in to_diffusers(to_ldm(half, "sdxl"), "sdxl").items():
        assert_same_tensors(tensors, half[component])


def test_the_layout_is_that_of_the_files():
    file = to_ldm(components("sdxl guided"), "sdxl")
    shapes = {key: tensor.shape for key, tensor in file.items()}
    mine = components("sdxl guided")
    cond = "model.diffusion_model.time_embed.cond_proj.weight"
    assert file[cond].tobytes() == mine["unet"]["time_embedding.cond_proj.weight"].tobytes()
    assert shapes["first_stage_model.decoder.mid.attn_1.q.weight"] == (64, 64, 1, 1)
    assert shapes["first_stage_model.encoder.mid.attn_1.proj_out.weight"] == (64, 64, 1, 1)
    text = "conditioner.embedders.1.model."
    assert shapes[text + "text_projection"] == (64, 48) and shapes[text + "positional_embedding"] == (7, 64)
    fused = file[text + "transformer.resblocks.1.attn.in_proj_weight"]
    assert fused.shape == (192, 64)
    layer = "text_model.encoder.layers.1.self_attn."
    for i, letter in enumerate("qkv"):
        part = mine["text_encoder_2"][f"{layer}{letter}_proj.weight"]
        np.testing.assert_array_equal(fused[64 * i : 64 * i + 64], part)
    # A matrix, as some converters leave it, is read as well.
    key = "first_stage_model.decoder.mid.attn_1.q.weight"
    file[key] = file[key][..., 0, 0]
    assert_same_tensors(to_diffusers(file, "sdxl")["vae"], mine["vae"])


# --- all sizes, by shapes alone ---


class Shaped:
    """A tensor without numbers."""

    def __init__(self, *shape):
        self.shape = shape


@cache
def zeros_of(name):
    """The tensors of a published model in its own size: zeros that take no memory."""
    found = {}
    for component, config in FAMILIES[name].items():
        if component not in ("scheduler", "model_index"):
            with torch.device("meta"):
                tensors = tensors_of(component, build(config))
            found[component] = {
                key: np.broadcast_to(np.zeros((), np.float16), tensor.shape) for key, tensor in tensors.items()
            }
    return found


def shapes_of(parts: dict, family: str) -> dict[str, tuple[int, ...]]:
    """Of the tensors of a single file."""
    return {key: tensor.shape for key, tensor in open_ldm(parts, family).specs.items()}


FULL = {"sd15": "sd1", "sd15-inpainting": "sd1", "lcm-dreamshaper": "sd1", "sd21": "sd2", "sd21-768": "sd2"}
FULL |= {"sd2-inpainting": "sd2", "sdxl": "sdxl", "lcm-sdxl": "sdxl", "ssd1b": "sdxl"}
KINDS = {"sd15": "v1", "sd15-inpainting": "inpainting", "lcm-dreamshaper": "v1", "sd21": "v2", "sd21-768": "v2"}
KINDS |= {"sd2-inpainting": "inpainting_v2", "sdxl": "xl_base", "lcm-sdxl": "xl_base", "ssd1b": "xl_base"}


@pytest.mark.parametrize("name", FULL)
def test_the_full_size_names_shapes_and_configs(name):
    family, zeros = FULL[name], zeros_of(name)
    shapes = shapes_of(zeros, family)
    assert detect_family(shapes) == detect_family({key: Shaped(*shape) for key, shape in shapes.items()}) == family
    assert theirs.infer_diffusers_model_type({key: Shaped(*shape) for key, shape in shapes.items()}) == KINDS[name]

    config = FAMILIES[name]["scheduler"]
    configs = infer_configs(shapes, family, config["prediction_type"])
    assert configs.keys() == FAMILIES[name].keys() - {"model_index"}
    for component, config in FAMILIES[name].items():
        for option, value in config.items():
            if component.startswith("text") and option == "projection_dim" and len(config["architectures"][0]) < 20:
                continue  # of no use there
            assert configs[component][option] == value, (component, option)
    model = StableDiffusion.from_configs(configs)  # every option is supported
    assert model.unet.config["time_cond_proj_dim"] == (256 if name.startswith("lcm") else None)


def test_the_published_keys():
    """Written down from the published files, with their numbers of tensors."""
    file = shapes_of(zeros_of("sd15"), "sd1")
    number = lambda prefix, keys: sum(key.startswith(prefix) for key in keys)  # noqa: E731
    unet, vae = "model.diffusion_model.", "first_stage_model."
    assert (number(unet, file), number(vae, file), number("cond_stage_model.", file)) == (686, 248, 196)
    for key, shape in {
        f"{unet}time_embed.2.bias": (1280,),
        f"{unet}input_blocks.1.0.in_layers.2.weight": (320, 320, 3, 3),
        f"{unet}input_blocks.3.0.op.weight": (320, 320, 3, 3),
        f"{unet}input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        f"{unet}input_blocks.8.1.transformer_blocks.0.ff.net.0.proj.weight": (10240, 1280),
        f"{unet}input_blocks.11.0.out_layers.3.weight": (1280, 1280, 3, 3),
        f"{unet}middle_block.1.proj_in.weight": (1280, 1280, 1, 1),
        f"{unet}output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        f"{unet}output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        f"{unet}output_blocks.8.2.conv.weight": (640, 640, 3, 3),
        f"{unet}output_blocks.11.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        f"{unet}out.2.weight": (4, 320, 3, 3),
        f"{vae}encoder.down.2.block.0.nin_shortcut.weight": (512, 256, 1, 1),
        f"{vae}decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        f"{vae}decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        f"{vae}decoder.mid.attn_1.norm.weight": (512,),
        f"{vae}post_quant_conv.weight": (4, 4, 1, 1),
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc2.weight": (768, 3072),
    }.items():
        assert file[key] == shape, key

    file = shapes_of(zeros_of("sdxl"), "sdxl")
    texts = "conditioner.embedders.0.", "conditioner.embedders.1."
    assert [number(prefix, file) for prefix in (unet, vae, *texts)] == [1680, 248, 196, 389]
    for key, shape in {
        f"{unet}label_emb.0.0.weight": (1280, 2816),
        f"{unet}input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (640, 2048),
        f"{unet}input_blocks.6.0.op.weight": (640, 640, 3, 3),
        f"{unet}input_blocks.8.1.transformer_blocks.9.ff.net.2.weight": (1280, 5120),
        f"{unet}middle_block.1.transformer_blocks.9.norm3.weight": (1280,),
        f"{unet}output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        f"{unet}output_blocks.5.2.conv.weight": (640, 640, 3, 3),
        f"{unet}output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (768,),
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
        "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (1280,),
        "conditioner.embedders.1.model.token_embedding.weight": (49408, 1280),
        "conditioner.embedders.1.model.ln_final.bias": (1280,),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
    }.items():
        assert file[key] == shape, key


# --- configs ---


@pytest.mark.parametrize("name", SMALL)
def test_the_configs_of_small_models_fit_their_weights(name):
    file, _ = published(name)
    family = family_of(name)
    configs = infer_configs(file, family, "epsilon" if family == "sd2" else None)
    for component, network in networks(name).items():
        for option, value in configs[component].items():
            if option not in ("_class_name", "architectures"):
                theirs_value = getattr(network.config, option)
                assert (list(theirs_value) if isinstance(theirs_value, tuple) else theirs_value) == value, option
    model = StableDiffusion.from_configs(configs)
    if name in ("sd1", "sdxl"):  # and the networks of JAX take the tensors
        abstract = model.abstract_params()
        for component, tensors in to_diffusers(file, family).items():
            to_params(component, tensors, abstract[component])


def test_the_scheduler():
    scheduler = lambda name, *a, **extra: infer_configs(published(name)[0] | extra, family_of(name), *a)["scheduler"]  # noqa: E731
    assert scheduler("sd1")["_class_name"] == "DDIMScheduler" and "prediction_type" not in scheduler("sd1")
    assert scheduler("sd1", "v_prediction")["prediction_type"] == "v_prediction"
    assert scheduler("sd1 guided")["_class_name"] == "LCMScheduler"
    assert scheduler("sdxl")["_class_name"] == "EulerDiscreteScheduler"
    marked = scheduler("sdxl", v_pred=np.zeros(0), ztsnr=np.zeros(0))
    assert marked["prediction_type"] == "v_prediction" and marked["rescale_betas_zero_snr"] is True
    with pytest.raises(ModelError, match="prediction_type is needed: .*'v_prediction' for.*'epsilon' for"):
        complete({"scheduler": scheduler("sd2")}, "sd2")
    for family in ("sd1", "sdxl"):
        complete({"scheduler": scheduler(family)}, family)
    with pytest.raises(ModelError, match="prediction_type 'velocity' is not supported; use epsilon or v_prediction"):
        scheduler("sd2", "velocity")


def with_base(tmp_path, name: str, base: Mapping, scheduler: Mapping, **extra) -> StoredModel:
    """The model of a file beside a base of these configs."""
    save_file(to_ldm(components(name), family_of(name)) | extra, tmp_path / "m.safetensors")
    model = open_file(tmp_path / "m.safetensors")
    configs = dict(base) | {"scheduler": dict(scheduler), "model_index": {}}
    index = {"_class_name": "Base"}
    return merge_base(model, StoredModel("base", family_of(name), configs, {}, tmp_path / "tokenizer", index))


def test_what_the_file_tells_stays_and_what_it_guesses_is_the_bases(tmp_path):
    euler, ddim = FAMILIES["sdxl"]["scheduler"], FAMILIES["sd21-768"]["scheduler"]
    marks = {"v_pred": np.zeros(0, np.float32), "ztsnr": np.zeros(0, np.float32)}
    found = with_base(tmp_path, "sdxl", XL, euler, **marks).configs["scheduler"]
    assert found == euler | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    assert with_base(tmp_path, "sdxl", XL, euler).configs["scheduler"] == euler
    for name, base in (("sd1", SD1), ("sd2", SD2)):  # of these two the file says nothing
        assert with_base(tmp_path, name, base, ddim).configs["scheduler"] == ddim
    heads = SD1 | {"unet": SD1["unet"] | {"attention_head_dim": 4, "norm_num_groups": 16, "sample_size": 40}}
    heads["vae"] = VAE | {"scaling_factor": 0.5}
    found = with_base(tmp_path, "sd1", heads, ddim)
    assert found.configs["unet"].items() >= heads["unet"].items() and found.configs["vae"]["scaling_factor"] == 0.5
    assert found.index["_class_name"] == "Base" and not found.guessed


@pytest.mark.parametrize(
    "name, base",
    [
        ("sdxl without a middle's attention", XL),
        ("sdxl", SMALL["sdxl without a middle's attention"]),
        ("sd1 inpainting", SD1),
        ("sd1 guided", SD1),
    ],
)
def test_the_networks_are_the_files_where_the_base_has_others(tmp_path, name, base):
    family = family_of(name)
    model = with_base(tmp_path, name, base, FAMILIES["sdxl" if family == "sdxl" else "sd15"]["scheduler"])
    abstract = StableDiffusion.from_configs(model.configs).abstract_params()
    check_params(model, abstract)
    assert model.tensors.keys() == base.keys()
    lcm = model.configs["scheduler"]["_class_name"] == "LCMScheduler"
    assert lcm == ("guided" in name) == (model.index is None)


def test_a_shape_that_is_missing_or_in_no_config():
    file = to_ldm(components("sd1"), "sd1")
    short = {key: tensor for key, tensor in file.items() if key != "model.diffusion_model.out.2.weight"}
    with pytest.raises(ModelError, match="the unet of this file lacks conv_out.weight"):
        infer_configs(short, "sd1")
    uneven = {key: tensor for key, tensor in file.items() if ".input_blocks.2.1." not in key}
    with pytest.raises(ModelError, match=r"down_blocks.0 has \[1, 0\] transformer blocks"):
        infer_configs(uneven, "sd1")
    middle = to_ldm(components("sdxl"), "sdxl")
    middle = {key: tensor for key, tensor in middle.items() if "middle_block.1.transformer_blocks.2." not in key}
    with pytest.raises(ModelError, match=r"depth 2 in the middle and \[3, 3\] before it"):
        infer_configs(middle, "sdxl")


# --- averaged weights, autoencoders alone, parts ---


def test_averaged_weights_are_taken_when_asked_for():
    file, _ = published("sd1 guided")
    unet = [key for key in file if key.startswith("model.diffusion_model.")]
    file |= {"model_ema." + "".join(key.split(".")[1:]): file[key] + np.float32(1) for key in unet}
    assert "model_ema.diffusion_modelinput_blocks11attn2to_kweight" not in file
    assert "model_ema.diffusion_modelinput_blocks11transformer_blocks0attn2to_kweight" in file
    plain, mean = to_diffusers(file, "sd1"), to_diffusers(file, "sd1", ema=True)
    for key, tensor in plain["unet"].items():
        np.testing.assert_array_equal(mean["unet"][key], tensor + np.float32(1))
    assert_same_tensors(plain["vae"], mean["vae"])
    checkpoint = {key: torch.from_numpy(np.array(tensor)) for key, tensor in file.items()}
    expected = theirs.convert_ldm_unet_checkpoint(checkpoint, networks("sd1 guided")["unet"].config, extract_ema=True)
    del mean["unet"]["time_embedding.cond_proj.weight"]
    assert_same_tensors(mean["unet"], {key: tensor.numpy() for key, tensor in expected.items()})

    del file["model_ema.diffusion_modelout2bias"]
    with pytest.raises(ModelError, match="1 of 685 averaged weights .* model_ema.diffusion_modelout2bias"):
        open_diffusers(file, "sd1", ema=True)
    with pytest.raises(ModelError, match="0 of 0 averaged"):
        open_diffusers(to_ldm({"vae": components("sd1")["vae"]}, "vae"), "vae", ema=True)


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
def test_an_autoencoder_alone(prefix):
    vae = components("sd1")["vae"]
    bare = to_ldm({"vae": vae}, "vae")
    assert "decoder.up.0.block.0.conv1.weight" in bare
    file = {prefix + key: tensor for key, tensor in bare.items()}
    file |= {"loss.logvar": np.zeros(()), "model_ema.decay": np.zeros(()), "epoch": np.zeros(())}
    assert detect_family(file) == "vae"
    assert_same_tensors(to_diffusers(file, "vae")["vae"], vae)
    expected = theirs.convert_ldm_vae_checkpoint(
        {key: torch.from_numpy(np.array(tensor)) for key, tensor in file.items()}, networks("sd1")["vae"].config
    )
    assert_same_tensors(to_diffusers(file, "vae")["vae"], {key: tensor.numpy() for key, tensor in expected.items()})
    config = infer_configs(file, "vae", scaling_factor=0.13025)
    assert config.keys() == {"vae"} and config["vae"]["scaling_factor"] == 0.13025
    assert config["vae"]["block_out_channels"] == [32, 32, 64, 64]
    with pytest.raises(ModelError, match="scaling_factor is needed: .*0.18215 .*0.13025"):
        complete(infer_configs(file, "vae"), "vae")


def test_a_unet_alone():
    for name, family in [("sd15", "sd1"), ("sd21", "sd2"), ("sdxl", "sdxl")]:
        file = shapes_of({"unet": zeros_of(name)["unet"]}, family)
        assert detect_family(file) == family
        configs = infer_configs(file, family, "epsilon")
        assert configs.keys() == {"unet", "scheduler"}
        assert configs["unet"].get("addition_time_embed_dim") == (256 if family == "sdxl" else None)
    with pytest.raises(ModelError, match="no known family"):  # attends to a text of width 64
        detect_family(to_ldm({"unet": components("sd1")["unet"]}, "sd1"))


def test_older_names_are_read():
    """1.x without `text_model.`; folders with the attention of the autoencoder under its first names."""
    file = to_ldm(components("sd1"), "sd1")
    bare = {key.replace("transformer.text_model.", "transformer."): tensor for key, tensor in file.items()}
    assert detect_family(bare) == "sd1"
    assert_same_tensors(to_diffusers(bare, "sd1")["text_encoder"], components("sd1")["text_encoder"])
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {
        re.sub(r"(attentions\.0)\.(to_\w(?:ut\.0)?)\.", lambda m: f"{m[1]}.{names[m[2]]}.", key): tensor
        for key, tensor in components("sd1")["vae"].items()
    }
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in old
    text = {key.removeprefix("text_model."): tensor for key, tensor in components("sd1")["text_encoder"].items()}
    text["embeddings.position_ids"] = np.arange(7)[None]
    again = to_ldm({"unet": components("sd1")["unet"], "vae": old, "text_encoder": text}, "sd1")
    assert_same_tensors(again, file)


# --- one tensor at a time ---


def counted(tensors: Mapping[str, np.ndarray], read: list[str]) -> Tensors:
    """Tensors that say in `read` which was asked for."""
    return Tensors(tensors, lambda key: read.append(key) or tensors[key])


@pytest.mark.parametrize("name", MAIN)
def test_tensors_are_read_one_at_a_time(name):
    file, extra = published(name)
    read: list[str] = []
    source = counted(file, read)
    assert detect_family(source.specs) == family_of(name)
    infer_configs(source.specs, family_of(name), "epsilon")
    opened = open_diffusers(source, family_of(name))
    assert not read
    for component, tensors in components(name).items():
        assert opened[component].keys() == tensors.keys()
        for key, tensor in tensors.items():
            read.clear()
            assert opened[component][key].tobytes() == tensor.tobytes() and len(read) == 1
            assert opened[component].specs[key].shape == tensor.shape

    parts = {component: counted(tensors, read) for component, tensors in components(name).items()}
    read.clear()
    opened = open_ldm(parts, family_of(name))
    assert not read and len(opened) == len(file) - len(extra)
    for key, tensor in opened.items():
        assert len(read) in (1, 3) and opened.specs[key].shape == tensor.shape
        read.clear()


def test_a_checkpoint_of_torch_and_a_safetensors_file(tmp_path):
    file, _ = published("sd2")
    state = {key: torch.from_numpy(np.array(tensor)).half() for key, tensor in file.items()}
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "m.ckpt")
    read = read_pickle(tmp_path / "m.ckpt")
    assert detect_family(read) == "sd2"
    mine = to_diffusers(read, "sd2")
    for component, tensors in components("sd2").items():
        assert_same_tensors(mine[component], {key: tensor.astype(np.float16) for key, tensor in tensors.items()})
    save_file(to_ldm(mine, "sd2"), tmp_path / "m.safetensors")
    assert_same_tensors(load_file(tmp_path / "m.safetensors"), to_ldm(mine, "sd2"))


# --- what is refused ---


@pytest.mark.parametrize(
    "keys, message",
    [
        ([], "no known family: looked for model.diffusion_model.input_blocks.0.0.weight .*found no keys"),
        (["a.b.c.d", "a.b.c.e", "x"], r"found a\.b\.c \(2\), x \(1\)"),
        (["model.diffusion_model.joint_blocks.0.x"], "is Stable Diffusion 3 by its keys"),
        (["double_blocks.0.img_attn.proj.weight"], "is Flux by its keys"),
        (["control_model.time_embed.0.weight"], "is a ControlNet by its keys"),
        (["conditioner.embedders.0.model.ln_final.bias"], "is the refiner of SDXL by its keys"),
        (["text_model.final_layer_norm.weight"], "is the text encoder of a diffusers folder"),
        (["controlnet_cond_embedding.conv_in.weight"], "is a ControlNet by its keys"),
        (["edm_vpred.sigma_max", "model.diffusion_model.input_blocks.0.0.weight"], "is CosXL by its keys"),
        (
            ["first_stage_model.decoder.up.0.block.0.conv1.weight", "conditioner.embedders.0.transformer.x"],
            r"no known family: .*found .*conditioner.embedders.0 \(1\)",
        ),
        (["lora_unet_down_blocks_0.alpha"], "is a LoRA"),
        (["edm_mean", "model.diffusion_model.input_blocks.0.0.weight"], "is Playground 2.5"),
        (
            [
                "model.diffusion_model.input_blocks.0.0.weight",
                "cond_stage_model.transformer.text_model.x",
                "model.diffusion_model.label_emb.0.0.weight",
            ],
            r"no known family: .*label_emb\. in sdxl only.* found model.diffusion_model.input_blocks \(1\)",
        ),
        (
            ["model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.other.x"],
            "no known family: .*sd2: cond_stage_model.model.*found .*cond_stage_model.other.x",
        ),
        (
            [
                "model.diffusion_model.input_blocks.0.0.weight",
                "conditioner.embedders.0.transformer.x",
                "model.diffusion_model.label_emb.0.0.weight",
            ],
            "no known family: .*conditioner.embedders.0.transformer. and conditioner.embedders.1.model.",
        ),
    ],
)
def test_an_unknown_family_says_which_keys_decided(keys, message):
    with pytest.raises(ModelError, match=message) as caught:
        detect_family(dict.fromkeys(keys, (1, 1)))
    assert len(str(caught.value).splitlines()) == 1


def test_keys_without_a_place_are_named():
    file = to_ldm(components("sd1"), "sd1")
    wrong = {"model.diffusion_model.control.0.weight": np.zeros(1), "first_stage_model.encoder.odd": np.zeros(1)}
    with pytest.raises(ModelError, match="2 keys .*sd1 layout: model.diffusion_model.control.0.weight, first_stage"):
        open_diffusers(file | wrong, "sd1")
    key = "cond_stage_model.transformer.embeddings.token_embedding.weight"
    with pytest.raises(ModelError, match=f"1 keys are unknown to or duplicated in .*{key}"):
        open_diffusers(file | {key: np.zeros(1)}, "sd1")
    with pytest.raises(ModelError, match="family 'sd4' is not supported; use one of sd1, sd2, sdxl, vae"):
        open_diffusers(file, "sd4")
    file = to_ldm(components("sd2"), "sd2")
    fused = next(key for key in file if key.endswith("in_proj_weight"))
    with pytest.raises(ModelError, match=r"is not q, k and v"):
        to_diffusers(file | {fused: file[fused][:-1]}, "sd2")


def test_what_the_layout_cannot_represent_is_named():
    sd1, sd2, xl = components("sd1"), components("sd2"), components("sdxl")
    for parts, family, message in [
        (sd1 | {"text_encoder_2": xl["text_encoder_2"]}, "sd1", "37 keys .*sd1 family: text_encoder_2 text_model."),
        (sd1 | {"unet": xl["unet"]}, "sd1", "4 keys .*unet add_embedding.linear_1.weight"),
        (sd1 | {"unet": sd1["unet"] | {"class_embedding.weight": np.zeros(1)}}, "sd1", "unet class_embedding.weight"),
        (sd1 | {"vae": sd1["vae"] | {"encoder.layers.0.weight": np.zeros(1)}}, "sd1", "1 keys .*vae encoder.layers.0"),
        (sd1, "vae", "unet conv_in.weight|text_encoder"),
        (xl | {"text_encoder": xl["text_encoder_2"]}, "sdxl", "1 keys .*text_encoder text_projection.weight"),
    ]:
        with pytest.raises(ModelError, match=message):
            open_ldm(parts, family)
    layer = "text_model.encoder.layers.{}.self_attn.{}_proj.weight"
    deep = {layer.format(23, letter): np.zeros((64, 64), np.float32) for letter in "qkv"}
    with pytest.raises(ModelError, match="3 keys .*layers.23.self_attn"):  # reading would drop it
        open_ldm(sd2 | {"text_encoder": sd2["text_encoder"] | deep}, "sd2")
    part = {key: tensor for key, tensor in sd2["text_encoder"].items() if key != layer.format(0, "k")}
    with pytest.raises(ModelError, match="2 keys .*layers.0.self_attn"):
        open_ldm({"text_encoder": part}, "sd2")
    mixed = sd2["text_encoder"] | {layer.format(0, "k"): np.zeros((64, 64), np.float16)}
    with pytest.raises(ModelError, match="layers.0.self_attn.* one dtype"):
        to_ldm({"text_encoder": mixed}, "sd2")


def test_the_map_loads_neither_torch_nor_jax():
    code = "import sys, lcm_jax.weights.single_file; print(sorted({'torch', 'jax', 'flax'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    assert single_file.__doc__ and "time_embed.cond_proj.weight" in single_file.__doc__
