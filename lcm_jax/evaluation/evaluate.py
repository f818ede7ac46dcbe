"""Evaluation of a model by metrics: images for a plan of samplers and steps, measured batch by batch."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import numpy as np

from lcm_jax.data.captioned import Records

MAX_TRAIN_IMAGES = 2000  # that metrics compare with

# draw(sampler, steps) -> batches (uint8[B, H, W, 3], seconds without compilation) for all prompts, in their order
Draw = Callable[[str, int], Iterable[tuple[np.ndarray, float]]]


class Resources(NamedTuple):
    """Resources that metrics compare images with.

    features: uint8[B, H, W, 3] -> float[B, D]. real_images: returns batches (uint8[B, H, W, 3], their captions) of
    held-out images, from the first one on at each call. train_images: the same of training images.
    """

    features: Callable[[np.ndarray], np.ndarray]
    real_images: Callable[[], Iterable[tuple[np.ndarray, Sequence[str]]]]
    train_images: Callable[[], Iterable[tuple[np.ndarray, Sequence[str]]]]


def make_resources(
    features: Callable[[np.ndarray], np.ndarray], held_out: Records, reference: int, train: Records, batch_size: int
) -> Resources:
    """Return the resources of a data set: its first `reference` held-out images, and training images.

    features: see `Resources`. held_out, train: records with "image" and "caption". At most MAX_TRAIN_IMAGES of `train`
    are read, spread evenly, since sets may be sorted by caption.
    """
    stride = -(-len(train) // MAX_TRAIN_IMAGES)
    return Resources(
        features,
        real_images=lambda: _batches(held_out, range(reference), batch_size),
        train_images=lambda: _batches(train, range(0, len(train), stride), batch_size),
    )


def _batches(records: Records, numbers: range, batch_size: int) -> Iterator[tuple[np.ndarray, list[str]]]:
    for first in range(0, len(numbers), batch_size):
        batch = [records[i] for i in numbers[first : first + batch_size]]
        yield np.stack([record["image"] for record in batch]), [record["caption"] for record in batch]


class Column(NamedTuple):
    """heading: in a table. format: of the value, or of every value if the column is a group {name: value}."""

    heading: str
    format: str


class Metric(Protocol):
    """A measure of images and their prompts that accumulates in a state, a pytree of arrays.

    Parts of a set, from batches or from processes, are measured apart and merged in any order. columns: every key of
    `result`; the one that has the metric's name in `METRICS` is a number, by which models are compared, and
    lower_is_better is True if a better model has a lower one. note: what a reader has to know of them, one sentence.
    sources: the data sources whose captions the metric can judge, or None for any. packages: {module: package that
    provides it} beyond those that lcm_jax requires.
    """

    columns: ClassVar[Mapping[str, Column]]
    lower_is_better: ClassVar[bool]
    note: ClassVar[str]
    sources: ClassVar[tuple[str, ...] | None]
    packages: ClassVar[Mapping[str, str]]

    @classmethod
    def create(cls, resources: Resources) -> Self: ...

    def measure(self, images: np.ndarray, prompts: Sequence[str]) -> Any:
        """images: uint8[B, H, W, 3], one for each prompt. Return the state of these images alone."""
        ...

    def merge(self, a: Any, b: Any) -> Any:
        """Return the state of both sets of images."""
        ...

    def result(self, state: Any) -> dict[str, Any]:
        """Return {column: value}; the value of a group is {name: value}."""
        ...


def evaluate(
    draw: Draw, plan: Mapping[str, Sequence[int]], prompts: Sequence[str], metrics: Mapping[str, Metric]
) -> Iterator[dict[str, Any]]:
    """Yield a row {"sampler", "steps", columns of the metrics, "images_per_s"} for every number of steps in the plan.

    plan: {sampler: numbers of steps}; a sampler without any is left out. One batch of images is held at a time. Raises
    ValueError if `draw` returns more or fewer images than there are prompts.
    """
    for sampler, numbers in plan.items():
        for steps in numbers:
            states: dict[str, Any] = {}
            count, seconds = 0, 0.0
            for images, elapsed in draw(sampler, steps):
                chosen = prompts[count : count + len(images)]
                for name, metric in metrics.items():
                    state = metric.measure(images, chosen)
                    states[name] = metric.merge(states[name], state) if name in states else state
                count, seconds = count + len(images), seconds + elapsed
            if count != len(prompts):
                raise ValueError(f"{sampler} {steps} gave {count} images for {len(prompts)} prompts; use one for each")
            row: dict[str, Any] = {"sampler": sampler, "steps": steps}
            for name, metric in metrics.items():
                row |= metric.result(states[name])
            yield row | {"images_per_s": float(f"{count / seconds:.4g}")}
