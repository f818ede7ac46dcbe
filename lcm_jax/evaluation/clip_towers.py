"""Embeddings of images and prompts by published CLIP models, which several metrics share.

In --weights_dir, the files of a model are in a folder of its name on the hub: clip-vit-large-patch14/pytorch_model.bin
of openai/clip-vit-large-patch14. All models have the tokenizer of this one. It normalizes prompts as transformers does;
OpenCLIP's own also straightens quotes and decodes HTML.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from lcm_jax.compiler import compiler_options
from lcm_jax.data import tokenizer as tokenizers
from lcm_jax.evaluation.batches import in_batches
from lcm_jax.evaluation.clip_inputs import Preprocess, for_open_clip
from lcm_jax.evaluation.evaluate import Images, Resources
from lcm_jax.models.layers import apply
from lcm_jax.models.vit import CLIP_CONFIGS, CLIPConfig, CLIPModel
from lcm_jax.weights.published import Published, Weights
from lcm_jax.weights.towers import clip_params

Rows = dict[str, np.ndarray]  # "image" float32[N, P], and of some metrics "text" float32[N, P], each of length 1
TOKENIZER = tuple(
    Published(file, "openai/clip-vit-large-patch14", folder="clip-vit-large-patch14")
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json")
)
BY_TRANSFORMERS = ("pytorch_model.bin", "model.safetensors")
BY_OPEN_CLIP = ("open_clip_pytorch_model.bin", "open_clip_model.safetensors", *reversed(BY_TRANSFORMERS))


class Tower(NamedTuple):
    """A published CLIP model: its network, its inputs, and its files on the hub, the first of which is downloaded."""

    config: CLIPConfig
    source: str
    files: tuple[str, ...]
    preprocess: Preprocess = for_open_clip

    def choose(self, weights: Weights) -> Published:
        """Return the file to read: in a folder of weights the first that is there, else the first of all."""
        published = [Published(file, self.source, folder=self.source.split("/")[1]) for file in self.files]
        there = (each for each in published if weights.folder and (weights.folder / each.folder / each.file).is_file())
        return next(there, published[0])


TOWERS = {
    "ViT-B/32": Tower(CLIP_CONFIGS["ViT-B/32"], "openai/clip-vit-base-patch32", BY_TRANSFORMERS),
    "ViT-L/14": Tower(CLIP_CONFIGS["ViT-L/14"], "openai/clip-vit-large-patch14", BY_TRANSFORMERS),
    "ViT-L/14@336px": Tower(CLIP_CONFIGS["ViT-L/14@336px"], "openai/clip-vit-large-patch14-336", BY_TRANSFORMERS),
    "ViT-H/14": Tower(CLIP_CONFIGS["ViT-H/14"], "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", BY_OPEN_CLIP),
    "ViT-g/14": Tower(CLIP_CONFIGS["ViT-g/14"], "laion/CLIP-ViT-g-14-laion2B-s12B-b42K", BY_OPEN_CLIP),
    "ViT-bigG/14": Tower(CLIP_CONFIGS["ViT-bigG/14"], "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", BY_OPEN_CLIP),
}


def prepare(images: Images, preprocess: Preprocess, size: int) -> np.ndarray:
    """Return float32[N, size, size, 3]. Raises ValueError for images that are not uint8[H, W, 3]."""
    for number, image in enumerate(images):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"image {number} is {image.dtype}{list(image.shape)}; use uint8[H, W, 3]")
    return np.stack([preprocess(image, size) for image in images])


def check_finite(rows: np.ndarray, what: str) -> np.ndarray:
    """rows: float[N, D]. Return them. Raises ValueError that names the first one with a value that is not finite."""
    if len(bad := np.flatnonzero(~np.isfinite(rows).all(1))):
        raise ValueError(f"the embedding of {what} {bad[0]} of a batch is not finite; check the weights")
    return rows


def unit(rows: np.ndarray) -> np.ndarray:
    """Return float[N, D], each row divided by its length."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@dataclass(frozen=True, eq=False)
class Encoders:
    """The two networks of a CLIP model.

    embed_images: images -> float32[N, P]; embed_texts: prompts -> float32[N, P]; each embedding has length 1. scale: of
    the cosines, as the model was trained.
    """

    embed_images: Callable[[Images], np.ndarray]
    embed_texts: Callable[[Sequence[str]], np.ndarray]
    scale: float

    def measure(self, images: Images, prompts: Sequence[str]) -> Rows:
        """Return the `measure` of metrics. Raises ValueError unless there is a prompt for each image."""
        if len(images) != len(prompts):
            raise ValueError(f"there are {len(images)} images and {len(prompts)} prompts; use a prompt for each image")
        return {"image": self.embed_images(images), "text": self.embed_texts(prompts)}


def cosines(rows: Rows) -> np.ndarray:
    """Return float64[N], the cosine of each image and its prompt."""
    return np.sum(rows["image"].astype(np.float64) * rows["text"], axis=1)


def image_encoder(
    config: CLIPConfig, params: Mapping[str, Any], preprocess: Preprocess, batch_size: int
) -> Callable[[Images], np.ndarray]:
    """Return a function images -> float32[N, P], embeddings of length 1. params: of a CLIPModel.

    The function raises ValueError for images that are not uint8[H, W, 3], and for embeddings that are not finite. It
    keeps the last batch: metrics that share it embed an image once.
    """
    encode = _encoder(config, params, "embed_images", ("vision_model", "visual_projection"))
    size = config.vision.image_size
    last: list[tuple[Images, np.ndarray]] = []

    def embed(images: Images) -> np.ndarray:
        if not last or last[0][0] is not images:
            rows = unit(check_finite(in_batches(encode, prepare(images, preprocess, size), batch_size), "image"))
            last[:] = [(images, rows)]
        return last[0][1]

    return embed


def text_encoder(
    config: CLIPConfig, params: Mapping[str, Any], tokenizer: Any, batch_size: int
) -> Callable[[Sequence[str]], np.ndarray]:
    """Return a function prompts -> float32[N, P], embeddings of length 1. params: of a CLIPModel.

    Longer prompts are cut, as the tokenizer does it. Raises ValueError for a tokenizer that the model does not fit; the
    function raises it for embeddings that are not finite.
    """
    sizes = {"tokens": len(tokenizer), "length": tokenizer.model_max_length}
    own = {"tokens": config.text.vocab_size, "length": config.text.max_position_embeddings}
    if sizes != own:
        raise ValueError(f"CLIP: the tokenizer has {sizes} and the model {own}; use the tokenizer of CLIP")
    encode = _encoder(config, params, "embed_texts", ("text_model", "text_projection"))

    def embed(prompts: Sequence[str]) -> np.ndarray:
        different = list(dict.fromkeys(prompts))
        ids = tokenizers.encode(tokenizer, different)
        rows = unit(check_finite(in_batches(encode, ids, batch_size), "prompt"))
        return rows[[different.index(prompt) for prompt in prompts]]

    return embed


def _encoder(config: CLIPConfig, params: Mapping[str, Any], method: str, parts: tuple[str, ...]):
    network = CLIPModel(config)

    @partial(jax.jit, compiler_options=compiler_options())
    def encode(params, inputs):
        with jax.default_matmul_precision("highest"):  # TF32 changes the third digit of a cosine
            return apply(network, params, inputs, method=method)

    own = jax.device_put({name: params[name] for name in (*parts, "logit_scale")})
    return lambda inputs: encode(own, inputs)


def open_params(resources: Resources, name: str, published: Published | None = None) -> Mapping[str, Any]:
    """Return the parameters of a CLIPModel, float32, the same ones for the same arguments.

    name: one of TOWERS. published: a file of fine-tuned weights, in place of the tower's. Raises ModelError for a file
    that cannot be found, and for keys that do not fit.
    """

    def make() -> Mapping[str, Any]:
        file = published or TOWERS[name].choose(resources.weights)
        return clip_params(resources.weights.open(file), TOWERS[name].config, f"{file.source}/{file.file}")

    return resources.once(("clip", name, published), make)


def open_image_encoder(
    resources: Resources, name: str, published: Published | None = None, preprocess: Preprocess | None = None
) -> Callable[[Images], np.ndarray]:
    """Return the `image_encoder` of a CLIP model, the same one for the same arguments.

    preprocess: of a fine-tuned model, in place of the tower's. Raises ModelError as `open_params` does.
    """
    chosen = preprocess or TOWERS[name].preprocess

    def make() -> Callable[[Images], np.ndarray]:
        params = open_params(resources, name, published)
        return image_encoder(TOWERS[name].config, params, chosen, resources.batch_size)

    return resources.once(("clip images", name, published, chosen), make)


def open_encoders(
    resources: Resources, name: str, published: Published | None = None, preprocess: Preprocess | None = None
) -> Encoders:
    """Return both encoders of a CLIP model, the same ones for the same arguments, which are `open_image_encoder`'s.

    Raises ModelError as `open_params` and `open_tokenizer` do.
    """

    def make() -> Encoders:
        images = open_image_encoder(resources, name, published, preprocess)
        params = open_params(resources, name, published)
        tokenizer = resources.once("clip tokenizer", lambda: open_tokenizer(resources.weights))
        texts = text_encoder(TOWERS[name].config, params, tokenizer, resources.batch_size)
        return Encoders(images, texts, float(np.exp(params["logit_scale"])))

    return resources.once(("clip pairs", name, published, preprocess), make)


def open_tokenizer(weights: Weights) -> Any:
    """Return the tokenizer of CLIP. Raises ModelError for a file that cannot be found."""
    paths = [weights.find(published) for published in TOKENIZER]
    return tokenizers.load(paths[0].parent)
