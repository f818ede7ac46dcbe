"""Features of Inception v3, which FID, KID, precision and recall share."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from lcm_jax.compiler import compiler_options
from lcm_jax.evaluation.batches import in_batches
from lcm_jax.evaluation.evaluate import Images, Measure, Resources
from lcm_jax.evaluation.frechet import check_features
from lcm_jax.evaluation.inception_inputs import FLAVOURS, check_one_size, prepare_images
from lcm_jax.evaluation.statistics import Statistics, read_statistics
from lcm_jax.models.inception import FEATURES, InceptionV3, abstract_inception
from lcm_jax.models.layers import apply
from lcm_jax.weights.published import Published
from lcm_jax.weights.trees import to_params

FILE = "pt_inception-2015-12-05-6726825d.pth"
PUBLISHED = Published(
    FILE, f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}", sha256="6726825d"
)

Rows = dict[str, np.ndarray]  # "features" float32[N, 2048], "sizes" int32[N, 2]


def read_flavour(settings: Mapping[str, Any]) -> str:
    """Return the option `fid_flavour`. Raises ValueError for one that does not exist."""
    flavour = settings.get("fid_flavour", "torch-fidelity")
    if flavour not in FLAVOURS:
        raise ValueError(f"fid_flavour {flavour!r} is not supported; choose one of {', '.join(FLAVOURS)}")
    return flavour


def inception_features(
    tensors: Mapping[str, np.ndarray], batch_size: int, where: str = FILE
) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function float32[N, 299, 299, 3], in [-1, 1] -> float32[N, 2048].

    tensors: of the published file, by its keys. batch_size: images that one program takes. Raises ModelError for keys
    that are missing, extra or misshapen.
    """
    network = InceptionV3()
    unused = ("fc.", "num_batches_tracked")  # the classifier, and a count of training steps
    used = {key: tensors[key] for key in tensors if not key.startswith(unused[0]) and not key.endswith(unused[1])}
    params = jax.device_put(to_params("inception", used, abstract_inception(network), where))

    @partial(jax.jit, compiler_options=compiler_options())
    def encode(params, inputs):
        with jax.default_matmul_precision("highest"):  # a GPU's TF32 changes the third digit
            return apply(network, params, inputs)

    return lambda inputs: in_batches(lambda part: encode(params, part), inputs, batch_size)


def make_measure(features: Callable[[np.ndarray], np.ndarray], flavour: str) -> Measure:
    """Return a metric's `measure`, which returns `Rows`.

    features: see `inception_features`. It raises ValueError for images that the flavour's tool cannot read, and for
    features that are not finite.
    """

    def measure(images: Images, prompts: Sequence[str]) -> Rows:
        sizes = np.array([image.shape[:2] for image in images], np.int32)
        check_one_size(sizes, flavour)
        rows = features(prepare_images(images, flavour))
        check_features(rows)
        return {"features": rows, "sizes": sizes}

    return measure


def inception_measure(resources: Resources, flavour: str) -> Measure:
    """Return the `measure` that all metrics of this flavour share. Raises ModelError if there are no weights."""

    def make() -> Measure:
        tensors = resources.weights.open(PUBLISHED)
        return make_measure(inception_features(tensors, resources.batch_size), flavour)

    return resources.once(("inception", flavour), make)


def features_of(rows: Rows, flavour: str) -> np.ndarray:
    """Return float32[N, 2048]. Raises ValueError if the sizes of the images differ and the tool cannot read that."""
    check_one_size(rows["sizes"], flavour)
    return rows["features"]


def reference_statistics(resources: Resources, flavour: str) -> Statistics | None:
    """Return the statistics by which the reference is given, if it is. Raises ValueError as `read_statistics` does."""
    if (path := resources.statistics) is None:
        return None
    return resources.once(("statistics", path, flavour), lambda: read_statistics(path, flavour, FEATURES))


def reference_features(resources: Resources, flavour: str) -> np.ndarray:
    """Return float32[N, 2048] of the reference set.

    Raises ValueError if its statistics do not have them, and as `features_of` does.
    """
    statistics = reference_statistics(resources, flavour)
    if statistics is None:
        return features_of(resources.reference_rows(inception_measure(resources, flavour)), flavour)
    if statistics.features is None:
        raise ValueError(
            f"{resources.statistics} has the mean and the covariance of features alone, by which only FID is defined; "
            "use a folder of images as --reference, or a file with 'feats'"
        )
    return statistics.features
