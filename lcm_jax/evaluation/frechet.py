"""The Frechet distance between two sets of features, each seen as a Gaussian (arXiv 1706.08500)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple, Self

import jax
import numpy as np

from lcm_jax.compiler import compiler_options
from lcm_jax.diffusion.pixels import to_float
from lcm_jax.evaluation.batches import in_batches
from lcm_jax.evaluation.evaluate import Column, Images, Resources
from lcm_jax.models.layers import apply
from lcm_jax.models.stable_diffusion import StableDiffusion


class Moments(NamedTuple):
    """The first two moments of N features, which are enough to merge sets."""

    count: int
    mean: np.ndarray  # float64[D]
    scatter: np.ndarray  # float64[D, D], the sum of the outer products of deviations from the mean

    @property
    def covariance(self) -> np.ndarray:
        """float64[D, D], unbiased. Raises ValueError for fewer than two features."""
        if self.count < 2:
            raise ValueError(f"a covariance needs 2 or more images, got {self.count}; use more images")
        return self.scatter / (self.count - 1)


def moments(features: np.ndarray) -> Moments:
    """features: float[N, D], N >= 1. Raises ValueError for no rows and for features that are not finite."""
    features = np.asarray(features, np.float64)
    check_features(features)
    mean = features.mean(0)
    centered = features - mean
    return Moments(len(features), mean, centered.T @ centered)


def check_features(features: np.ndarray) -> None:
    """Raise ValueError if features are not float[N, D] with N >= 1, or not finite."""
    if features.ndim != 2 or not len(features):
        raise ValueError(f"features have shape {features.shape}, which is not supported; use [N, D] with N >= 1")
    bad = np.argwhere(~np.isfinite(features))
    if len(bad):
        row, column = (int(i) for i in bad[0])
        raise ValueError(
            f"features[{row}, {column}] is {features[row, column]} ({len(bad)} values are not finite); "
            "check the images and the network that made them"
        )


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Return the moments of both sets together, by Chan's update: no large sums cancel, whatever the mean is."""
    count, difference = a.count + b.count, b.mean - a.mean
    mean = a.mean + difference * (b.count / count)
    scatter = a.scatter + b.scatter + np.outer(difference, difference) * (a.count * b.count / count)
    return Moments(count, mean, scatter)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return the distance of two sets by their moments, see `gaussian_distance`.

    Raises ValueError for moments of different dimensions, or of fewer than two features.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features have {a.mean.shape[0]} and {b.mean.shape[0]} dimensions; use those of one network")
    return gaussian_distance(a.mean, a.covariance, b.mean, b.covariance)


def gaussian_distance(
    mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray
) -> float:
    """|mu_a - mu_b|^2 + tr(Ca + Cb - 2 (Ca^1/2 Cb Ca^1/2)^1/2), at least 0; covariances may be singular.

    The last trace is the sum of the singular values of Ca^1/2 Cb^1/2. This way, no rounding error goes through a square
    root: the eigenvalues of Ca^1/2 Cb Ca^1/2 that should be 0 come out near 1e-16, and their roots near 1e-8.
    """
    cross = np.linalg.svd(_root(covariance_a) @ _root(covariance_b), compute_uv=False).sum()
    shift = np.sum((mean_a - mean_b) ** 2)
    return max(0.0, float(shift + np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross))


def _root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric square root of a positive semidefinite matrix; eigenvalues within rounding of 0 count as 0."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    floor = len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    return (vectors * np.sqrt(np.where(values > floor, values, 0.0))) @ vectors.T


class Gaussian(NamedTuple):
    """A reference that many sets are compared with: one decomposition of its covariance serves all of them.

    mean: float[D]. factor: float64[R, D], so that the covariance is factor.T @ factor; R is its rank, or more.
    """

    mean: np.ndarray
    factor: np.ndarray

    @property
    def trace(self) -> float:
        return float(np.sum(self.factor**2))


def fit_gaussian(features: np.ndarray, dtype: type[np.floating] = np.float64) -> Gaussian:
    """features: float[N, D]. dtype: see `distances_to`. Raises ValueError as `moments` and its covariance do."""
    check_features(features)
    count, dimensions = features.shape
    mean = features.astype(dtype).mean(0)
    if 2 <= count <= dimensions:
        centered = features.astype(np.float64)
        return Gaussian(mean, (centered - centered.mean(0)) / np.sqrt(count - 1))
    return make_gaussian(mean, moments(features).covariance)


def make_gaussian(mean: np.ndarray, covariance: np.ndarray) -> Gaussian:
    """mean: float[D]; covariance: float64[D, D], symmetric; eigenvalues below 0 are rounding, and count as 0."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    positive = values > 0
    return Gaussian(mean, (vectors[:, positive] * np.sqrt(values[positive])).T)


class Distances(NamedTuple):
    """The Frechet distances of subsets of N features to one Gaussian; what they share is computed once."""

    features: np.ndarray  # float64[N, D]
    projected: np.ndarray  # float64[N, R], features @ factor.T
    means: np.ndarray  # the features in the dtype of the mean
    reference: Gaussian

    def of(self, rows: np.ndarray | slice = slice(None)) -> float:
        """Return the distance of the features of these rows.

        tr (Ca^1/2 Cb Ca^1/2)^1/2 is the sum of the singular values of X F^T / (n - 1)^1/2, where X are the centered
        features and Cb = F^T F: those of a matrix with as many rows as there are features, if these are few.
        """
        chosen, projected = self.features[rows], self.projected[rows]
        count = len(chosen)
        if count < 2:
            raise ValueError(f"a covariance needs 2 or more images, got {count}; use more images")
        shift = self.means[rows].mean(0) - self.reference.mean
        trace = np.sum((chosen - chosen.mean(0)) ** 2) / (count - 1)
        cross = _sum_singular_values(projected - projected.mean(0)) / np.sqrt(count - 1)
        return float(shift @ shift + trace + self.reference.trace - 2 * cross)


def distances_to(reference: Gaussian, features: np.ndarray, dtype: type[np.floating] = np.float64) -> Distances:
    """features: float[N, D]. dtype: of the sums for the mean, in which the tools that publish FID differ.

    Raises ValueError for features of another dimension, of another shape, or that are not finite.
    """
    check_features(features)
    if features.shape[1:] != reference.mean.shape:
        raise ValueError(
            f"features have {features.shape[1]} and {len(reference.mean)} dimensions; use those of one network"
        )
    exact = features.astype(np.float64)
    return Distances(exact, exact @ reference.factor.T, features.astype(dtype, copy=False), reference)


def _sum_singular_values(matrix: np.ndarray) -> float:
    """matrix: float64[N, R]. By the eigenvalues of the smaller product with itself: several times as fast as an SVD.

    Values that are 0 come out at 1e-8 of the largest one, which is far below the digits that are published.
    """
    rows, columns = matrix.shape
    product = matrix @ matrix.T if rows < columns else matrix.T @ matrix
    return float(np.sqrt(np.maximum(np.linalg.eigvalsh(product), 0)).sum())


def encoder_features(model: StableDiffusion, vae_params, batch_size: int) -> Callable[[Images], np.ndarray]:
    """Return a function uint8[N, H, W, 3] -> float[N, C]: the encoder's last features, averaged over positions.

    batch_size: images encoded at once, by one program for any N.
    """

    @partial(jax.jit, compiler_options=compiler_options())
    def encode(params, images):
        return apply(model.vae, params, to_float(images), method="features").mean((1, 2))

    params = jax.device_put(vae_params)

    def features(images: Images) -> np.ndarray:
        return in_batches(partial(encode, params), np.asarray(images), batch_size)

    return features


@dataclass(frozen=True, eq=False)
class FrechetDistance:
    """Metric: the Frechet distance of the images' features to those of real images. Its rows are the features."""

    columns: ClassVar[Mapping[str, Column]] = {"frechet": Column("Frechet", ".2f")}
    lower_is_better: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...] | None] = None
    packages: ClassVar[Mapping[str, str]] = {}
    resamplings: ClassVar[int] = 50
    reads_prompts: ClassVar[bool] = False

    features: Callable[[Images], np.ndarray]
    reference: Gaussian

    @classmethod
    def create(cls, resources: Resources) -> Self:
        """Raise ValueError if there is no autoencoder."""
        if (features := resources.features) is None:
            raise ValueError("metrics 'frechet' needs an autoencoder's features; remove it from the metrics")
        return cls(features, fit_gaussian(resources.reference_rows(lambda images, _: features(images))))

    def measure(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        return self.features(images)

    @property
    def note(self) -> str:
        return (
            "The Frechet distance compares the features of the autoencoder's encoder, averaged over positions, with "
            "those of real images; with this few images it is biased upwards, for all rows alike."
        )

    def result(self, rows: np.ndarray) -> dict[str, float]:
        return {"frechet": round(max(0.0, distances_to(self.reference, rows).of()), 4)}

    def scores(self, rows: np.ndarray) -> None:
        return None
