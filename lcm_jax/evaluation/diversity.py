"""Diversity of the images of one caption: their mean distance from each other."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
from scipy.spatial.distance import pdist

from lcm_jax.evaluation.evaluate import Column, Images, Resources


@dataclass(frozen=True, eq=False)
class Diversity:
    """Metric: the mean distance between the features of two images of the same caption from different noise.

    As BicycleGAN measures it (arXiv 1711.11586, section 4), with the autoencoder's features in place of LPIPS. Its rows
    are {"features": float[N, D], "caption": int64[N], a digest of each}. It is not in the table of metrics, from which
    a run takes those of its report: that has one image of a caption.
    """

    columns: ClassVar[Mapping[str, Column]] = {"diversity": Column("diversity", ".3f")}
    lower_is_better: ClassVar[bool] = False
    sources: ClassVar[tuple[str, ...] | None] = None
    packages: ClassVar[Mapping[str, str]] = {}
    resamplings: ClassVar[int] = 50
    reads_prompts: ClassVar[bool] = True

    features: Callable[[Images], np.ndarray]

    @property
    def note(self) -> str:
        return (
            "Diversity is the mean Euclidean distance between the autoencoder's features of two images of one caption."
        )

    @classmethod
    def create(cls, resources: Resources) -> Self:
        """Raise ValueError if there is no autoencoder."""
        if resources.features is None:
            raise ValueError("metrics 'diversity' needs an autoencoder's features; remove it from the metrics")
        return cls(resources.features)

    def measure(self, images: Images, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        digests = [hashlib.sha256(prompt.encode()).digest()[:8] for prompt in prompts]
        return {
            "features": self.features(images),
            "caption": np.array([int.from_bytes(d, "big") >> 1 for d in digests]),
        }

    def result(self, rows: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Raise ValueError if no caption has two images."""
        groups = [rows["features"][rows["caption"] == caption] for caption in np.unique(rows["caption"])]
        means = [float(pdist(group).mean()) for group in groups if len(group) > 1]
        if not means:
            raise ValueError("diversity needs two images of a caption; use more images per caption")
        return {"diversity": float(f"{np.mean(means):.6g}")}

    def scores(self, rows: Mapping[str, np.ndarray]) -> None:
        return None
