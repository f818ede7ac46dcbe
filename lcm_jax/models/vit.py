"""Vision transformers (arXiv 2010.11929): the vision towers of CLIP, whole CLIP models, and DINOv2.

CLIP (arXiv 2103.00020) embeds images and texts in one space; OpenCLIP's models (arXiv 2212.07143) are the same networks
with other sizes and the exact GELU. DINOv2 (arXiv 2304.07193) has no norm before its layers, scales what each adds, and
resamples its position embeddings for images of another size than it was trained on. The layers are those of clip.py.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.models.clip import Encoder, EncoderConfig, TextConfig, TextTransformer, layer_norm, normal


@dataclass(frozen=True)
class VisionConfig(EncoderConfig):
    """The options of a vision transformer, with the names of transformers."""

    causal: bool = False
    patch_size: int = 32
    image_size: int = 224  # pixels; the position embeddings are made for it
    pre_norm: bool = True  # before the first layer; then the patches have no bias

    @property
    def grid(self) -> int:
        """The number of patches along a side of an image of `image_size`."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class CLIPConfig:
    """A whole CLIP model; both towers are projected to `text.projection_dim`."""

    vision: VisionConfig
    text: TextConfig


def _clip(vision: tuple[int, ...], text: tuple[int, ...], projection: int, act: str, size: int = 224) -> CLIPConfig:
    """vision: width, width of the MLP, layers, heads, pixels along a patch; text: width, layers, heads."""
    *sizes, patch = vision
    width, layers, heads = text
    return CLIPConfig(
        VisionConfig(*sizes, hidden_act=act, patch_size=patch, image_size=size),
        TextConfig(width, 4 * width, layers, heads, act, projection_dim=projection),
    )


# The published models, OpenAI's and then OpenCLIP's. The widths of the MLPs of g and bigG are 4.3637 and 4.9231 times
# the model's, rounded down.
CLIP_CONFIGS = {
    "ViT-B/32": _clip((768, 3072, 12, 12, 32), (512, 12, 8), 512, "quick_gelu"),
    "ViT-L/14": _clip((1024, 4096, 24, 16, 14), (768, 12, 12), 768, "quick_gelu"),
    "ViT-L/14@336px": _clip((1024, 4096, 24, 16, 14), (768, 12, 12), 768, "quick_gelu", 336),
    "ViT-H/14": _clip((1280, 5120, 32, 16, 14), (1024, 24, 16), 1024, "gelu"),
    "ViT-g/14": _clip((1408, 6144, 40, 16, 14), (1024, 24, 16), 1024, "gelu"),
    "ViT-bigG/14": _clip((1664, 8192, 48, 16, 14), (1280, 32, 20), 1280, "gelu"),
}
DINOV2_LARGE = VisionConfig(
    1024, 4096, 24, 16, "gelu", 1e-6, layer_scale=True, patch_size=14, image_size=518, pre_norm=False
)


def resampling(size: int, native: int) -> np.ndarray:
    """Return float64[size, native], the bicubic weights by which DINOv2 resamples a row of position embeddings.

    Its code passes the scale (size + 0.1) / native to PyTorch's `interpolate`, which then uses this scale and not the
    ratio of the sizes: the grid is shifted by up to 0.1 of a cell. The kernel has a = -0.75 and is not widened when it
    shrinks; positions beyond the border are those at it.
    """
    position = (np.arange(size) + 0.5) * native / (size + 0.1) - 0.5
    first = np.floor(position).astype(int)
    weights = np.zeros((size, native))
    for offset in range(-1, 3):
        distance = np.abs(position - first - offset)
        near = (1.25 * distance - 2.25) * distance**2 + 1
        far = -0.75 * (((distance - 5) * distance + 8) * distance - 4)
        columns = np.clip(first + offset, 0, native - 1)
        np.add.at(weights, (np.arange(size), columns), np.where(distance <= 1, near, far))
    return weights


class Embeddings(nn.Module):
    """Patches of an image and a class token before them, with their positions: [B, 1 + patches, D]."""

    config: VisionConfig
    dtype: Any

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        c = self.config
        patch, width = (c.patch_size, c.patch_size), c.hidden_size
        conv = nn.Conv(width, patch, patch, "VALID", use_bias=not c.pre_norm, dtype=self.dtype, name="patch_embedding")
        patches = conv(pixels)
        batch, size = patches.shape[:2]
        token = self.param("class_embedding", normal(width**-0.5), (width,)).astype(self.dtype)
        rows = 1 + c.grid**2
        table = nn.Embed(rows, width, self.dtype, embedding_init=normal(0.02), name="position_embedding")
        positions = table(jnp.arange(rows))
        if size != c.grid:
            weights = jnp.asarray(resampling(size, c.grid), jnp.float32)
            square = positions[1:].astype(jnp.float32).reshape(c.grid, c.grid, width)
            square = jnp.einsum("im,jn,mnd->ijd", weights, weights, square, precision="highest")
            positions = jnp.concatenate([positions[:1], square.reshape(-1, width).astype(positions.dtype)])
        tokens = jnp.broadcast_to(token, (batch, 1, width))
        return jnp.concatenate([tokens, patches.reshape(batch, -1, width)], axis=1) + positions[None]


class VisionTransformer(nn.Module):
    """Vision tower: pixels float[B, S, S, 3] -> [B, D], its class token after the last norm, in the compute dtype."""

    config: VisionConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        c = self.config
        x = Embeddings(c, self.dtype, name="embeddings")(pixels.astype(self.dtype))
        if c.pre_norm:
            x = layer_norm(c, self.dtype, "pre_layrnorm")(x)  # as it is spelled in published files
        last = Encoder(c, self.dtype, name="encoder")(x)[-1]
        return layer_norm(c, self.dtype, "post_layernorm")(last[:, 0])


class CLIPModel(nn.Module):
    """A whole CLIP model. Parameters, softmax and norm statistics are float32; the rest is computed in `dtype`."""

    config: CLIPConfig
    dtype: Any = jnp.float32

    def setup(self):
        c = self.config

        def projection():
            return nn.Dense(c.text.projection_dim, use_bias=False, dtype=self.dtype)

        self.vision_model = VisionTransformer(c.vision, self.dtype)
        self.visual_projection = projection()
        self.text_model = TextTransformer(c.text, self.dtype)
        self.text_projection = projection()
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(np.log(1 / 0.07)), ())

    def embed_images(self, pixels: jax.Array) -> jax.Array:
        """pixels: float[B, S, S, 3], normalized. Return their embeddings [B, P], of any length.

        Raises ValueError if S is not the config's image_size.
        """
        size = self.config.vision.image_size
        if pixels.shape[1:] != (size, size, 3):
            raise ValueError(f"CLIP: pixels have shape {list(pixels.shape)}; use [B, {size}, {size}, 3]")
        return self.visual_projection(self.vision_model(pixels))

    def embed_texts(self, token_ids: jax.Array) -> jax.Array:
        """token_ids: int32[B, L]. Return their embeddings [B, P], of any length.

        Only tokens up to the first end of text count, so that padding by it or by 0 makes no difference.
        """
        return self.text_projection(self.text_model(token_ids, 0).pooled)

    def __call__(self, pixels: jax.Array, token_ids: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the embeddings of the images, those of the texts, and the scale of their cosines, exp(logit_scale)."""
        return self.embed_images(pixels), self.embed_texts(token_ids), jnp.exp(self.logit_scale)
