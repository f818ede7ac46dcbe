"""Models of human preference on CLIP's embeddings: PickScore, HPSv2.1, and LAION's aesthetic predictor.

ImageReward (arXiv 2304.05977) is left out: it needs a BLIP tower and BERT's tokenizer, which nothing else here uses,
and by the papers of PickScore and of HPSv2, it agrees less with people than they do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from lcm_jax.evaluation.clip_inputs import for_hps, for_transformers
from lcm_jax.evaluation.clip_towers import Encoders, Rows, cosines, open_encoders, open_image_encoder
from lcm_jax.evaluation.evaluate import Column, Images, Measure, Resources
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.published import Published

PICK_SCORE = Published("model.safetensors", "yuvalkirstain/PickScore_v1", folder="PickScore_v1")
HPS_WEIGHTS = Published("HPS_v2.1_compressed.pt", "xswu/HPSv2")
AESTHETIC = Published(
    "sac+logos+ava1-l14-linearMSE.pth",
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth",
)
WIDTHS = {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}  # by the number of the layer

Layers = list[tuple[np.ndarray, np.ndarray]]  # weight [outputs, inputs], bias [outputs]


@dataclass(frozen=True, eq=False)
class PickScore:
    """Metric: PickScore (arXiv 2305.01569), the scaled cosine in a ViT-H/14 that was tuned on people's choices.

    Its own code takes the softmax over the images of a prompt; what papers report is the scaled cosine before it, about
    17 to 24.
    """

    columns: ClassVar[Mapping[str, Column]] = {"pick_score": Column("PickScore", ".3f")}
    lower_is_better: ClassVar[bool] = False
    sources: ClassVar[tuple[str, ...] | None] = None
    packages: ClassVar[Mapping[str, str]] = {}
    resamplings: ClassVar[int] = 200
    reads_prompts: ClassVar[bool] = True

    encoders: Encoders

    @classmethod
    def create(cls, resources: Resources) -> Self:
        """Raise ModelError if there are no weights."""
        return cls(open_encoders(resources, "ViT-H/14", PICK_SCORE, for_transformers))

    @property
    def measure(self) -> Measure:
        return self.encoders.measure

    @property
    def note(self) -> str:
        return "PickScore is the mean scaled cosine of images and prompts by PickScore_v1 (ViT-H/14)."

    def result(self, rows: Rows) -> dict[str, float]:
        return {"pick_score": round(float(self.scores(rows).mean()), 5)}

    def scores(self, rows: Rows) -> np.ndarray:
        return self.encoders.scale * cosines(rows)


@dataclass(frozen=True, eq=False)
class HPS:
    """Metric: the Human Preference Score v2.1 (arXiv 2306.09341), 100 times the cosine in a tuned ViT-H/14.

    The package hpsv2 returns the cosine of an image, about 0.28, and prints 100 times its mean, as papers do.
    """

    columns: ClassVar[Mapping[str, Column]] = {"hps": Column("HPSv2.1", ".2f")}
    lower_is_better: ClassVar[bool] = False
    sources: ClassVar[tuple[str, ...] | None] = None
    packages: ClassVar[Mapping[str, str]] = {}
    resamplings: ClassVar[int] = 200
    reads_prompts: ClassVar[bool] = True

    measure: Measure

    @classmethod
    def create(cls, resources: Resources) -> Self:
        """Raise ModelError if there are no weights."""
        return cls(open_encoders(resources, "ViT-H/14", HPS_WEIGHTS, for_hps).measure)

    @property
    def note(self) -> str:
        return "HPSv2.1 is 100 times the mean cosine of images and prompts by a ViT-H/14 tuned on choices."

    def result(self, rows: Rows) -> dict[str, float]:
        return {"hps": round(float(100 * cosines(rows).mean()), 4)}

    def scores(self, rows: Rows) -> np.ndarray:
        return cosines(rows)


@dataclass(frozen=True, eq=False)
class Aesthetic:
    """Metric: the aesthetic score of LAION's improved predictor, from 1 to 10, on embeddings of OpenAI's ViT-L/14.

    Its layers have no activation between them (github.com/christophschuhmann/improved-aesthetic-predictor).
    """

    columns: ClassVar[Mapping[str, Column]] = {"aesthetic": Column("aesthetic", ".3f")}
    lower_is_better: ClassVar[bool] = False
    sources: ClassVar[tuple[str, ...] | None] = None
    packages: ClassVar[Mapping[str, str]] = {}
    resamplings: ClassVar[int] = 200
    reads_prompts: ClassVar[bool] = False

    embed_images: Callable[[Images], np.ndarray]
    layers: Layers

    @classmethod
    def create(cls, resources: Resources) -> Self:
        """Raise ModelError if there are no weights, and for keys that do not fit."""
        layers = read_layers(resources.weights.open(AESTHETIC))
        return cls(open_image_encoder(resources, "ViT-L/14"), layers)

    def measure(self, images: Images, prompts: Sequence[str]) -> Rows:
        return {"image": self.embed_images(images)}

    @property
    def note(self) -> str:
        return "The aesthetic score is LAION's improved predictor's (sac+logos+ava1), from 1 to 10."

    def result(self, rows: Rows) -> dict[str, float]:
        return {"aesthetic": round(float(self.scores(rows).mean()), 5)}

    def scores(self, rows: Rows) -> np.ndarray:
        return predict(self.layers, rows["image"])


def read_layers(tensors: Mapping[str, np.ndarray]) -> Layers:
    """Return the layers of the published predictor. Raises ModelError for keys that are missing, extra or misshapen."""
    expected = {}
    for number, (inputs, outputs) in WIDTHS.items():
        expected |= {f"layers.{number}.weight": (outputs, inputs), f"layers.{number}.bias": (outputs,)}
    shapes = {key: tensors[key].shape for key in tensors}
    if wrong := sorted(key for key in expected.keys() | shapes.keys() if expected.get(key) != shapes.get(key)):
        raise ModelError(
            f"{AESTHETIC.file} has {wrong[0]} of shape {shapes.get(wrong[0])}, and the predictor has "
            f"{expected.get(wrong[0])}; use the file of {AESTHETIC.source}"
        )
    return [(tensors[f"layers.{n}.weight"].astype(np.float32), tensors[f"layers.{n}.bias"]) for n in WIDTHS]


def predict(layers: Layers, embeddings: np.ndarray) -> np.ndarray:
    """embeddings: float32[N, 768], each of length 1. Return float[N]."""
    for weight, bias in layers:
        embeddings = embeddings @ weight.T + bias
    return embeddings[:, 0]
