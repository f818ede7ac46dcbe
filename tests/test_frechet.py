from functools import reduce

import numpy as np
import pytest
from scipy.linalg import sqrtm

from lcm_jax.evaluation.frechet import Moments, frechet_distance, merge_moments, moments


def _gaussian(mean, covariance) -> Moments:
    return Moments(2, mean, covariance)  # the covariance of two features is their scatter


def _random(rng, dimension: int, rank: int) -> Moments:
    factor = rng.normal(size=(dimension, rank))
    return _gaussian(rng.normal(size=dimension), factor @ factor.T)


def test_moments_are_those_of_numpy():
    features = np.random.default_rng(0).normal(3, 2, (50, 4)).astype(np.float32)
    found = moments(features)
    assert found.mean.dtype == found.covariance.dtype == np.float64
    np.testing.assert_allclose(found.mean, features.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-12)


def test_closed_form_of_commuting_gaussians():
    # Diagonal covariances: |mu|^2 + sum (sigma_a - sigma_b)^2; a common rotation changes nothing.
    rng = np.random.default_rng(1)
    sigma_a, sigma_b, shift = rng.uniform(0.1, 3, 6), rng.uniform(0.1, 3, 6), rng.normal(size=6)
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    a = _gaussian(np.zeros(6), turn @ np.diag(sigma_a**2) @ turn.T)
    b = _gaussian(turn @ shift, turn @ np.diag(sigma_b**2) @ turn.T)
    expected = np.sum(shift**2) + np.sum((sigma_a - sigma_b) ** 2)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_equals_the_formula_by_matrix_square_roots():
    rng = np.random.default_rng(2)
    a, b = _random(rng, 8, 12), _random(rng, 8, 12)
    root = sqrtm(a.covariance)
    cross = sqrtm(root @ b.covariance @ root).real
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * cross)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_samples_approach_the_distance_of_their_gaussians():
    rng = np.random.default_rng(3)
    a, b = rng.normal(0, 1, (40_000, 3)), rng.normal(1, 2, (40_000, 3))
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(6.0, rel=0.03)  # 3 * (1^2 + (2 - 1)^2)


@pytest.mark.parametrize("rank", [40, 7, 1, 0])
def test_zero_to_itself_and_never_negative(rank):
    a = _random(np.random.default_rng(rank), 40, rank)
    assert 0 <= frechet_distance(a, a) <= 1e-10 * (1 + np.trace(a.covariance))


@pytest.mark.parametrize("ranks", [(20, 20), (20, 3), (3, 5), (4, 0)])
def test_symmetry(ranks):
    rng = np.random.default_rng(5)
    a, b = (_random(rng, 20, rank) for rank in ranks)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)


def test_singular_covariances():
    # Gaussians of one dimension in three: along the same axis (3 - 1)^2, along perpendicular axes 9 + 1.
    zero, x, y = np.zeros(3), np.diag([9.0, 0, 0]), np.diag([0, 1.0, 0])
    along = np.diag([1.0, 0, 0])
    assert frechet_distance(_gaussian(zero, x), _gaussian(zero, along)) == pytest.approx(4.0, rel=1e-12)
    assert frechet_distance(_gaussian(zero, x), _gaussian(zero, y)) == pytest.approx(10.0, rel=1e-12)


def test_fewer_samples_than_dimensions():
    features = np.random.default_rng(6).normal(size=(5, 30))
    shifted = frechet_distance(moments(features), moments(features + 2.0))
    assert shifted == pytest.approx(30 * 4.0, rel=1e-9)


@pytest.mark.parametrize("shape", [(0, 4), (4,)])
def test_features_of_another_shape_are_an_error_that_names_it(shape):
    with pytest.raises(ValueError, match=f"shape \\({shape[0]}.*N >= 1"):
        moments(np.zeros(shape))


def test_one_image_has_no_distance():
    one = moments(np.zeros((1, 4)))
    with pytest.raises(ValueError, match="needs 2 or more images, got 1"):
        frechet_distance(one, one)


@pytest.mark.parametrize("parts", [(1, 2, 197), (100, 100), (1,) * 200])
def test_merged_moments_are_those_of_all_features(parts):
    """Also for features far from zero, where the sums of squares cancel."""
    features = np.random.default_rng(7).normal(1e6, 1, (200, 5))
    split = [moments(part) for part in np.split(features, np.cumsum(parts)[:-1])]
    for order in (split, split[::-1]):
        merged = reduce(merge_moments, order)
        assert merged.count == 200
        np.testing.assert_allclose(merged.mean, features.mean(0), rtol=1e-14)
        np.testing.assert_allclose(merged.covariance, np.cov(features, rowvar=False), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_an_error_that_names_them(value):
    features = np.zeros((3, 4))
    features[1, 2] = value
    with pytest.raises(ValueError, match=rf"features\[1, 2\] is {value}"):
        moments(features)


def test_other_dimensions_are_an_error():
    with pytest.raises(ValueError, match="3 and 4 dimensions; use those of one network"):
        frechet_distance(_gaussian(np.zeros(3), np.eye(3)), _gaussian(np.zeros(4), np.eye(4)))
