"""The ControlNet against diffusers' ControlNetModel on the same random weights, and the files that it is stored in."""

import shutil

import jax
import numpy as np
import pytest
import reference_controlnet
from reference_controlnet import SD1, XL
from reference_families import to_torch
from safetensors.numpy import load_file, save_file

from lcm_jax.conversion import convert
from lcm_jax.models.controlnet import ControlNet, check_fit
from lcm_jax.models.unet import UNet2DCondition
from lcm_jax.weights import trees
from lcm_jax.weights.controlnet import build, is_controlnet, open_controlnet, with_unet
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.model import open_model

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

FOUR = {  # the levels of Stable Diffusion 1.x
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "block_out_channels": (32, 64, 64, 64),
    "layers_per_block": 2,
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
}
NETS = {
    "as SD1": (SD1, {"controlnet_conditioning_channel_order": "bgr"}),
    "as SDXL": (XL, {"conditioning_embedding_out_channels": (4, 6, 8)}),
    "pooled, without attention": (
        SD1 | {"down_block_types": ("DownBlock2D", "DownBlock2D")},
        {"global_pool_conditions": True, "mid_block_type": "UNetMidBlock2D"},
    ),
}


def tensors_of(net) -> dict[str, np.ndarray]:
    return {key: tensor.detach().numpy() for key, tensor in net.state_dict().items()}


@pytest.mark.parametrize("name", NETS)
def test_equals_diffusers(name):
    config, options = NETS[name]
    theirs = reference_controlnet.build(config, **options)
    ours = ControlNet.from_config(theirs.config)
    random = lambda *shape: np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)  # noqa: E731
    z, context, t = random(2, 4, 6, 4), random(2, 5, config["cross_attention_dim"]), np.array([3, 999])
    image = random(2, 4 * ours.downscale, 6 * ours.downscale, 3)
    added = {} if ours.pooled_width is None else {"text_embeds": random(2, 20), "time_ids": 9 * np.abs(random(2, 6))}
    params = trees.to_params("controlnet", tensors_of(theirs), ours.abstract_params())
    found = jax.jit(ours.apply)({"params": params}, z, t, context, image, *added.values())
    with torch.no_grad():
        down, middle = theirs(
            to_torch(z),
            torch.from_numpy(t),
            torch.from_numpy(context),
            to_torch(image),
            added_cond_kwargs={key: torch.from_numpy(value) for key, value in added.items()},
            return_dict=False,
        )
    for ours_, theirs_ in zip((*found.down, found.middle), (*down, middle), strict=True):
        expected = theirs_.numpy().transpose(0, 2, 3, 1)
        assert ours_.dtype == np.float32 and np.std(expected) > 0.01
        np.testing.assert_allclose(ours_, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"conditioning_channels": 4}, "conditioning_channels=4 .supported: 3"),
        ({"controlnet_conditioning_channel_order": "grb"}, "channel_order='grb' .supported: 'rgb', 'bgr'"),
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep' .supported: None"),
        ({"num_control_type": 6}, "num_control_type=6 .unknown option"),
        ({"layers_per_block": [1, 2]}, r"layers_per_block=\[1, 2\] .supported: an integer"),
        ({"conditioning_embedding_out_channels": []}, "conditioning_embedding_out_channels is empty"),
        ({"down_block_types": ["DownBlock2D"]}, "needs one of .* for each of the 2 block_out_channels"),
        ({"transformer_layers_per_block": [1]}, r"transformer_layers_per_block=\[1\] needs 1 or 2 values"),
        ({"attention_head_dim": 9}, "9 attention heads are not supported"),
        ({"addition_embed_type": "text_time"}, "needs addition_time_embed_dim and"),
        (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 48,
            },
            "has to be more than 6 times as much",
        ),
    ],
)
def test_options_that_are_not_supported_are_named(options, message):
    with pytest.raises(ValueError, match=f"^ControlNetModel config.*{message}"):
        ControlNet.from_config(dict(reference_controlnet.build(SD1).config) | options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"cross_attention_dim": 24}, "^cross_attention_dim is 24, and cross_attention_dim of the model's UNet is 16"),
        ({"block_out_channels": (8, 20)}, "^block_out_channels is"),
        ({"in_channels": 9}, "^in_channels is 9, and out_channels of the model's UNet is 4"),
        ({"conditioning_embedding_out_channels": (4,)}, "makes 1 pixels one, and the autoencoder 2"),
    ],
)
def test_a_net_of_another_family_does_not_fit(options, message):
    net = ControlNet.from_config(dict(reference_controlnet.build(SD1).config) | options)
    with pytest.raises(ValueError, match=message + ".*; use a ControlNet of the same family"):
        check_fit(net, UNet2DCondition.from_config(SD1), 2)


def test_a_net_without_attention_fits_any_prompt():
    config = dict(reference_controlnet.build(SD1).config) | {"cross_attention_dim": 24}
    config |= {"down_block_types": ("DownBlock2D",) * 2, "mid_block_type": "UNetMidBlock2D"}
    check_fit(ControlNet.from_config(config), UNet2DCondition.from_config(SD1 | {"layers_per_block": [1, 1]}), 2)


# ---- files ----------------------------------------------------------------------------------------------------------


def authors_layout(net) -> dict[str, np.ndarray]:
    """The file of its authors, made by this table of theirs, for two or four levels of attention or none."""
    new, levels = {}, len(net.down_blocks)
    blocks, skips = len(net.controlnet_cond_embedding.blocks), len(net.controlnet_down_blocks)
    heads = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0"}
    heads |= {"time_embedding.linear_2": "time_embed.2", "controlnet_mid_block": "middle_block_out.0"}
    heads |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
    heads |= {"controlnet_cond_embedding.conv_in": "input_hint_block.0"}
    heads |= {f"controlnet_cond_embedding.blocks.{i}": f"input_hint_block.{2 * i + 2}" for i in range(blocks)}
    heads |= {"controlnet_cond_embedding.conv_out": f"input_hint_block.{2 * blocks + 2}"}
    heads |= {f"controlnet_down_blocks.{i}": f"zero_convs.{i}.0" for i in range(skips)}
    heads |= {f"mid_block.resnets.{i}": f"middle_block.{2 * i}" for i in range(2)}
    heads |= {"mid_block.attentions.0": "middle_block.1"}
    n = 1
    for i in range(levels):
        for j in range(len(net.down_blocks[i].resnets)):
            heads |= {f"down_blocks.{i}.resnets.{j}": f"input_blocks.{n}.0"}
            heads |= {f"down_blocks.{i}.attentions.{j}": f"input_blocks.{n}.1"}
            n += 1
        heads |= {f"down_blocks.{i}.downsamplers.0.conv": f"input_blocks.{n}.0.op"}
        n += 1
    resnet = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
    resnet |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    for key, tensor in tensors_of(net).items():
        head = next(head for head in sorted(heads, key=len, reverse=True) if key.startswith(f"{head}."))
        rest = key.removeprefix(f"{head}.")
        if ".resnets." in head:
            layer, _, leaf = rest.partition(".")
            rest = f"{resnet[layer]}.{leaf}"
        new[f"{heads[head]}.{rest}"] = tensor
    return new


def assert_same(a, b) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and np.asarray(a[key]).tobytes() == np.asarray(b[key]).tobytes(), key


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a net like that of Stable Diffusion 1.x, and its file by its authors."""
    folder = tmp_path_factory.mktemp("nets") / "canny"
    net = reference_controlnet.build(FOUR, conditioning_embedding_out_channels=(4, 6, 8, 8))
    net.save_pretrained(folder)
    written = authors_layout(net)
    save_file({f"control_model.{key}": tensor for key, tensor in written.items()}, folder.with_suffix(".safetensors"))
    return folder


def test_folder_to_file_to_folder_is_the_same_bits(folder, tmp_path):
    file, again, lines = tmp_path / "cn.safetensors", tmp_path / "again", []
    convert(folder, file, "ldm", log=lines.append)
    assert lines[0] == f"{folder}: sd1" and "controlnet: 338 tensors" in lines[1] and "wrote" in lines[2]
    authors = load_file(folder.with_suffix(".safetensors"))
    assert_same(load_file(file), authors)
    assert authors["control_model.input_hint_block.14.weight"].shape == (32, 8, 3, 3)
    convert(file, again, "diffusers", log=lines.append)
    stored = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert_same(load_file(again / "diffusion_pytorch_model.safetensors"), stored)
    theirs, ours = (build(open_controlnet(each))[0].config for each in (folder, again))
    assert {key for key in ours if ours[key] != theirs[key]} == set()
    convert(again, again, "diffusers", dtype="float16", overwrite=True, log=lines.append)
    net = diffusers.ControlNetModel.from_pretrained(again, torch_dtype=torch.float16)
    assert_same(tensors_of(net), {key: value.astype(np.float16) for key, value in stored.items()})


def test_diffusers_reads_the_file(folder, tmp_path):
    """Its reader has the numbers of Stable Diffusion 1.x: two layers a level and eight convolutions of the image."""
    convert(folder, tmp_path / "cn.safetensors", "ldm", log=lambda _: None)
    net = diffusers.ControlNetModel.from_single_file(tmp_path / "cn.safetensors", config=str(folder))
    assert_same(tensors_of(net), load_file(folder / "diffusion_pytorch_model.safetensors"))


@pytest.mark.parametrize("layout", ["without a prefix", "diffusers", "beside a model, pickled"])
def test_other_files_open(layout, folder, tmp_path):
    path, stored = tmp_path / "net.safetensors", load_file(folder / "diffusion_pytorch_model.safetensors")
    tensors = load_file(folder.with_suffix(".safetensors"))
    if layout == "without a prefix":
        save_file({key.removeprefix("control_model."): tensor for key, tensor in tensors.items()}, path)
    elif layout == "diffusers":
        save_file(stored, path)
    else:
        path = tmp_path / "net.pth"
        others = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(3), "betas": torch.zeros(2)}
        torch.save({key: torch.from_numpy(tensor) for key, tensor in tensors.items()} | others, path)
    model = open_controlnet(path)
    assert is_controlnet(path) and model.family == "sd1"
    assert_same(model.tensors["controlnet"], stored)
    assert len(model.left_out) == 2 * (path.suffix == ".pth")
    build(model)


def test_sdxl_both_ways_and_what_a_file_does_not_record(tmp_path):
    net = reference_controlnet.build(XL, norm_num_groups=2)
    net.save_pretrained(tmp_path / "net")
    convert(tmp_path / "net", tmp_path / "cn.safetensors", "ldm", log=lambda _: None)
    assert "control_model.label_emb.0.2.bias" in load_file(tmp_path / "cn.safetensors")
    model = open_controlnet(tmp_path / "cn.safetensors")
    assert model.family == "sdxl" and model.configs["controlnet"]["addition_time_embed_dim"] == 256
    known = with_unet(model, XL | {"norm_num_groups": 2})
    assert not known.guessed and known.configs["controlnet"]["attention_head_dim"] == (1, 2)
    theirs, (ours, _) = build(open_controlnet(tmp_path / "net"))[0], build(known)
    assert {key for key in ours.config if ours.config[key] != theirs.config[key]} == set()
    assert_same(known.tensors["controlnet"], tensors_of(net))


def test_pooling_is_in_the_name_of_a_file_alone(tmp_path):
    reference_controlnet.build(SD1, global_pool_conditions=True).save_pretrained(tmp_path / "net")
    with pytest.raises(ModelError, match="global_pool_conditions of .*net is true.*; add 'shuffle' to the name of"):
        convert(tmp_path / "net", tmp_path / "cn.safetensors", "ldm", log=lambda _: None)
    convert(tmp_path / "net", tmp_path / "control_v11e_sd15_Shuffle.safetensors", "ldm", log=lambda _: None)
    model = open_controlnet(tmp_path / "control_v11e_sd15_Shuffle.safetensors")
    assert model.configs["controlnet"]["global_pool_conditions"] is True


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lora_controlnet": np.zeros(1)}, "is a Control-LoRA, which is not supported; use a ControlNetModel"),
        ({"task_embedding": np.zeros(1)}, "is a union of ControlNets"),
        ({"control_model.odd.weight": np.zeros(1)}, "1 keys are unknown in a ControlNet: control_model.odd.weight"),
        ({"control_model.input_blocks.0.0.weight": None}, "lacks conv_in.weight: it is incomplete, copy it again"),
        ({"control_model.input_blocks.0.0.weight": np.zeros(3)}, r"has conv_in.weight of shape \[3\]: it is inc"),
        ({"control_model.input_hint_block.0.weight": None}, "has neither control_model.input_hint_block.0.weight nor"),
        ({"control_model.input_blocks.1.0.in_layers.2.weight": None}, "1 keys missing"),
        ({"control_model.zero_convs.1.0.bias": np.zeros(9, np.float32)}, r"controlnet_down_blocks.1.bias \[9\], "),
    ],
)
def test_files_that_are_not_whole_are_named(change, message, folder, tmp_path):
    tensors = load_file(folder.with_suffix(".safetensors")) | change
    path = tmp_path / "net.safetensors"
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, path)
    with pytest.raises(ModelError, match=f"net.safetensors.*(\n.*)?{message}"):
        build(open_controlnet(path))


def test_other_mistakes_name_the_remedy(folder, tmp_path):
    for name, message in [
        (tmp_path / "none", "there is no ControlNet .*; use a folder, a file, or a hub id"),
        ("shapes", "there is no ControlNet 'shapes'"),
    ]:
        with pytest.raises(ModelError, match=message):
            open_controlnet(name)
    with pytest.raises(ModelError, match="is a ControlNet; use its model, with this folder as controlnet"):
        open_model(folder)
    with pytest.raises(ModelError, match="is a ControlNet by its keys control_model.*as controlnet"):
        open_model(folder.with_suffix(".safetensors"))
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "config.json").write_text('{"_class_name": "ControlNetUnionModel"}')
    with pytest.raises(ModelError, match="class 'ControlNetUnionModel' is not supported as a ControlNet"):
        open_controlnet(other)
    (other / "model_index.json").write_text("{}")
    with pytest.raises(ModelError, match="other is a whole model; use the folder of a ControlNet"):
        open_controlnet(other)
    bgr = reference_controlnet.build(SD1, controlnet_conditioning_channel_order="bgr")
    bgr.save_pretrained(tmp_path / "bgr")
    target = tmp_path / "cn.safetensors"
    for source, format, options, message in [
        (tmp_path / "bgr", "ldm", {}, "channel_order='bgr' cannot be written in the layout ldm; use format diffusers"),
        (folder, "ldm", {"merge": ["x"]}, "is a ControlNet, one network without a schedule; omit merge"),
        (folder, "ldm", {"ema": True}, "omit ema"),
        (folder, "orbax", {}, "is a ControlNet, which format orbax cannot hold; use diffusers or ldm"),
        (folder, "lora-peft", {}, "is for LoRAs"),
    ]:
        with pytest.raises(ModelError, match=message):
            convert(source, target, format, log=lambda _: None, **options)
    reference_controlnet.build(XL).save_pretrained(tmp_path / "xl")
    with pytest.raises(ModelError, match="xl is of family sdxl and the base shapes of sd1; use a base of the same"):
        convert(tmp_path / "xl", target, "ldm", base="shapes", log=lambda _: None)
    assert not target.exists()


def test_a_unet_names_residuals_that_are_not_its_own():
    net, unet = ControlNet.from_config(reference_controlnet.build(SD1).config), UNet2DCondition.from_config(SD1)
    z, context, t = np.zeros((1, 2, 2, 4), np.float32), np.zeros((1, 2, 16), np.float32), np.zeros(1)
    residuals = jax.eval_shape(
        lambda: net.init_with_output(jax.random.key(0), z, t, context, np.zeros((1, 4, 4, 3), np.float32))[0]
    )
    params = jax.eval_shape(unet.init, jax.random.key(0), z, t, context)
    jax.eval_shape(unet.apply, params, z, t, context, residuals=residuals)
    with pytest.raises(ValueError, match=r"residuals have \[8, 8, 8, 16\] channels, and the UNet's .* have"):
        less = residuals._replace(down=residuals.down[:3])
        jax.eval_shape(unet.apply, params, z, t, context, residuals=less)
