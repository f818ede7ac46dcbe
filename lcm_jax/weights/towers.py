"""Published weights of CLIP models and of DINOv2, to the parameter trees of models/vit.py.

CLIP has two layouts: transformers' (`vision_model.encoder.layers.0.self_attn.q_proj.weight`), whose names are those of
the trees, and OpenCLIP's (`visual.transformer.resblocks.0.attn.in_proj_weight`), with q, k and v in one matrix and
transposed projections. DINOv2 has its authors' (`blocks.0.attn.qkv.weight`) and transformers'
(`encoder.layer.0.attention.attention.query.weight`).
"""

import re
from collections.abc import Iterator, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.models.layers import abstract_network
from lcm_jax.models.vit import CLIPConfig, CLIPModel, VisionConfig, VisionTransformer
from lcm_jax.weights.single_file import OPEN_LAYER, PROJECTION, count, open_clip_names, rename, under
from lcm_jax.weights.trees import Params, to_params

VISUAL_PROJECTION = "visual_projection.weight"
# Buffers and parameters that inference does not use.
UNUSED = re.compile(r"(.*\.)?(position_ids|attn_mask|mask_token)$")
# Parts of DINOv2's names, its authors' and transformers', to parts of CLIP's, in this order.
DINOV2_NAMES = (
    (r"^blocks\.", "encoder.layers."),
    (r"^encoder\.layer\.", "encoder.layers."),
    (r"^(embeddings\.)?cls_token$", "embeddings.class_embedding"),
    (r"^(pos_embed|embeddings\.position_embeddings)$", "embeddings.position_embedding.weight"),
    (r"^(patch_embed\.proj|embeddings\.patch_embeddings\.projection)\.", "embeddings.patch_embedding."),
    (r"^(norm|layernorm)\.", "post_layernorm."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.(ls|layer_scale)([12])\.(gamma|lambda1)$", r".layer_scale\2"),
    (r"\.attn\.qkv\.", ".self_attn.qkv_proj."),
    (r"\.attn\.proj\.", ".self_attn.out_proj."),
    (r"\.attention\.attention\.(query|key|value)\.", lambda match: f".self_attn.{match[1][0]}_proj."),
    (r"\.attention\.output\.dense\.", ".self_attn.out_proj."),
)


def clip_params(tensors: Mapping[str, np.ndarray], config: CLIPConfig, where: str) -> Params:
    """Return the float32 parameters of a CLIPModel from the tensors of a file, in either layout.

    where: the file's name for errors. Raises ModelError that names the keys which are missing, extra, or misshapen.
    """
    size = config.vision.image_size
    inputs = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32), jax.ShapeDtypeStruct((1, 8), jnp.int32)
    items = _from_open_clip(tensors) if "visual.conv1.weight" in tensors else _used(tensors)
    return _params("CLIP", CLIPModel(config), inputs, items, where)


def dinov2_params(tensors: Mapping[str, np.ndarray], config: VisionConfig, where: str) -> Params:
    """Return the float32 parameters of DINOv2's VisionTransformer from the tensors of a file, in either layout.

    Raises ModelError as `clip_params` does.
    """
    inputs = (jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32),)
    return _params("DINOv2", VisionTransformer(config), inputs, _from_dinov2(tensors), where)


def _params(
    name: str,
    network: nn.Module,
    inputs: tuple[jax.ShapeDtypeStruct, ...],
    items: Iterator[tuple[str, np.ndarray]],
    where: str,
) -> Params:
    return to_params(name, dict(items), abstract_network(network, *inputs), where, cast=lambda _: np.float32)


def _used(tensors: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    return ((key, tensors[key]) for key in tensors if not UNUSED.fullmatch(key))


def _from_open_clip(tensors: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield transformers' names and tensors; a key without one keeps its own, and is then reported as extra."""
    names = open_clip_names(count(tensors, "transformer.resblocks.")) | {
        "logit_scale": "logit_scale",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1": "vision_model.embeddings.patch_embedding",
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
        "visual.proj": VISUAL_PROJECTION,
    }
    for i in range(count(tensors, "visual.transformer.resblocks.")):
        names |= under(OPEN_LAYER, f"visual.transformer.resblocks.{i}", f"vision_model.encoder.layers.{i}")
    for key, tensor in _used(tensors):
        name = rename(key, names) or key
        yield from _split(name, tensor.T if name in (PROJECTION, VISUAL_PROJECTION) else tensor)


def _from_dinov2(tensors: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    for key, tensor in _used(tensors):
        name = key
        for pattern, new in DINOV2_NAMES:
            name = re.sub(pattern, new, name)
        if name == "embeddings.class_embedding":
            yield name, tensor.reshape(-1)
        elif name == "embeddings.position_embedding.weight":
            yield name, tensor.reshape(tensor.shape[-2:])
        else:
            yield from _split(name, tensor)


def _split(name: str, tensor: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield q, k and v of a tensor that has them one below the other; any other tensor as it is."""
    if ".qkv_proj." in name and tensor.ndim and len(tensor) % 3 == 0:
        for letter, part in zip("qkv", np.split(tensor, 3), strict=True):
            yield name.replace(".qkv_proj.", f".{letter}_proj."), part
    else:
        yield name, tensor
