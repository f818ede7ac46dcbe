"""Any number of inputs through a network that is compiled for batches of one size."""

from collections.abc import Callable

import numpy as np


def in_batches(network: Callable[[np.ndarray], object], inputs: np.ndarray, batch_size: int) -> np.ndarray:
    """Return network(inputs), [N, ...], of parts of `batch_size` inputs; the last part repeats its last input."""
    parts = []
    for start in range(0, len(inputs), batch_size):
        rows = np.minimum(start + np.arange(batch_size), len(inputs) - 1)
        parts.append(np.asarray(network(inputs[rows])))
    return np.concatenate(parts)[: len(inputs)]
