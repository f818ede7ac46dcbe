"""Evaluation of images by metrics: rows of each image, batch by batch, and figures of all of them with intervals."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import jax
import numpy as np

from lcm_jax.data.captioned import Records
from lcm_jax.evaluation.bootstrap import intervals
from lcm_jax.weights.published import Weights

MAX_TRAIN_IMAGES = 2000  # that metrics compare with

Images = np.ndarray | Sequence[np.ndarray]  # uint8[B, H, W, 3], or uint8[H, W, 3] each where sizes differ
Rows = Any  # a pytree of arrays with a leading axis for the images
Measure = Callable[[Images, Sequence[str]], Rows]
Batches = Iterable[tuple[Images, Sequence[str]]]

# draw(sampler, steps) -> batches (uint8[B, H, W, 3], seconds without compilation) for all prompts, in their order
Draw = Callable[[str, int], Iterable[tuple[np.ndarray, float]]]


def concatenate(rows: Sequence[Rows]) -> Rows:
    """Return the rows of several sets of images, one after another."""
    return jax.tree.map(lambda *parts: np.concatenate(parts), *rows)


@dataclass(frozen=True, eq=False)
class Resources:
    """Resources that metrics compare images with.

    real_images: returns batches (images, their captions) of the reference set, from the first one on at each call, in
    one of several processes a part of them; reference: the name of the set, or "" for none. train_images: the same of
    training images, if there are any. features: uint8[B, H, W, 3] -> float[B, D] of an autoencoder, if there is one.
    statistics: a .npz file of the reference set, in place of its images. weights: published weights of feature
    networks. settings: of the metrics, by name. batch_size: images that a network takes at once. gather: see
    `measure_batches`.
    """

    real_images: Callable[[], Batches] | None
    reference: str
    train_images: Callable[[], Batches] | None = None
    features: Callable[[Images], np.ndarray] | None = None
    statistics: Path | None = None
    weights: Weights = Weights(None)
    settings: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 32
    gather: Callable[[Rows], Rows] = lambda rows: rows
    _made: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return what `make` returned for this key at its first call.

        Metrics that get their `measure` here share its rows: images pass a network once.
        """
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def reference_rows(self, measure: Measure) -> Rows:
        """Return the rows of all images of the reference set, measured at the first call.

        Raises ValueError if the reference is given by its statistics, and if it has no images.
        """
        if self.real_images is None:
            reason = f"{self.reference} has none" if self.reference else "--reference is missing"
            raise ValueError(f"a metric compares with real images, and {reason}; use a folder of images")
        return self.once(("reference", measure), lambda: self._measure_reference(measure))

    def _measure_reference(self, measure: Measure) -> Rows:
        assert self.real_images is not None
        parts = [measure(images, captions) for images, captions in self.real_images()]
        if not parts:
            raise ValueError(f"the reference {self.reference} has no images; use another")
        return self.gather(concatenate(parts))


def make_resources(
    features: Callable[[Images], np.ndarray], held_out: Records, reference: int, train: Records, batch_size: int
) -> Resources:
    """Return the resources of a data set: its first `reference` held-out images, and training images.

    features: see `Resources`. held_out, train: records with "image" and "caption". At most MAX_TRAIN_IMAGES of `train`
    are read, spread evenly, since sets may be sorted by caption.
    """
    stride = -(-len(train) // MAX_TRAIN_IMAGES)
    return Resources(
        real_images=lambda: read_batches(held_out, range(reference), batch_size),
        reference=f"{reference} held-out images",
        train_images=lambda: read_batches(train, range(0, len(train), stride), batch_size),
        features=features,
        batch_size=batch_size,
    )


def read_batches(records: Records, numbers: range, batch_size: int) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Yield batches (uint8[B, H, W, 3], captions) of the records with these numbers."""
    for first in range(0, len(numbers), batch_size):
        batch = [records[i] for i in numbers[first : first + batch_size]]
        yield np.stack([record["image"] for record in batch]), [record["caption"] for record in batch]


class Column(NamedTuple):
    """heading: in a table. format: of the value, or of every value if the column is a group {name: value}."""

    heading: str
    format: str


class Metric(Protocol):
    """A measure of images and their prompts: rows of each image, and figures of all rows.

    columns: every key of `result`; the first is a number, by which models are compared, and lower_is_better is True if
    a better model has a lower one. note: what a reader has to know of the figures, such as the variant and the
    reference set, one sentence. sources: the data sources whose captions the metric can judge, or None for any.
    packages: {module: package that provides it} beyond those that lcm_jax requires. resamplings: of the bootstrap,
    fewer where `result` takes long. reads_prompts: False if `measure` looks at the images alone.
    measure(images, prompts): the rows of these images, one for each, whatever other images are measured with them;
    metrics that have the same `measure` share its rows.
    """

    columns: ClassVar[Mapping[str, Column]]
    lower_is_better: ClassVar[bool]
    sources: ClassVar[tuple[str, ...] | None]
    packages: ClassVar[Mapping[str, str]]
    resamplings: ClassVar[int]
    reads_prompts: ClassVar[bool]

    @property
    def note(self) -> str: ...

    @property
    def measure(self) -> Measure: ...

    @classmethod
    def create(cls, resources: Resources) -> Self: ...

    def result(self, rows: Rows) -> dict[str, Any]:
        """Return {column: value} of rows, in any order and with any of them repeated; the value of a group is
        {name: value}."""
        ...

    def scores(self, rows: Rows) -> np.ndarray | None:
        """Return float[N], a number for each image by which the best and the worst are shown, higher for better; None
        if single images have none."""
        ...


def measure_batches(
    batches: Batches, metrics: Mapping[str, Metric], gather: Callable[[Rows], Rows] = lambda rows: rows
) -> dict[str, Rows]:
    """Return the rows of all images by metric. One batch is held at a time.

    gather: rows of this process -> those of all processes, in the order of the images.
    """
    measures = dict.fromkeys(metric.measure for metric in metrics.values())
    parts: dict[Measure, list[Rows]] = {measure: [] for measure in measures}
    for images, prompts in batches:
        for measure, some in parts.items():
            some.append(measure(images, prompts))
    rows = {measure: gather(concatenate(some)) for measure, some in parts.items()}
    return {name: rows[metric.measure] for name, metric in metrics.items()}


def figures(metrics: Mapping[str, Metric], rows: Mapping[str, Rows], resample: bool = True) -> dict[str, Any]:
    """Return {column: value} of all metrics, and with `resample` their "intervals" {column: (low, high)}.

    Raises ValueError for a figure that is not finite.
    """
    found: dict[str, Any] = {}
    ranges: dict[str, Any] = {}
    for name, metric in metrics.items():
        result = metric.result(rows[name])
        if bad := [column for column, value in result.items() if isinstance(value, float) and not np.isfinite(value)]:
            raise ValueError(f"{bad[0]} is {result[bad[0]]}; check the images and the weights of metric {name!r}")
        found |= result
        if resample:
            ranges |= intervals(metric.result, rows[name], result, metric.resamplings)
    return found | ({"intervals": ranges} if resample else {})


def seven_digits(value: float) -> float:
    """Return a number with seven significant digits, which are about those of the float32 features behind it."""
    return float(f"{value:.7g}")


def speed(counts: Sequence[int], seconds: Sequence[float]) -> dict[str, float]:
    """Return images/s and the median and 95th percentile of the seconds of a batch, from those of each batch."""
    if not seconds:
        return {}
    median, high = np.percentile(seconds, (50, 95))
    digits = lambda value: float(f"{value:.4g}")  # noqa: E731
    return {
        "images_per_s": digits(sum(counts) / sum(seconds)),
        "latency_p50_s": digits(median),
        "latency_p95_s": digits(high),
    }


def evaluate(
    draw: Draw,
    plan: Mapping[str, Sequence[int]],
    prompts: Sequence[str],
    metrics: Mapping[str, Metric],
    resample: bool = True,
) -> Iterator[dict[str, Any]]:
    """Yield a row {"sampler", "steps", columns of the metrics, their intervals, `speed`} for every number of steps.

    plan: {sampler: numbers of steps}; a sampler without any is left out. One batch of images is held at a time. Raises
    ValueError if `draw` returns more or fewer images than there are prompts, and as `figures` does.
    """
    for sampler, numbers in plan.items():
        for steps in numbers:
            counts: list[int] = []
            seconds: list[float] = []

            def batches(sampler=sampler, steps=steps, counts=counts, seconds=seconds) -> Batches:
                for images, elapsed in draw(sampler, steps):
                    first = sum(counts)
                    counts.append(len(images))
                    seconds.append(elapsed)
                    if sum(counts) <= len(prompts):
                        yield images, prompts[first : sum(counts)]
                if sum(counts) != len(prompts):
                    raise ValueError(
                        f"{sampler} {steps} gave {sum(counts)} images for {len(prompts)} prompts; use one for each"
                    )

            rows = measure_batches(batches(), metrics)
            row: dict[str, Any] = {"sampler": sampler, "steps": steps}
            yield row | figures(metrics, rows, resample) | speed(counts, seconds)
