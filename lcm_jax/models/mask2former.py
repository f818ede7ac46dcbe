"""Mask2Former (arXiv 2112.01527) with a Swin backbone: queries that each predict a class and a mask.

The network that transformers publishes as `facebook/mask2former-swin-small-coco-instance` and the like. NHWC; submodule
names follow the keys of transformers' weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lcm_jax.models.attention import attention
from lcm_jax.models.clip import BOILERPLATE
from lcm_jax.models.layers import COUNT, SIZE, Between, check_config, freeze
from lcm_jax.models.pixel_decoder import GROUPS, LEVELS, PixelDecoder, resize, sine_positions
from lcm_jax.models.swin import SwinBackbone, SwinConfig, layer_norm

STRIDE = 32  # of the backbone; heights and widths of images are multiples of it
STAGES = 4

# Supported values of every option in the published config.json files (see `supports` in layers.py).
BASE = dict.fromkeys(BOILERPLATE) | {
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "is_decoder": (False,),
    "pruned_heads": ({}, None),
}
SUPPORTED = BASE | {
    "activation_function": ("relu",),
    "architectures": (None, ["Mask2FormerForUniversalSegmentation"]),
    "backbone": (None,),
    "backbone_config": None,  # checked by BACKBONE
    "backbone_kwargs": (None,),
    "class_weight": None,
    "common_stride": (4,),
    "decoder_layers": (range(2, 65),),
    "dice_weight": None,
    "dim_feedforward": (SIZE,),
    "dropout": None,  # of training
    "encoder_feedforward_dim": (SIZE,),
    "encoder_layers": (COUNT,),
    "enforce_input_projection": (False, True),
    "feature_size": (SIZE,),
    "feature_strides": ([4, 8, 16, 32],),
    "hidden_dim": (SIZE,),
    "hidden_size": None,  # a copy of hidden_dim
    "ignore_value": None,
    "importance_sample_ratio": None,
    "init_std": None,
    "init_xavier_std": None,
    "mask_feature_size": (SIZE,),
    "mask_weight": None,
    "model_type": ("mask2former",),
    "no_object_weight": None,
    "num_attention_heads": (SIZE,),
    "num_hidden_layers": None,  # a copy of decoder_layers
    "num_labels": (SIZE,),
    "num_queries": (SIZE,),
    "output_auxiliary_logits": None,
    "oversample_ratio": None,
    "pre_norm": (False,),
    "train_num_points": None,
    "use_auxiliary_loss": None,
    "use_pretrained_backbone": None,
    "use_timm_backbone": (False,),
}
BACKBONE = BASE | {
    "architectures": None,
    "attention_probs_dropout_prob": None,
    "depths": ([COUNT],),
    "drop_path_rate": None,
    "embed_dim": (SIZE,),
    "encoder_stride": None,
    "hidden_act": ("gelu", "relu"),
    "hidden_dropout_prob": None,
    "hidden_size": None,  # follows from embed_dim
    "image_size": None,
    "initializer_range": None,
    "layer_norm_eps": (Between(0, 1),),
    "mlp_ratio": (Between(0.125, 64),),
    "model_type": ("swin",),
    "num_channels": (3,),
    "num_heads": ([SIZE],),
    "num_layers": (STAGES,),
    "out_features": (["stage1", "stage2", "stage3", "stage4"],),
    "out_indices": ([1, 2, 3, 4],),
    "patch_size": (4,),
    "path_norm": None,
    "qkv_bias": (False, True),
    "stage_names": None,
    "use_absolute_embeddings": (False,),
    "window_size": (range(2, 65),),
}


@dataclass(frozen=True)
class Mask2FormerConfig:
    """The options of config.json that determine the network, with the values of the published Swin-S for COCO."""

    backbone: SwinConfig = SwinConfig()
    feature_size: int = 256
    mask_feature_size: int = 256
    hidden_dim: int = 256
    encoder_feedforward_dim: int = 1024
    encoder_layers: int = 6
    decoder_layers: int = 10  # one more than there are, as published
    num_attention_heads: int = 8
    dim_feedforward: int = 2048
    num_queries: int = 100
    num_labels: int = 80
    enforce_input_projection: bool = False


class Predictions(NamedTuple):
    """The outputs of the network for Q queries, float32."""

    classes: jax.Array  # [B, Q, labels + 1], logits; the last one is "no object"
    masks: jax.Array  # [B, Q, H / 4, W / 4], logits


def read_config(config: Mapping[str, Any]) -> Mask2FormerConfig:
    """Read a published config.json. Raises ValueError that names the unsupported options."""
    name = "Mask2Former"
    check_config(name, config, SUPPORTED)
    inner = config.get("backbone_config")
    if not isinstance(inner, Mapping):
        raise ValueError(f"{name} config: backbone_config={inner!r} is not supported; it needs the options of a Swin")
    check_config(f"{name} backbone", inner, BACKBONE)
    labels = config.get("id2label", config.get("num_labels", Mask2FormerConfig.num_labels))
    if not isinstance(labels, Mapping | int) or not labels:
        raise ValueError(f"{name} config: id2label={labels!r} is not supported; it needs the names of the classes")
    own = {field.name for field in fields(Mask2FormerConfig)} - {"backbone", "num_labels"}
    listed = {key: value for key, value in config.items() if key in own}
    count = len(labels) if isinstance(labels, Mapping) else labels
    options = Mask2FormerConfig(backbone=_read_backbone(name, inner), num_labels=count, **listed)
    heads = options.num_attention_heads
    for key, multiple in (("feature_size", heads), ("hidden_dim", heads), ("feature_size", GROUPS), ("hidden_dim", 4)):
        if getattr(options, key) % multiple:
            raise ValueError(f"{name} config: {key}={getattr(options, key)} is not a multiple of {multiple}")
    return options


def _read_backbone(name: str, config: Mapping[str, Any]) -> SwinConfig:
    own = {field.name for field in fields(SwinConfig)}
    options = SwinConfig(**{k: freeze(v) for k, v in config.items() if k in own})
    widths = [options.embed_dim * 2**i for i in range(STAGES)]
    if len(options.depths) != STAGES or len(options.num_heads) != STAGES:
        raise ValueError(
            f"{name} config: depths={list(options.depths)} and num_heads={list(options.num_heads)} of the backbone are "
            f"not supported; each needs {STAGES} values"
        )
    if any(width % heads for width, heads in zip(widths, options.num_heads, strict=True)):
        raise ValueError(
            f"{name} config: the widths {widths} of the backbone are not multiples of "
            f"num_heads={list(options.num_heads)}"
        )
    return options


class Table(nn.Module):
    """A learned table [rows, features]. By the naming rule its leaf is a kernel, which is stored transposed."""

    rows: int
    features: int

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("kernel", nn.initializers.normal(1.0), (self.features, self.rows)).T


class SelfAttention(nn.Module):
    """Attention among the queries x: [B, Q, C]; positions: [1, Q, C] are added to queries and keys."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        batch, length, width = x.shape

        def project(y, name):
            y = nn.Dense(width, dtype=self.dtype, name=name)(y)
            return y.reshape(batch, length, self.heads, -1)

        placed = x + positions
        y = attention(project(placed, "q_proj"), project(placed, "k_proj"), project(x, "v_proj"))
        return nn.Dense(width, dtype=self.dtype, name="out_proj")(y.reshape(batch, length, width))


class MaskedAttention(nn.Module):
    """Attention of queries: [B, Q, C] to keys and values: [B, N, C] where mask: bool[B, Q, N] is True.

    The three projections are stored as one, as in PyTorch's MultiheadAttention: its leaves are no kernels.
    """

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
        width = queries.shape[-1]
        weight = self.param("in_proj_weight", nn.initializers.xavier_uniform(), (3 * width, width))
        bias = self.param("in_proj_bias", nn.initializers.zeros, (3 * width,))

        def project(x, w, b):
            y = x @ w.T.astype(self.dtype) + b.astype(self.dtype).reshape(1, 1, -1)
            return y.reshape(*x.shape[:2], self.heads, -1)

        inputs = (queries, keys, values)
        q, k, v = map(project, inputs, jnp.split(weight, 3), jnp.split(bias, 3))
        y = attention(q, k, v, mask[:, None])
        return nn.Dense(width, dtype=self.dtype, name="out_proj")(y.reshape(queries.shape))


class DecoderLayer(nn.Module):
    config: Mask2FormerConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, x: jax.Array, query_positions: jax.Array, features: jax.Array, positions: jax.Array, mask: jax.Array
    ) -> jax.Array:
        c = self.config
        cross = MaskedAttention(c.num_attention_heads, self.dtype, name="cross_attn")
        y = cross(x + query_positions, features + positions, features, mask)
        x = layer_norm(self.dtype, "cross_attn_layer_norm")(x + y)
        y = SelfAttention(c.num_attention_heads, self.dtype, name="self_attn")(x, query_positions)
        x = layer_norm(self.dtype, "self_attn_layer_norm")(x + y)
        y = nn.relu(nn.Dense(c.dim_feedforward, dtype=self.dtype, name="fc1")(x))
        y = nn.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(y)
        return layer_norm(self.dtype, "final_layer_norm")(x + y)


class MaskPredictor(nn.Module):
    """Masks as products of an embedding of each query with the features of each pixel.

    x: [B, Q, C]; pixels: [B, H, W, mask_feature_size]. Returns float32[B, H, W, Q], logits.
    """

    config: Mask2FormerConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, pixels: jax.Array) -> jax.Array:
        c = self.config
        for i, size in enumerate((c.hidden_dim, c.hidden_dim, c.mask_feature_size)):
            x = nn.Dense(size, dtype=self.dtype, name=f"mask_embedder_{i}_0")(nn.relu(x) if i else x)
        return jnp.einsum("bqc,bhwc->bhwq", x, pixels, preferred_element_type=jnp.float32)


def attention_mask(masks: jax.Array, size: tuple[int, int]) -> jax.Array:
    """masks: float32[B, H, W, Q], logits. Return bool[B, Q, N], True for the N positions that each query attends to.

    These are those inside its mask, resized to `size`, or all if there is none.
    """
    resized = jax.nn.sigmoid(resize(masks, size))
    inside = (resized >= 0.5).reshape(masks.shape[0], -1, masks.shape[-1]).swapaxes(1, 2)
    return inside | ~inside.any(axis=-1, keepdims=True)


class Decoder(nn.Module):
    config: Mask2FormerConfig
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        query_positions: jax.Array,
        features: Sequence[jax.Array],
        positions: Sequence[jax.Array],
        sizes: Sequence[tuple[int, int]],
        pixels: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        norm = layer_norm(self.dtype, "layernorm")
        predict = MaskPredictor(self.config, self.dtype, name="mask_predictor")
        masks = predict(norm(x), pixels)
        for i in range(self.config.decoder_layers - 1):
            level = i % LEVELS
            mask = attention_mask(masks, sizes[level])
            layer = DecoderLayer(self.config, self.dtype, name=f"layers_{i}")
            x = layer(x, query_positions, features[level], positions[level], mask)
            masks = predict(norm(x), pixels)
        return norm(x), masks


class TransformerModule(nn.Module):
    """Queries that attend to features of three scales in turn, each within the mask that it predicts so far."""

    config: Mask2FormerConfig
    dtype: Any

    @nn.compact
    def __call__(self, pixels: jax.Array, scales: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
        c = self.config
        levels = Table(LEVELS, c.hidden_dim, name="level_embed")().astype(self.dtype)
        query_positions = Table(c.num_queries, c.hidden_dim, name="queries_embedder")().astype(self.dtype)
        queries = Table(c.num_queries, c.hidden_dim, name="queries_features")().astype(self.dtype)
        features, positions, sizes = [], [], []
        for i, x in enumerate(scales):
            height, width = x.shape[1:3]
            sizes.append((height, width))
            position = sine_positions(height, width, c.hidden_dim).reshape(1, -1, c.hidden_dim)
            positions.append(jnp.asarray(position, self.dtype))
            if c.feature_size != c.hidden_dim or c.enforce_input_projection:
                x = nn.Conv(c.hidden_dim, (1, 1), dtype=self.dtype, name=f"input_projections_{i}")(x)
            features.append(x.reshape(x.shape[0], -1, c.hidden_dim) + levels[i].reshape(1, 1, -1))
        x = jnp.broadcast_to(queries, (pixels.shape[0], *queries.shape))
        decoder = Decoder(c, self.dtype, name="decoder")
        return decoder(x, query_positions[None], features, positions, sizes, pixels)


class PixelLevelModule(nn.Module):
    config: Mask2FormerConfig
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        c = self.config
        features = SwinBackbone(c.backbone, self.dtype, name="encoder")(images)
        decoder = PixelDecoder(
            c.feature_size,
            c.mask_feature_size,
            c.encoder_layers,
            c.num_attention_heads,
            c.encoder_feedforward_dim,
            self.dtype,
            name="decoder",
        )
        return decoder(features)


class Model(nn.Module):
    config: Mask2FormerConfig
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        pixels, scales = PixelLevelModule(self.config, self.dtype, name="pixel_level_module")(images)
        return TransformerModule(self.config, self.dtype, name="transformer_module")(pixels, scales)


class Mask2Former(nn.Module):
    """Mask2Former: images float32[B, H, W, 3], normalized -> Predictions.

    H and W are multiples of STRIDE. Parameters, softmax and norm statistics are float32; the rest is computed in
    `dtype`.
    """

    config: Mask2FormerConfig
    dtype: Any = jnp.float32

    @classmethod
    def from_config(cls, config: Mapping[str, Any], dtype: Any = jnp.float32) -> "Mask2Former":
        return cls(read_config(config), dtype)

    @nn.compact
    def __call__(self, images: jax.Array) -> Predictions:
        """Raise ValueError for images whose height or width is not a multiple of STRIDE."""
        height, width = images.shape[1:3]
        if height % STRIDE or width % STRIDE:
            raise ValueError(f"images of {width} x {height} are not supported; pad them to multiples of {STRIDE}")
        queries, masks = Model(self.config, self.dtype, name="model")(images.astype(self.dtype))
        classes = nn.Dense(self.config.num_labels + 1, dtype=self.dtype, name="class_predictor")(queries)
        return Predictions(classes.astype(jnp.float32), masks.transpose(0, 3, 1, 2))
