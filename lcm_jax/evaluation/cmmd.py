"""CMMD: the maximum mean discrepancy of CLIP's embeddings of two sets of images (arXiv 2401.09603)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.evaluation.clip_inputs import for_cmmd
from lcm_jax.evaluation.clip_towers import Rows, open_image_encoder
from lcm_jax.evaluation.evaluate import Column, Images, Measure, Resources, seven_digits

MODEL = "ViT-L/14@336px"
SIGMA, SCALE = 10.0, 1000.0
BLOCK = 1024  # rows of the kernel's matrix at once


@jax.jit
def _block(x: jax.Array, y: jax.Array) -> jax.Array:
    """x: float32[B, D], y: float32[M, D]. Return float32[B], the mean of k(x, y) - 1 over y."""
    with jax.default_matmul_precision("highest"):
        products = x @ y.T
    squared = jnp.sum(x * x, 1)[:, None] + jnp.sum(y * y, 1)[None] - 2 * products
    return jnp.mean(jnp.expm1(-squared / (2 * SIGMA**2)), axis=1)


def mean_kernel(x: np.ndarray, y: np.ndarray) -> float:
    """x: float32[N, D], y: float32[M, D]. Return the mean over all pairs of k(x, y) - 1, k the Gaussian kernel.

    All values of k are near 1, so that without the 1 float32 is exact enough.
    """
    on_device = jnp.asarray(y)
    parts = [np.asarray(_block(x[first : first + BLOCK], on_device)) for first in range(0, len(x), BLOCK)]
    return float(np.concatenate(parts).astype(np.float64).mean())


def cmmd(x: np.ndarray, y: np.ndarray, y_kernel: float | None = None) -> float:
    """x: float32[N, D], y: float32[M, D], embeddings of length 1. Return 1000 times the squared discrepancy.

    It is the published estimator, which is biased: images are also compared with themselves. y_kernel: mean_kernel(y,
    y), if it is known.
    """
    own = mean_kernel(y, y) if y_kernel is None else y_kernel
    return SCALE * (mean_kernel(x, x) + own - 2 * mean_kernel(x, y))


@dataclass(frozen=True, eq=False)
class CMMD:
    """Metric: CMMD to the reference set with OpenAI's ViT-L/14@336px, as google-research's code computes it."""

    columns: ClassVar[Mapping[str, Column]] = {"cmmd": Column("CMMD", ".4f")}
    lower_is_better: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...] | None] = None
    packages: ClassVar[Mapping[str, str]] = {}
    resamplings: ClassVar[int] = 20
    reads_prompts: ClassVar[bool] = False

    measure: Measure
    reference: np.ndarray  # float32[M, D]
    reference_kernel: float
    note: str

    @classmethod
    def create(cls, resources: Resources) -> Self:
        """Raise ModelError if there are no weights, and ValueError if the reference has no images."""
        embed = open_image_encoder(resources, MODEL, preprocess=for_cmmd)

        def measure(images: Images, prompts: Sequence[str]) -> Rows:
            return {"image": embed(images)}

        reference = resources.reference_rows(measure)["image"]
        note = (
            f"CMMD is 1000 times the squared maximum mean discrepancy of embeddings by CLIP {MODEL} to those of "
            f"{resources.reference}."
        )
        return cls(measure, reference, mean_kernel(reference, reference), note)

    def result(self, rows: Rows) -> dict[str, float]:
        return {"cmmd": seven_digits(cmmd(rows["image"], self.reference, self.reference_kernel))}

    def scores(self, rows: Rows) -> None:
        return None
