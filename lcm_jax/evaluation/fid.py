"""The Frechet Inception distance (arXiv 1706.08500), equal to the tools that publish it, and its limit for infinitely
many images (arXiv 1911.07023).

torch-fidelity takes the roots of eigenvalues of a product of covariances, pytorch-fid and clean-fid SciPy's root of it;
`frechet.Distances` has the same trace by singular values, which are fast and keep their digits if it is singular.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import numpy as np

from lcm_jax.evaluation.evaluate import Column, Measure, Resources, seven_digits
from lcm_jax.evaluation.frechet import Distances, Gaussian, distances_to, fit_gaussian, make_gaussian, moments
from lcm_jax.evaluation.inception import (
    Rows,
    features_of,
    inception_measure,
    read_flavour,
    reference_features,
    reference_statistics,
)
from lcm_jax.evaluation.inception_inputs import FLAVOURS
from lcm_jax.evaluation.statistics import Statistics, write_statistics

SMALL_SAMPLE = 10_000  # images: with fewer, FID is biased by points
POINTS = 5  # of the extrapolation
SEED = 0


def small_sample_warning(count: int) -> str | None:
    """Return a warning if FID of so few images is biased, else None."""
    if count >= SMALL_SAMPLE:
        return None
    return (
        f"FID of {count:,} images is biased upwards and cannot be compared with published figures, which have "
        f"{SMALL_SAMPLE:,} or more; FID-infinity extrapolates it to infinitely many"
    )


def extrapolate(distances: Distances) -> float:
    """Return the limit of the distance for infinitely many images, of those N that there are.

    The bias of a distance of n images is proportional to 1 / n, so a line through distances of subsets, at 1 / n = 0,
    has none. The subsets have N/2 to N images: below, the line bends, as n falls below the dimension of the features.
    """
    count = len(distances.features)
    rng = np.random.default_rng(SEED)
    counts = np.unique(np.linspace(max(count // 2, 2), count, POINTS).astype(int))
    values = [distances.of(np.sort(rng.permutation(count)[:n])) for n in counts]
    return float(np.polyfit(1 / counts, values, 1)[1]) if len(counts) > 1 else values[0]


def save_reference(resources: Resources, path: Path) -> None:
    """Write the statistics of the reference set to a .npz file, which takes the place of its images from then on.

    Raises ValueError if the reference is given by statistics, and as `write_statistics` does.
    """
    if resources.real_images is None:
        raise ValueError(f"the reference {resources.reference} has no images, whose statistics could be saved")
    flavour = read_flavour(resources.settings)
    features = reference_features(resources, flavour)
    mean = features.mean(0, FLAVOURS[flavour].mean)
    covariance = moments(features).covariance
    write_statistics(path, Statistics(mean, covariance, flavour, len(features), resources.reference))


@dataclass(frozen=True, eq=False)
class FID:
    """Metric: the Frechet distance of Inception features to those of the reference, in a tool's flavour.

    `fid_infinity` stands beside it for fewer than SMALL_SAMPLE images. flavour: see FLAVOURS; the option `fid_flavour`.
    """

    columns: ClassVar[Mapping[str, Column]] = {
        "fid": Column("FID", ".2f"),
        "fid_infinity": Column("FID-infinity", ".2f"),
    }
    lower_is_better: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...] | None] = None
    packages: ClassVar[Mapping[str, str]] = {}
    resamplings: ClassVar[int] = 20
    reads_prompts: ClassVar[bool] = False

    flavour: str
    measure: Measure
    reference: Gaussian
    note: str

    @classmethod
    def create(cls, resources: Resources) -> Self:
        """Raise ModelError if there are no weights, and ValueError for a reference that has no statistics."""
        flavour = read_flavour(resources.settings)
        statistics = reference_statistics(resources, flavour)
        if statistics is None:
            features = reference_features(resources, flavour)
            reference, name = fit_gaussian(features, FLAVOURS[flavour].mean), resources.reference
        else:
            reference = make_gaussian(statistics.mean, statistics.covariance)
            name = statistics.reference or resources.reference
        note = (
            f"FID ({flavour}) is the Frechet distance of Inception features to those of {name}; it is biased upwards "
            "with few images, and FID-infinity extrapolates it to infinitely many."
        )
        return cls(flavour, inception_measure(resources, flavour), reference, note)

    def result(self, rows: Rows) -> dict[str, float]:
        """Raise ValueError for fewer than two images, and as `features_of` does."""
        features = features_of(rows, self.flavour)
        distances = distances_to(self.reference, features, FLAVOURS[self.flavour].mean)
        found = {"fid": distances.of()}
        if len(features) < SMALL_SAMPLE:
            found["fid_infinity"] = extrapolate(distances)
        return {name: seven_digits(value) for name, value in found.items()}

    def scores(self, rows: Rows) -> None:
        return None
