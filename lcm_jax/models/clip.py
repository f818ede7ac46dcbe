"""CLIP's text encoder (arXiv 2103.00020, section 2.4): a causal pre-norm transformer over byte-pair tokens.

OpenCLIP's encoders are the same network with other sizes: ViT-H in Stable Diffusion 2, ViT-bigG (with a projection) in
XL.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lcm_jax.models.attention import attention
from lcm_jax.models.layers import SIZE, Between, check_config

# Options that transformers adds to a config.json and that do not affect the output of this network.
BOILERPLATE = frozenset(
    """
    _name_or_path _commit_hash _attn_implementation_autoset bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing id2label is_encoder_decoder label2id length_penalty max_length
    min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_scores pad_token_id prefix problem_type remove_invalid_values
    repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params
    temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype
    torchscript transformers_version typical_p use_bfloat16 use_cache
    """.split()
)

PROJECTING = "CLIPTextModelWithProjection"

# Supported values of every option in the published config.json files (see `supports` in layers.py).
SUPPORTED = dict.fromkeys(BOILERPLATE) | {
    "vocab_size": (range(1, 2**24),),
    "hidden_size": (SIZE,),
    "intermediate_size": (SIZE,),
    "num_hidden_layers": (range(1, 129),),
    "num_attention_heads": (SIZE,),
    "max_position_embeddings": (SIZE[1:],),
    "hidden_act": ("quick_gelu", "gelu"),
    "layer_norm_eps": (Between(0, 1),),
    "eos_token_id": (range(2**24),),
    "projection_dim": (SIZE,),
    "initializer_range": (Between(0, 1e3),),
    "initializer_factor": (Between(0, 1e3),),
    "add_cross_attention": (False,),
    "architectures": (None, ["CLIPTextModel", "CLIPModel"], [PROJECTING]),
    "attention_dropout": (0, None),
    "cross_attention_hidden_size": (None,),
    "dropout": (0, None),
    "is_decoder": (False,),
    "model_type": ("clip_text_model",),
    "pruned_heads": ({}, None),
}


@dataclass(frozen=True)
class EncoderConfig:
    """The options of a transformer of pre-norm layers, with the defaults of CLIP's text encoder in transformers."""

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    initializer_factor: float = 1.0
    causal: bool = True  # a token attends to itself and to those before it, not to all
    layer_scale: bool = False  # a vector of parameters multiplies what attention and MLP add


@dataclass(frozen=True)
class TextConfig(EncoderConfig):
    """The options of config.json that determine the network, with the defaults of transformers."""

    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407
    projection_dim: int = 512
    initializer_range: float = 0.02
    projects: bool = False  # CLIPTextModelWithProjection: `pooled` is projected


class TextOutput(NamedTuple):
    """The outputs of the text encoder, in the compute dtype."""

    last_hidden_state: jax.Array  # [B, L, D], last layer that is not skipped, after the final norm
    pooled: jax.Array  # [B, D], last layer after the norm, at the end-of-text token; [B, P] if projected
    hidden_states: tuple[jax.Array, ...]  # the embeddings, then each layer, [B, L, D] before the final norm


def read_config(config: Mapping[str, Any]) -> TextConfig:
    """Read a published config.json. Raises ValueError that names the unsupported options."""
    check_config("CLIPTextModel", config, SUPPORTED)
    own = {field.name for field in fields(TextConfig)} & SUPPORTED.keys()
    projects = config.get("architectures") == [PROJECTING]
    options = TextConfig(**{name: value for name, value in config.items() if name in own}, projects=projects)
    if options.hidden_size % options.num_attention_heads:
        raise ValueError(
            f"CLIPTextModel config: hidden_size={options.hidden_size} is not a multiple of "
            f"num_attention_heads={options.num_attention_heads}"
        )
    return options


def activation(name: str, x: jax.Array) -> jax.Array:
    """Return x sigmoid(1.702 x) for quick_gelu, x Phi(x) with the error function for gelu."""
    return x * jax.nn.sigmoid(1.702 * x) if name == "quick_gelu" else jax.nn.gelu(x, approximate=False)


def normal(stddev: float):
    return nn.initializers.normal(stddev)


# CLIP's initialization: tables at 0.02 and 0.01, the inputs of a block at 1/sqrt(width), and the two projections into
# the residual stream smaller by sqrt(2 layers), so that its variance does not grow with depth.


class Embeddings(nn.Module):
    config: TextConfig
    dtype: Any

    @nn.compact
    def __call__(self, token_ids: jax.Array) -> jax.Array:
        c = self.config
        std = c.initializer_range * c.initializer_factor

        def table(rows, std, name):
            return nn.Embed(rows, c.hidden_size, self.dtype, embedding_init=normal(std), name=name)

        tokens = table(c.vocab_size, std, "token_embedding")(token_ids)
        return tokens + table(c.max_position_embeddings, std / 2, "position_embedding")(
            jnp.arange(token_ids.shape[1])[None]
        )


class SelfAttention(nn.Module):
    config: EncoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, (batch, length, width) = self.config, x.shape
        std = width**-0.5 * c.initializer_factor

        def project(name):
            y = nn.Dense(width, dtype=self.dtype, kernel_init=normal(std), name=name)(x)
            return y.reshape(batch, length, c.num_attention_heads, -1)

        q, k, v = project("q_proj"), project("k_proj"), project("v_proj")
        mask = jnp.tril(jnp.ones((length, length), bool))[None, None] if c.causal else None
        y = attention(q, k, v, mask).reshape(batch, length, width)
        into_stream = normal(std * (2 * c.num_hidden_layers) ** -0.5)
        return nn.Dense(width, dtype=self.dtype, kernel_init=into_stream, name="out_proj")(y)


class MLP(nn.Module):
    config: EncoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, width = self.config, x.shape[-1]
        inner = normal((2 * width) ** -0.5 * c.initializer_factor)
        into_stream = normal(width**-0.5 * (2 * c.num_hidden_layers) ** -0.5 * c.initializer_factor)
        x = nn.Dense(c.intermediate_size, dtype=self.dtype, kernel_init=inner, name="fc1")(x)
        return nn.Dense(width, dtype=self.dtype, kernel_init=into_stream, name="fc2")(activation(c.hidden_act, x))


def layer_norm(config: EncoderConfig, dtype: Any, name: str) -> nn.LayerNorm:
    # The fast variance E[x^2] - E[x]^2 cancels on CLIP's outlier channels; flax computes the statistics in float32.
    return nn.LayerNorm(config.layer_norm_eps, dtype=dtype, use_fast_variance=False, name=name)


class EncoderLayer(nn.Module):
    config: EncoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config

        def scaled(y, name):
            scale = self.param(name, nn.initializers.ones_init(), (y.shape[-1],)) if c.layer_scale else None
            return y if scale is None else y * scale.astype(y.dtype)[None, None]

        y = SelfAttention(c, self.dtype, name="self_attn")(layer_norm(c, self.dtype, "layer_norm1")(x))
        x = x + scaled(y, "layer_scale1")
        y = MLP(c, self.dtype, name="mlp")(layer_norm(c, self.dtype, "layer_norm2")(x))
        return x + scaled(y, "layer_scale2")


class Encoder(nn.Module):
    config: EncoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        states = [x]
        for i in range(self.config.num_hidden_layers):
            states.append(EncoderLayer(self.config, self.dtype, name=f"layers_{i}")(states[-1]))
        return tuple(states)


class TextTransformer(nn.Module):
    config: TextConfig
    dtype: Any

    @nn.compact
    def __call__(self, token_ids: jax.Array, skip: int) -> TextOutput:
        c = self.config
        states = Encoder(c, self.dtype, name="encoder")(Embeddings(c, self.dtype, name="embeddings")(token_ids))
        norm = layer_norm(c, self.dtype, "final_layer_norm")
        last = norm(states[-1])
        # Configs published before 2023 have eos_token_id 2, which is not the end of text; the largest id is.
        is_end = token_ids if c.eos_token_id == 2 else token_ids == c.eos_token_id
        pooled = jnp.take_along_axis(last, jnp.argmax(is_end, axis=1)[:, None, None], axis=1)[:, 0]
        return TextOutput(norm(states[-1 - skip]) if skip else last, pooled, states)


class CLIPTextModel(nn.Module):
    """Text encoder: token_ids int32[B, L] -> TextOutput.

    Parameters, softmax and norm statistics are float32; the rest is computed in `dtype`.
    """

    config: TextConfig
    dtype: Any = jnp.float32

    @classmethod
    def from_config(cls, config: Mapping[str, Any], dtype: Any = jnp.float32) -> "CLIPTextModel":
        return cls(read_config(config), dtype)

    @nn.compact
    def __call__(self, token_ids: jax.Array, skip: int = 0) -> TextOutput:
        """Encode token_ids: int32[B, L]. skip: the number of last layers that `last_hidden_state` leaves out.

        Raises ValueError if L exceeds max_position_embeddings. A token id outside the vocabulary yields NaN.
        """
        length, limit = token_ids.shape[1], self.config.max_position_embeddings
        if length > limit:
            raise ValueError(f"CLIP text encoder: {length} tokens exceed max_position_embeddings {limit}; use fewer")
        output = TextTransformer(self.config, self.dtype, name="text_model")(token_ids, skip)
        if not self.config.projects:
            return output
        project = nn.Dense(self.config.projection_dim, use_bias=False, dtype=self.dtype, name="text_projection")
        return output._replace(pooled=project(output.pooled))
