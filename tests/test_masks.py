"""Masks for inpainting: their distribution, and that fixed ones stay the same."""

import numpy as np

from lcm_jax.data.masks import FULL, fixed_masks, random_mask


def test_masks_are_rectangles_or_full():
    rng = np.random.default_rng(0)
    masks = np.stack([random_mask(rng, 16, 24) for _ in range(400)])[..., 0]
    assert masks.shape == (400, 16, 24) and masks.dtype == np.uint8 and set(np.unique(masks)) == {0, 255}
    masks = masks // 255
    rows, columns = masks.max(2), masks.max(1)
    np.testing.assert_array_equal(masks, rows[:, :, None] * columns[:, None, :])
    for edges, size in ((rows, 16), (columns, 24)):
        assert (np.abs(np.diff(edges.astype(int), axis=1)).sum(1) <= 2).all(), "one interval, without a gap"
        assert edges.sum(1).min() >= size // 4 - 1
        assert (edges.mean(0) > 0.3).all() and edges[:, 0].mean() < 0.5, "anywhere, and most at the middle"
    assert abs((masks.mean((1, 2)) == 1).mean() - FULL) < 0.06


def test_fixed_masks_do_not_depend_on_their_number():
    masks = fixed_masks(6, 16, 24)
    assert masks.shape == (6, 16, 24, 1)
    np.testing.assert_array_equal(fixed_masks(4, 16, 24), masks[:4])
    assert len({mask.tobytes() for mask in masks}) > 3
