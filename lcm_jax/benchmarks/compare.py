"""The difference between the outputs of the two sides, which is looked at before anything is timed."""

from collections.abc import Mapping

import numpy as np

Outputs = Mapping[str, np.ndarray]


def difference(ours: Outputs, theirs: Outputs) -> tuple[str, float]:
    """Return (name, distance) of the output that differs most.

    The distance of two arrays is the root mean square of their difference, relative to the standard deviation of ours;
    that of two numbers is relative to ours. It is infinite for NaN, other shapes, or an output that one side lacks.
    """
    if ours.keys() != theirs.keys():
        return " ".join(sorted(ours.keys() ^ theirs.keys())), np.inf
    distances = {name: distance(ours[name], theirs[name]) for name in ours}
    return max(distances.items(), key=lambda item: item[1], default=("", 0.0))


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    if ours.shape != theirs.shape:
        return np.inf
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    spread = float(ours.std() if ours.ndim else abs(ours))
    error = float(np.sqrt(np.mean((ours - theirs) ** 2)))
    return error / max(spread, 1e-12) if np.isfinite(error) else np.inf
