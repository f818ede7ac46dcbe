"""The kernel Inception distance (arXiv 1801.01401): the squared maximum mean discrepancy of Inception features under a
cubic kernel, which is unbiased with any number of images."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from lcm_jax.evaluation.evaluate import Column, Measure, Resources, seven_digits
from lcm_jax.evaluation.inception import Rows, features_of, inception_measure, read_flavour, reference_features

SUBSETS = 100
SUBSET_SIZE = 1000
SEED = 2020  # torch-fidelity's


def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a: float[N, D]; b: float[M, D]. Return float[N, M], (a b / D + 1)^3."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def discrepancy(a: np.ndarray, b: np.ndarray) -> float:
    """a, b: float[N, D], N >= 2. Return the unbiased estimate of the squared discrepancy, which may be negative."""
    count = len(a)
    aa, bb = kernel(a, a), kernel(b, b)
    within = aa.sum() - np.trace(aa) + bb.sum() - np.trace(bb)
    return float(within / (count * (count - 1)) - 2 * kernel(a, b).mean())


def kernel_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """features: float[N, D]; reference: float[M, D]. Return the mean over SUBSETS random subsets of SUBSET_SIZE.

    The subsets are torch-fidelity's, with its seed; with fewer images they are smaller, as clean-fid's. Raises
    ValueError if there are fewer than two.
    """
    size = min(len(features), len(reference), SUBSET_SIZE)
    if size < 2:
        raise ValueError(f"KID needs 2 or more images, got {size}; use more images")
    if len(features) == len(reference) == size:  # all subsets are the same
        return discrepancy(features, reference)
    rng = np.random.RandomState(SEED)
    draw = lambda rows: rows[rng.choice(len(rows), size, replace=False)]  # noqa: E731
    return float(np.mean([discrepancy(draw(features), draw(reference)) for _ in range(SUBSETS)]))


@dataclass(frozen=True, eq=False)
class KID:
    """Metric: the kernel distance of Inception features to those of the reference; the option `fid_flavour`."""

    columns: ClassVar[Mapping[str, Column]] = {"kid": Column("KID", ".5f")}
    lower_is_better: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...] | None] = None
    packages: ClassVar[Mapping[str, str]] = {}
    resamplings: ClassVar[int] = 20
    reads_prompts: ClassVar[bool] = False

    flavour: str
    measure: Measure
    reference: np.ndarray  # float32[M, 2048]
    note: str

    @classmethod
    def create(cls, resources: Resources) -> Self:
        """Raise ModelError if there are no weights, and ValueError for a reference without features."""
        flavour = read_flavour(resources.settings)
        features = reference_features(resources, flavour)
        note = (
            f"KID ({flavour}) is the squared discrepancy of Inception features, under a cubic kernel, from those of "
            f"{resources.reference}."
        )
        return cls(flavour, inception_measure(resources, flavour), features, note)

    def result(self, rows: Rows) -> dict[str, float]:
        """Raise ValueError for fewer than two images, and as `features_of` does."""
        return {"kid": seven_digits(kernel_distance(features_of(rows, self.flavour), self.reference))}

    def scores(self, rows: Rows) -> None:
        return None
