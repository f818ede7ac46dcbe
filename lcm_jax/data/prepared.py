"""Images of any source, prepared for training: upright, RGB, resized and cropped to one of a few sizes, captioned.

A source gives random access to images as they are stored (`StoredImages`); all else is here, once for all of them.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lcm_jax.data import images
from lcm_jax.data.buckets import Size, check_buckets, nearest_bucket
from lcm_jax.data.captioned import CaptionedDataset, SourceError, UnreadableRecord, caption_fields
from lcm_jax.data.filters import MIN_SIZE, Rule, parse_filters, select
from lcm_jax.data.stored import StoredImages, open_image, read_sizes
from lcm_jax.data.substitutes import Substitutes

PIXELS = "upright, on white"  # change it with the way pixels are made, so that caches are encoded again
SKIPPED = "skipped"  # the entry of a record that has replaced others: their numbers and reasons


@dataclass(frozen=True)
class Preparation:
    """The sizes of a set, and its random choices: those of a record depend on (seed, image, repeat) alone.

    sizes: of the prepared images; an image has the one of its bucket. repeats: times that the set has each image.
    """

    sizes: tuple[Size, ...]
    seed: int
    repeats: int = 1
    random_crop: bool = False
    flip: bool = False


class PreparedImages:
    """Random access to {"image": uint8[height, width, 3], "caption": str, "time_ids": float32[6]}.

    The set has the images `numbers` in turn, `repeats` times. An upright image is mirrored (half of them, if `flip`),
    resized until it covers its size, and cropped: in the middle, or if `random_crop` at random. Of several captions, a
    record has one at random. time_ids are SDXL's sizes: see `images.crop`.

    An image or a caption that cannot be read is reported to `log` and replaced by another of the same size, see
    `Substitutes`; the record then has `SKIPPED`, of the kind Failures. Raises SourceError.
    """

    def __init__(
        self,
        stored: StoredImages,
        numbers: np.ndarray,
        preparation: Preparation,
        log: Callable[[str], None],
        failure: tuple[str, str],
        *,
        buckets: np.ndarray | None = None,
        max_skipped: float = 1.0,
    ):
        """numbers: int64[n], of images in `stored`. failure: see `Substitutes`. buckets: int32[n], the number of the
        size of each; None if there is one size."""
        self._stored, self._numbers, self._preparation, self._buckets = stored, numbers, preparation, buckets
        name = lambda i: stored.name(int(numbers[i]))  # noqa: E731
        self.substitutes = Substitutes(len(numbers), name, log, failure, (SourceError,), buckets, max_skipped)

    def __len__(self) -> int:
        return len(self._numbers) * self._preparation.repeats

    def __getitem__(self, i: int) -> dict[str, Any]:
        repeat, place = self._place(i)
        record, failures = self.substitutes.read(place, lambda place: self._prepare(place, repeat))
        return record | {SKIPPED: failures} if failures else record

    def read(self, i: int) -> dict[str, Any]:
        """Return record i; no other record replaces it. Raises UnreadableRecord, and SourceError."""
        repeat, place = self._place(i)
        try:
            return self._prepare(place, repeat)
        except SourceError:
            raise
        except Exception as error:  # Pillow's decoders raise many kinds
            raise UnreadableRecord(self._stored.name(int(self._numbers[place])), type(error).__name__) from error

    def name(self, i: int) -> str:
        """Return the name of record i in messages."""
        return self._stored.name(int(self._numbers[self._place(i)[1]]))

    def caption(self, i: int) -> str:
        """Return the caption of record i without reading its image."""
        repeat, place = self._place(i)
        return self.substitutes.read(place, lambda place: self._caption(place, repeat))[0]

    @property
    def buckets(self) -> np.ndarray | None:
        """The number of the size of each record, int32[N]; None if there is one size."""
        return None if self._buckets is None else np.tile(self._buckets, self._preparation.repeats)

    def _place(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        return divmod(i, len(self._numbers))

    def _caption(self, place: int, repeat: int) -> str:
        captions = self._stored.captions(int(self._numbers[place]))
        if len(captions) == 1:
            return captions[0]
        rng = np.random.default_rng([self._preparation.seed, place, repeat, 1])  # not that of crops
        return captions[int(rng.integers(len(captions)))]

    def _prepare(self, place: int, repeat: int) -> dict[str, Any]:
        caption = self._caption(place, repeat)
        own, image = self._preparation, open_image(self._stored, int(self._numbers[place]))
        rng = np.random.default_rng([own.seed, place, repeat])
        if own.flip and rng.integers(2):
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        height, width = own.sizes[0 if self._buckets is None else self._buckets[place]]
        pixels, sizes = images.crop(image, height, width, rng if own.random_crop else None)
        return {"image": pixels, "caption": caption, "time_ids": sizes}


@dataclass(frozen=True, kw_only=True)
class ImageSource(ABC):
    """A source of image files: the keys of `config.data` that all of them have.

    size: of the images in pixels. held_out: how many of the last images are not trained on; these are cropped in the
    middle to a square of `size`, and not mirrored. caption_field: the name of the caption in metadata, or several, of
    whose captions each record has one at random. repeats: times that the training part has each image. crop: "center"
    or "random". flip: mirror half of the images. buckets: (height, width) of the training images in place of `size`,
    each cropped to that with the nearest aspect ratio. filters: rules as of `filters.parse_filters`. max_skipped: the
    part of the records in training batches that may be unreadable.
    """

    size: int
    held_out: int
    caption_field: str | Sequence[str] = "caption"
    repeats: int = 1
    crop: str = "center"
    flip: bool = False
    buckets: Sequence[Size] = ()
    filters: Sequence[str] = ()
    max_skipped: float = 0.05

    @property
    @abstractmethod
    def failure(self) -> tuple[str, str]:
        """The key that names the files, and the remedy if they cannot be read."""

    @abstractmethod
    def store(self, fields: Sequence[str], folder: Path, log: Callable[[str], None]) -> StoredImages:
        """Open the images, with the `values` of these fields. folder: for an index. Raises ValueError, OSError."""

    @property
    def settings(self) -> Mapping[str, str]:
        """Entries of the manifest beside those of every source."""
        return {}

    def check(self, batch_size: int) -> None:
        parse_filters(self.filters)
        check_buckets(self.buckets)
        caption_fields(self.caption_field)

    def open(self, seed: int, folder: Path, log: Callable[[str], None]) -> CaptionedDataset:
        rules, sizes = parse_filters(self.filters), check_buckets(self.buckets)
        named = {rule.field for rule in rules}
        measured = bool(sizes) or MIN_SIZE in named
        stored = self.store(sorted(named - {MIN_SIZE} | ({"height", "width"} if measured else set())), folder, log)
        measures = read_sizes(stored, folder, log) if measured else np.zeros((len(stored), 2), np.int32)
        numbers = self._select(stored, rules, measures, log)
        count = self.count_train(len(numbers), filtered=bool(rules))
        buckets = nearest_bucket(measures[numbers[:count]], sizes) if sizes else None
        if buckets is not None:
            counts = np.bincount(buckets, minlength=len(sizes))
            each = ", ".join(f"{height} x {width}: {n}" for (height, width), n in zip(sizes, counts, strict=True))
            log(f"images by bucket (height x width): {each}")
        square = ((self.size, self.size),)
        preparation = Preparation(sizes or square, seed, self.repeats, self.crop == "random", self.flip)
        train = PreparedImages(
            stored, numbers[:count], preparation, log, self.failure, buckets=buckets, max_skipped=self.max_skipped
        )
        held_out = PreparedImages(stored, numbers[count:], Preparation(square, seed), log, self.failure)
        return CaptionedDataset(
            train=train,
            held_out=held_out,
            prompts=lambda n: [held_out[i]["caption"] for i in range(n)],  # of the images that are shown beside them
            compositional_prompts=lambda n: [],
            manifest=self._manifest(stored.digest(numbers[:count]), seed),
            buckets=train.buckets,
            bucket_sizes=sizes,
            substitutes=train.substitutes,
        )

    def count_train(self, count: int, *, filtered: bool = False) -> int:
        """Return how many of `count` images are trained on. Raises ValueError if none are left."""
        if count <= self.held_out:
            rest = f"{count} records of {self.failure[0]}{' that data.filters leave' if filtered else ''}"
            raise ValueError(f"data.held_out {self.held_out} leaves none of the {rest} to train on; lower it")
        return count - self.held_out

    def _select(self, stored: StoredImages, rules: Sequence[Rule], sizes: np.ndarray, log) -> np.ndarray:
        shorter = sizes.min(axis=1).astype(np.float64)
        values = {**stored.values, MIN_SIZE: np.where(shorter > 0, shorter, math.nan)}
        return select(rules, values, len(stored), log)

    def _manifest(self, files: str, seed: int) -> dict[str, str]:
        settings = {
            "files": files,
            "size": self.size if not self.buckets else "",
            "buckets": self.buckets,
            "crop": self.crop,
            "flip": self.flip,
            "repeats": self.repeats,
            "filters": self.filters,
            "caption_field": self.caption_field,
            "seed": seed,
            "pixels": PIXELS,
        }
        return {
            name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()
        } | dict(self.settings)
