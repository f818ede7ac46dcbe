"""The Frechet distance between two sets of features, each seen as a Gaussian (arXiv 1706.08500)."""

from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    mean: np.ndarray  # float64[D]
    covariance: np.ndarray  # float64[D, D], unbiased


def moments(features: np.ndarray) -> Moments:
    """features: float[N, D], N >= 2. Raises ValueError for fewer rows and for features that are not finite."""
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features have shape {features.shape}; moments need [N, D] with N >= 2: pass more pictures")
    bad = np.argwhere(~np.isfinite(features))
    if len(bad):
        row, column = (int(i) for i in bad[0])
        raise ValueError(
            f"features[{row}, {column}] is {features[row, column]} ({len(bad)} values are not finite); "
            "check the pictures and the network that made them"
        )
    mean = features.mean(0)
    centred = features - mean
    return Moments(mean, centred.T @ centred / (len(features) - 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + tr(Ca + Cb - 2 (Ca^1/2 Cb Ca^1/2)^1/2), at least 0; covariances may be singular.

    The last trace is the sum of the singular values of Ca^1/2 Cb^1/2. Taken so, no rounding error goes through a square
    root: the eigenvalues of Ca^1/2 Cb Ca^1/2 that should be 0 come out near 1e-16, and their roots near 1e-8.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {a.mean.shape[0]} and {b.mean.shape[0]} dimensions; use those of one network")
    cross = np.linalg.svd(_root(a.covariance) @ _root(b.covariance), compute_uv=False).sum()
    apart = np.sum((a.mean - b.mean) ** 2)
    return max(0.0, float(apart + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross))


def _root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric square root of a positive semidefinite matrix; eigenvalues within rounding of 0 count as 0."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    floor = len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    return (vectors * np.sqrt(np.where(values > floor, values, 0.0))) @ vectors.T
