"""FD-DINOv2: the Frechet distance of DINOv2's features (arXiv 2306.04675), equal to the authors' code, dgm-eval."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import jax
import numpy as np

from lcm_jax.compiler import compiler_options
from lcm_jax.evaluation.clip_inputs import for_dinov2
from lcm_jax.evaluation.clip_towers import check_finite, in_batches, prepare
from lcm_jax.evaluation.evaluate import Column, Images, Measure, Resources, seven_digits
from lcm_jax.evaluation.frechet import Gaussian, distances_to, fit_gaussian
from lcm_jax.models.layers import apply
from lcm_jax.models.vit import DINOV2_LARGE, VisionConfig, VisionTransformer
from lcm_jax.weights.published import Published
from lcm_jax.weights.towers import dinov2_params

FILE = "dinov2_vitl14_pretrain.pth"
PUBLISHED = Published(FILE, f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/{FILE}")
SIZE = 224  # pixels, of the images; the network was trained on 518

Rows = dict[str, np.ndarray]  # "features" float32[N, 1024]


def dinov2_features(
    config: VisionConfig, params: Mapping[str, Any], size: int, batch_size: int
) -> Callable[[Images], np.ndarray]:
    """Return a function images -> float32[N, D], the class tokens of images resized to `size` pixels.

    The function raises ValueError for images that are not uint8[H, W, 3], and for features that are not finite.
    """
    network = VisionTransformer(config)

    @partial(jax.jit, compiler_options=compiler_options())
    def encode(params, pixels):
        with jax.default_matmul_precision("highest"):  # TF32 changes the third digit
            return apply(network, params, pixels)

    own = jax.device_put(params)

    def features(images: Images) -> np.ndarray:
        pixels = prepare(images, for_dinov2, size)
        return check_finite(in_batches(lambda batch: encode(own, batch), pixels, batch_size), "image")

    return features


@dataclass(frozen=True, eq=False)
class FDDinov2:
    """Metric: the Frechet distance to the reference set of the class tokens of DINOv2's ViT-L/14 without registers."""

    columns: ClassVar[Mapping[str, Column]] = {"fd_dinov2": Column("FD-DINOv2", ".2f")}
    lower_is_better: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...] | None] = None
    packages: ClassVar[Mapping[str, str]] = {}
    resamplings: ClassVar[int] = 20
    reads_prompts: ClassVar[bool] = False

    measure: Measure
    reference: Gaussian
    note: str

    @classmethod
    def create(cls, resources: Resources) -> Self:
        """Raise ModelError if there are no weights, and ValueError if the reference has less than two images."""
        params = dinov2_params(resources.weights.open(PUBLISHED), DINOV2_LARGE, FILE)
        features = dinov2_features(DINOV2_LARGE, params, SIZE, resources.batch_size)

        def measure(images: Images, prompts: Sequence[str]) -> Rows:
            return {"features": features(images)}

        reference = fit_gaussian(resources.reference_rows(measure)["features"])
        note = (
            f"FD-DINOv2 is the Frechet distance of features by DINOv2 ViT-L/14 to those of {resources.reference}; with "
            "few images it is biased upwards."
        )
        return cls(measure, reference, note)

    def result(self, rows: Rows) -> dict[str, float]:
        """Raise ValueError for fewer than two images."""
        return {"fd_dinov2": seven_digits(distances_to(self.reference, rows["features"]).of())}

    def scores(self, rows: Rows) -> None:
        return None
