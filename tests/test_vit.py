"""Vision transformers against those of transformers with the same random weights, read from its files."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_towers import randomize, small_clip, small_dinov2, transformers_clip

from lcm_jax.models.layers import abstract_network, apply
from lcm_jax.models.vit import CLIP_CONFIGS, DINOV2_LARGE, CLIPModel, VisionTransformer, resampling
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.stored import map_safetensors
from lcm_jax.weights.towers import clip_params, dinov2_params

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A small CLIP model of transformers, and the tensors of the file that it writes."""
    model = transformers_clip(small_clip())
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    return model, map_safetensors(folder / "model.safetensors")[0]


def pixels(size: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, size, size, 3)).astype(np.float32)


def close(ours, theirs) -> None:
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    assert np.abs(np.asarray(ours) - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_clip_equals_transformers(clip):
    model, tensors = clip
    ids = np.random.default_rng(1).integers(0, 598, (2, 77)).astype(np.int32)
    ids[:, 0], ids[0, 9:], ids[1, 70] = 598, 599, 599
    images = torch.from_numpy(pixels(24)).permute(0, 3, 1, 2)
    expected = model(input_ids=torch.from_numpy(ids).long(), pixel_values=images)
    ours = jax.jit(CLIPModel(small_clip()).apply)(
        {"params": clip_params(tensors, small_clip(), "file")}, pixels(24), ids
    )
    for mine, theirs in ((ours[0], expected.image_embeds), (ours[1], expected.text_embeds)):
        close(mine / np.linalg.norm(mine, axis=1, keepdims=True), theirs)
    close(ours[2], model.logit_scale.exp())


def test_dinov2_equals_transformers_and_reads_both_layouts(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    config = small_dinov2()
    options = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "patch_size": 4, "image_size": 20}
    model = randomize(Dinov2Model(Dinov2Config(**options, layer_norm_eps=1e-6)))
    model.save_pretrained(tmp_path)  # by the published names, which are not those in memory
    tensors = dict(map_safetensors(tmp_path / "model.safetensors")[0])
    params = dinov2_params(tensors, config, "file")
    ours = jax.jit(VisionTransformer(config).apply)({"params": params}, pixels(20))
    close(ours, model(torch.from_numpy(pixels(20)).permute(0, 3, 1, 2)).pooler_output)
    again = dinov2_params(as_published(tensors), config, "file")
    jax.tree.map(np.testing.assert_array_equal, again, params)


def as_published(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors of transformers' Dinov2Model by the names of DINOv2's authors."""
    old = {
        "cls_token": tensors["embeddings.cls_token"],
        "mask_token": tensors["embeddings.mask_token"],
        "pos_embed": tensors["embeddings.position_embeddings"],
    }
    for leaf in ("weight", "bias"):
        old[f"patch_embed.proj.{leaf}"] = tensors[f"embeddings.patch_embeddings.projection.{leaf}"]
        old[f"norm.{leaf}"] = tensors[f"layernorm.{leaf}"]
    for i in range(2):
        layer = {k.removeprefix(f"encoder.layer.{i}."): v for k, v in tensors.items() if f"encoder.layer.{i}." in k}
        for leaf in ("weight", "bias"):
            parts = [layer[f"attention.attention.{name}.{leaf}"] for name in ("query", "key", "value")]
            old[f"blocks.{i}.attn.qkv.{leaf}"] = np.concatenate(parts)
            old[f"blocks.{i}.attn.proj.{leaf}"] = layer[f"attention.output.dense.{leaf}"]
            for same in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                old[f"blocks.{i}.{same}.{leaf}"] = layer[f"{same}.{leaf}"]
        for n in (1, 2):
            old[f"blocks.{i}.ls{n}.gamma"] = layer[f"layer_scale{n}.lambda1"]
    return old


@pytest.mark.parametrize(("size", "native"), [(16, 37), (5, 4), (8, 8)])
def test_positions_are_resampled_as_dinov2_does(size, native):
    """By the scale, not by the ratio of the sizes, without antialiasing."""
    table = np.random.default_rng(2).normal(size=(native, native)).astype(np.float32)
    scale = (size + 0.1) / native
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(table)[None, None], scale_factor=(scale, scale), mode="bicubic"
    )
    weights = resampling(size, native)
    np.testing.assert_allclose(weights @ table @ weights.T, expected[0, 0].numpy(), atol=2e-5)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-12)


def test_dinov2_takes_images_of_another_size():
    """With the resampled positions in the place of the trained ones, the network is the one of that size."""
    config, smaller = small_dinov2(), replace(small_dinov2(), image_size=12)
    network = VisionTransformer(config)
    params = jax.jit(network.init)(jax.random.key(0), pixels(20))["params"]
    table = np.asarray(params["embeddings"]["position_embedding"]["embedding"])
    weights = resampling(3, 5)
    square = np.einsum("im,jn,mnd->ijd", weights, weights, table[1:].reshape(5, 5, -1)).reshape(9, -1)
    moved = params | {
        "embeddings": params["embeddings"]
        | {"position_embedding": {"embedding": np.concatenate([table[:1], square]).astype(np.float32)}}
    }
    ours = jax.jit(network.apply)({"params": params}, pixels(12))
    expected = jax.jit(VisionTransformer(smaller).apply)({"params": moved}, pixels(12))
    np.testing.assert_allclose(ours, expected, atol=1e-5)


# Parameters of published models, from their model cards; tests/test_parity_towers.py compares every option of all.
@pytest.mark.parametrize(("name", "millions"), [("ViT-B/32", 151.3), ("ViT-L/14@336px", 427.9)])
def test_published_models_have_their_size(name, millions):
    config = CLIP_CONFIGS[name]
    size = config.vision.image_size
    shapes = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32), jax.ShapeDtypeStruct((1, 8), jnp.int32)
    abstract = abstract_network(CLIPModel(config), *shapes)
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) / 1e6 == pytest.approx(millions, abs=0.06)


def test_dinov2_large_has_its_size():
    abstract = abstract_network(VisionTransformer(DINOV2_LARGE), jax.ShapeDtypeStruct((1, 518, 518, 3), jnp.float32))
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == 304_368_640 - 1024  # without its mask token


def test_keys_that_do_not_fit_are_named(clip):
    tensors = dict(clip[1])
    del tensors["visual_projection.weight"]
    tensors["vision_model.head.weight"] = np.zeros((2, 2), np.float32)
    tensors["logit_scale"] = np.zeros(3, np.float32)
    with pytest.raises(ModelError, match="CLIP of some/file.*1 keys missing.*1 extra.*1 of another shape") as error:
        clip_params(tensors, small_clip(), "some/file")
    for part in ("- visual_projection.weight", r"+ vision_model.head.weight float32[2, 2]", "! logit_scale [3]"):
        assert part in str(error.value)


def test_a_fused_matrix_that_is_not_q_k_and_v_is_named():
    tensors = {"blocks.0.attn.qkv.weight": np.zeros((7, 24), np.float32)}
    with pytest.raises(ModelError, match=r"(?s)DINOv2 of file: .*\+ encoder.layers.0.self_attn.qkv_proj.weight"):
        dinov2_params(tensors, small_dinov2(), "file")


def test_clip_refuses_images_of_another_size():
    params = abstract_network(CLIPModel(small_clip()), *shapes_of_small_clip())
    with pytest.raises(ValueError, match=r"pixels have shape \[1, 32, 32, 3\]; use \[B, 24, 24, 3\]"):
        jax.eval_shape(
            lambda p: apply(CLIPModel(small_clip()), p, jnp.zeros((1, 32, 32, 3)), method="embed_images"), params
        )


def shapes_of_small_clip():
    return jax.ShapeDtypeStruct((1, 24, 24, 3), jnp.float32), jax.ShapeDtypeStruct((1, 8), jnp.int32)
