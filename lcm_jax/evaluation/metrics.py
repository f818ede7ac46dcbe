"""The table of metrics, by the names that `config.metrics` uses."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec

from lcm_jax.evaluation.classifier import Classifier
from lcm_jax.evaluation.clip_score import ClipScore
from lcm_jax.evaluation.cmmd import CMMD
from lcm_jax.evaluation.evaluate import Metric, Resources
from lcm_jax.evaluation.fd_dinov2 import FDDinov2
from lcm_jax.evaluation.fid import FID
from lcm_jax.evaluation.frechet import FrechetDistance
from lcm_jax.evaluation.fvd import FVD
from lcm_jax.evaluation.geneval import GenEval
from lcm_jax.evaluation.kid import KID
from lcm_jax.evaluation.precision import Precision
from lcm_jax.evaluation.preference import HPS, Aesthetic, PickScore
from lcm_jax.evaluation.verifier import Verifier

METRICS: Mapping[str, type[Metric]] = {
    "verifier": Verifier,
    "frechet": FrechetDistance,
    "classifier": Classifier,
    "clip_score": ClipScore,
    "pick_score": PickScore,
    "hps": HPS,
    "aesthetic": Aesthetic,
    "cmmd": CMMD,
    "fd_dinov2": FDDinov2,
    "fid": FID,
    "kid": KID,
    "precision": Precision,
    "fvd": FVD,
    "geneval": GenEval,
}


def check_metrics(names: Sequence[str], source: str | None) -> None:
    """Raise ValueError for a metric that does not exist, comes twice, cannot judge captions of the data source, or
    requires a package that is not installed, and for one of videos beside metrics of images.

    source: None if it is not known.
    """
    if isinstance(names, str) or not names:
        raise ValueError(f"metrics {names!r} is not supported; use a tuple of {', '.join(METRICS)}")
    for i, name in enumerate(names):
        if name not in METRICS:
            raise ValueError(f"metrics {name!r} is not supported; use {' or '.join(METRICS)}")
        if name in names[:i]:
            raise ValueError(f"metrics {tuple(names)!r} has {name!r} twice; use it once")
        if name == "fvd" and (source is not None or len(names) > 1):
            raise ValueError(
                "metrics 'fvd' measures videos, not images; use it alone, with folders of videos as --images and "
                "--reference"
            )
        sources = METRICS[name].sources
        if sources is not None and source is not None and source not in sources:
            raise ValueError(
                f"metrics {name!r} is not supported for data.source {source!r}, as it judges captions of "
                f"{' or '.join(sources)} alone; remove it from --config.metrics"
            )
        for module, package in METRICS[name].packages.items():
            if find_spec(module) is None:
                raise ValueError(f"metrics {name!r} requires {package}; install it (pip install {package})")


def make_metrics(names: Sequence[str], resources: Resources) -> dict[str, Metric]:
    """Return the metrics of these names, ready to measure; what they compare with is computed here, once."""
    return {name: METRICS[name].create(resources) for name in names}
