"""The CLIP score: how well images and their prompts agree, by the cosine of their embeddings (arXiv 2104.08718)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from lcm_jax.evaluation.clip_towers import TOWERS, Rows, cosines, open_encoders
from lcm_jax.evaluation.evaluate import Column, Measure, Resources, seven_digits

DEFAULT = "ViT-L/14"


@dataclass(frozen=True, eq=False)
class ClipScore:
    """Metric: the mean cosine of images and prompts in a CLIP model, the option `clip_model`, on three scales.

    `clip_score` is 100 cos, as tables of text-to-image models have it. `clipscore` is 2.5 max(cos, 0), each image
    clipped, of the paper, whose tool puts "A photo depicts" before the prompt and has ViT-B/32. `clip_score_clipped` is
    max(100 cos, 0), the mean clipped, of torchmetrics. Images are those of OpenAI's and OpenCLIP's own code.
    """

    columns: ClassVar[Mapping[str, Column]] = {
        "clip_score": Column("CLIP score", ".2f"),
        "clipscore": Column("CLIPScore", ".4f"),
        "clip_score_clipped": Column("CLIP score, clipped", ".2f"),
    }
    lower_is_better: ClassVar[bool] = False
    sources: ClassVar[tuple[str, ...] | None] = None
    packages: ClassVar[Mapping[str, str]] = {}
    resamplings: ClassVar[int] = 200
    reads_prompts: ClassVar[bool] = True

    measure: Measure
    model: str  # of clip_towers.TOWERS

    @classmethod
    def create(cls, resources: Resources) -> Self:
        """Raise ValueError for a `clip_model` that does not exist, and ModelError if there are no weights."""
        name = resources.settings.get("clip_model", DEFAULT)
        if name not in TOWERS:
            raise ValueError(f"clip_model {name!r} is not supported; choose one of {', '.join(TOWERS)}")
        return cls(open_encoders(resources, name).measure, name)

    @property
    def note(self) -> str:
        return (
            f"The CLIP score is 100 times the mean cosine of images and prompts by CLIP {self.model}, and clipped as "
            "torchmetrics does it, at 0; CLIPScore is the mean of 2.5 max(cos, 0)."
        )

    def result(self, rows: Rows) -> dict[str, float]:
        cos = cosines(rows)
        return {
            "clip_score": seven_digits(100 * cos.mean()),
            "clipscore": seven_digits(2.5 * np.maximum(cos, 0).mean()),
            "clip_score_clipped": seven_digits(max(100 * cos.mean(), 0)),
        }

    def scores(self, rows: Rows) -> np.ndarray:
        return cosines(rows)
