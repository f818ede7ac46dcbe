"""Precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797) of Inception features.

A set covers the balls around its features that reach to their k-th nearest neighbors in the set.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.evaluation.evaluate import Column, Measure, Resources
from lcm_jax.evaluation.inception import Rows, features_of, inception_measure, read_flavour, reference_features

NEIGHBORS = 3  # of precision and recall, as in their paper and torch-fidelity
DENSITY_NEIGHBORS = 5  # of density and coverage, as in theirs
BLOCK = 1024  # features whose distances to all others are held at once


def neighbor_distances(features: np.ndarray, *neighbors: int) -> np.ndarray:
    """features: float32[N, D]. Return float32[N, len(neighbors)]: squared distances to the k-th nearest others.

    Raises ValueError if there are not more features than neighbors.
    """
    if len(features) <= max(neighbors):
        raise ValueError(
            f"precision and recall need {max(neighbors) + 1} or more images, got {len(features)}; use more images"
        )
    # The nearest one is the feature itself.
    parts = [np.partition(block, neighbors, axis=1)[:, list(neighbors)] for block in _distances(features, features)]
    return np.concatenate(parts)


def coverage(real: np.ndarray, real_radii: np.ndarray, generated: np.ndarray) -> dict[str, float]:
    """Return the four figures.

    real: float32[M, D]; real_radii: its `neighbor_distances` for NEIGHBORS and DENSITY_NEIGHBORS. generated: float32
    [N, D]. A feature at the radius is inside for precision and recall, and outside for density and coverage, as in
    torch-fidelity and in prdc.
    """
    radius, density_radius = real_radii.T
    (generated_radius,) = neighbor_distances(generated, NEIGHBORS).T
    inside, inside_density, recalled, covered = [], [], np.zeros(len(real), bool), np.zeros(len(real), bool)
    starts = range(0, len(generated), BLOCK)
    for start, block in zip(starts, _distances(generated, real), strict=True):
        inside.append((block <= radius).any(1))
        inside_density.append((block < density_radius).sum(1) / DENSITY_NEIGHBORS)
        recalled |= (block <= generated_radius[start : start + BLOCK, None]).any(0)
        covered |= (block < density_radius).any(0)
    figures = {"precision": inside, "recall": [recalled], "density": inside_density, "coverage": [covered]}
    return {name: float(np.mean(np.concatenate(parts))) for name, parts in figures.items()}


@jax.jit
def _squared_distances(a: jax.Array, b: jax.Array) -> jax.Array:
    products = jnp.matmul(a, b.T, precision="highest")
    return jnp.maximum((a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * products, 0)


def _distances(a: np.ndarray, b: np.ndarray) -> Iterator[np.ndarray]:
    """Yield float32[BLOCK, M], the squared distances of BLOCK rows of a to all of b, in order."""
    center = b.mean(0)  # distances do not depend on it, and small numbers cancel less
    others = jax.device_put(b - center)
    for start in range(0, len(a), BLOCK):
        yield np.asarray(_squared_distances(a[start : start + BLOCK] - center, others))


@dataclass(frozen=True, eq=False)
class Precision:
    """Metric: precision, recall, density and coverage of Inception features; the option `fid_flavour`."""

    columns: ClassVar[Mapping[str, Column]] = {
        name: Column(name, ".3f") for name in ("precision", "recall", "density", "coverage")
    }
    lower_is_better: ClassVar[bool] = False
    sources: ClassVar[tuple[str, ...] | None] = None
    packages: ClassVar[Mapping[str, str]] = {}
    resamplings: ClassVar[int] = 20
    reads_prompts: ClassVar[bool] = False

    flavour: str
    measure: Measure
    reference: np.ndarray  # float32[M, 2048]
    radii: np.ndarray  # of the reference
    note: str

    @classmethod
    def create(cls, resources: Resources) -> Self:
        """Raise ModelError if there are no weights, and ValueError for a reference without or with few features."""
        flavour = read_flavour(resources.settings)
        features = reference_features(resources, flavour).astype(np.float32, copy=False)
        note = (
            f"Precision ({flavour}) is the share of images that are among the {NEIGHBORS} nearest neighbors of "
            f"{resources.reference} by Inception features, recall the share of these among the neighbors of images; "
            f"density and coverage are the same with {DENSITY_NEIGHBORS} neighbors, robust to outliers."
        )
        radii = neighbor_distances(features, NEIGHBORS, DENSITY_NEIGHBORS)
        return cls(flavour, inception_measure(resources, flavour), features, radii, note)

    def result(self, rows: Rows) -> dict[str, float]:
        """Raise ValueError for few images, and as `features_of` does."""
        figures = coverage(self.reference, self.radii, features_of(rows, self.flavour))
        return {name: round(value, 4) for name, value in figures.items()}

    def scores(self, rows: Rows) -> None:
        return None
