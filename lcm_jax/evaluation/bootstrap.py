"""Intervals of figures by the bootstrap: the spread of a figure over images drawn from its own with replacement."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

LEVEL = 0.95
SEED = 0
NOISE = 4.0  # standard errors of the mean of the draws


def intervals(
    result: Callable[[Any], Mapping[str, Any]], rows: Any, figures: Mapping[str, Any], resamplings: int
) -> dict[str, Any]:
    """Return {column: (low, high)} between which 95% of the resampled figures are; {name: (low, high)} for a group.

    rows: a pytree of arrays with a leading axis for the images. result(rows) -> {column: value}; figures: those of
    `rows` themselves. Percentiles are shifted by the mean of the resampled figures less the figure, where that is more
    than the noise of so many draws: a distance of sets grows where images repeat, and would lie below its own interval
    otherwise; a mean does not. Values that are no numbers have none, and
    nothing has one if there is a single image.
    """
    count = len(jax.tree.leaves(rows)[0])
    if count < 2 or not resamplings:
        return {}
    rng = np.random.default_rng(SEED)
    drawn: dict[tuple[str, ...], list[float]] = {}
    for _ in range(resamplings):
        chosen = np.sort(rng.integers(count, size=count))  # sorted: rows of one memory page are read together
        for path, value in _numbers(result(jax.tree.map(lambda leaf, chosen=chosen: leaf[chosen], rows))):
            drawn.setdefault(path, []).append(value)
    ranges: dict[str, Any] = {}
    for path, value in _numbers(figures):
        # A part, such as a task, that is in no image of a draw has no figure there.
        low, high = _interval(value, np.array(drawn.get(path, [value])))
        if len(path) == 1:
            ranges[path[0]] = (low, high)
        else:
            ranges.setdefault(path[0], {})[path[1]] = (low, high)
    return ranges


def _numbers(figures: Mapping[str, Any]) -> list[tuple[tuple[str, ...], float]]:
    found = []
    for name, value in figures.items():
        if isinstance(value, Mapping):
            found += [((name, *path), each) for path, each in _numbers(value)]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append(((name,), float(value)))
    return found


def _interval(value: float, drawn: np.ndarray) -> tuple[float, float]:
    tail, bias = (1 - LEVEL) / 2, drawn.mean() - value
    if abs(bias) < NOISE * drawn.std() / len(drawn) ** 0.5:
        bias = 0.0
    low, high = np.quantile(drawn, (tail, 1 - tail)) - bias
    # No figure that is never negative, or never above 1, becomes so by the shift.
    low = max(low, 0.0) if min(value, *drawn) >= 0 else low
    high = min(high, 1.0) if max(value, *drawn) <= 1 else high
    return float(f"{low:.6g}"), float(f"{high:.6g}")
