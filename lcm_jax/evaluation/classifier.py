"""Classifier of captions, for sets with few different ones: a support vector machine, fitted on the training images."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
from PIL import Image

from lcm_jax.evaluation.evaluate import Batches, Column, Images, Resources

MAX_CAPTIONS = 100
SIDE = 16  # pixels of the images that are classified
REMEDY = "remove it from --config.metrics"


def shrink(images: Iterable[np.ndarray]) -> np.ndarray:
    """images: uint8[N, H, W, 3]. Return float32[N, SIDE * SIDE * 3] in [0, 1], each value the mean of an area."""
    small = [np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX)) for image in images]
    return np.stack(small).reshape(len(small), -1).astype(np.float32) / 255


def fit(images: np.ndarray, captions: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """images: of `shrink`; captions: str[N]. Return a function of other images that returns a caption for each.

    Raises ValueError for one caption alone, and for more than MAX_CAPTIONS different ones.
    """
    from sklearn.svm import SVC  # an optional dependency, see `Classifier.packages`

    different = np.unique(captions)
    if not 2 <= len(different) <= MAX_CAPTIONS:
        raise ValueError(
            f"metrics 'classifier' is not supported: the training images have {len(different)} different captions, "
            f"and it supports 2 to {MAX_CAPTIONS}; {REMEDY}"
        )
    return SVC(C=10.0).fit(images, captions).predict


@dataclass(frozen=True, eq=False)
class Classifier:
    """Metric: the share of images that are assigned to their captions. Its rows are bool[N].

    predict: see `fit`. captions: those that it tells apart.
    """

    columns: ClassVar[Mapping[str, Column]] = {"classifier": Column("classifier", ".1%")}
    lower_is_better: ClassVar[bool] = False
    sources: ClassVar[tuple[str, ...] | None] = None
    resamplings: ClassVar[int] = 200
    reads_prompts: ClassVar[bool] = True
    packages: ClassVar[Mapping[str, str]] = {"sklearn": "scikit-learn"}

    predict: Callable[[np.ndarray], np.ndarray]
    captions: frozenset[str]

    @classmethod
    def create(cls, resources: Resources) -> Self:
        """Fit the classifier, and print its accuracy on held-out images. Raises ValueError as `fit` does."""
        if resources.train_images is None or resources.real_images is None:
            raise ValueError(f"metrics 'classifier' needs training images, which this reference lacks; {REMEDY}")
        images, captions = _read(resources.train_images())
        predict = fit(images, captions)
        images, expected = _read(resources.real_images())
        if unknown := sorted(set(expected.tolist()) - set(captions.tolist())):
            raise ValueError(
                f"metrics 'classifier' is not supported: no training image has the caption {unknown[0]!r} of a "
                f"held-out one; {REMEDY}"
            )
        accuracy = np.mean(predict(images) == expected)
        print(f"the classifier assigns {accuracy:.1%} of {len(expected)} held-out images to their captions")
        return cls(predict, frozenset(captions.tolist()))

    def measure(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        """Raise ValueError for a prompt that no training image has as its caption."""
        if unknown := [prompt for prompt in prompts if prompt not in self.captions]:
            raise ValueError(
                f"metrics 'classifier' is not supported: no training image has the caption {unknown[0]!r} of a "
                f"held-out one; {REMEDY}"
            )
        return self.predict(shrink(images)) == np.array(prompts)

    @property
    def note(self) -> str:
        return (
            "The classifier's score is the share of images that a support vector machine, fitted on training images, "
            "assigns to their captions."
        )

    def result(self, rows: np.ndarray) -> dict[str, float]:
        return {"classifier": round(float(rows.mean()), 4)}

    def scores(self, rows: np.ndarray) -> np.ndarray:
        return rows.astype(float)


def _read(batches: Batches) -> tuple[np.ndarray, np.ndarray]:
    """Return (images of `shrink`, captions str[N])."""
    parts = [(shrink(images), captions) for images, captions in batches]
    return np.concatenate([images for images, _ in parts]), np.array([each for _, some in parts for each in some])
