"""The prompts of an evaluation, and the real images that it compares with, by the names that config.data.source has."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from lcm_jax.data.coco import read_coco
from lcm_jax.data.images import crop
from lcm_jax.data.shapes import Shapes, evaluation_prompts
from lcm_jax.data.sources import SOURCES
from lcm_jax.evaluation.evaluate import MAX_TRAIN_IMAGES, Batches, read_batches
from lcm_jax.evaluation.geneval_files import image_path, list_images, make_folders, read_metadata
from lcm_jax.evaluation.image_folder import read_image, stack

Part = Callable[[int], range]  # the numbers, of so many, that are this process's


class PromptSet(NamedTuple):
    """prompts: one for each image that is made. real_images, reference, train_images: see `Resources`; None where there
    are none. paths: of the images that are made, within a folder; None for their numbers. prepare(folder): writes what
    such a folder has beside its images."""

    prompts: list[str]
    reference: str
    real_images: Callable[[], Batches] | None = None
    train_images: Callable[[], Batches] | None = None
    paths: Sequence[Path] | None = None
    prepare: Callable[[Path], None] = lambda folder: None


def open_shapes(config, part: Part, folder: Path) -> PromptSet:
    data, report = config.data, config.report
    style, batch = data.get("style", "fill"), report.batch_size
    held_out = Shapes("test", report.reference, data.size, style=style)
    train = Shapes("train", MAX_TRAIN_IMAGES, data.size, style=style)
    return PromptSet(
        evaluation_prompts("test", report.prompts),
        f"{report.reference} held-out images of shapes",
        lambda: read_batches(held_out, part(report.reference), batch),
        lambda: read_batches(train, range(MAX_TRAIN_IMAGES), batch),
    )


def open_coco(config, part: Part, folder: Path) -> PromptSet:
    """Raise ValueError for captions or a folder that are not COCO's, and for a choice that is not supported."""
    data, report = config.data, config.report
    for key, choices in (("per_image", ("any", "first")), ("compared", ("paired", "all"))):
        if data[key] not in choices:
            raise ValueError(f"data.{key} {data[key]!r} is not supported; use {' or '.join(choices)}")
    for key in ("captions", "images"):
        if not data[key]:
            raise ValueError(f"data.{key} is missing; set --config.data.{key} to that of COCO (see configs/eval)")
    coco = read_coco(Path(data.captions), Path(data.images))
    chosen = coco.choose(report.prompts, data.per_image, report.seed)
    images = list(dict.fromkeys(each.image for each in chosen)) if data.compared == "paired" else list(coco.images)
    captions = {each.image: each.caption for each in reversed(coco.captions)} | {c.image: c.caption for c in chosen}

    def real_images() -> Iterator[tuple]:
        numbers = part(len(images))
        for first in range(0, len(numbers), report.batch_size):
            some = [images[i] for i in numbers[first : first + report.batch_size]]
            yield (
                stack([resize(read_image(path), data.real_size) for path in some]),
                [captions.get(p, "") for p in some],
            )

    prepared = f", cropped to {data.real_size} pixels" if data.real_size else ""
    kind = "paired with the prompts" if data.compared == "paired" else "all there are"
    name = f"{len(images)} images of {Path(data.images).name} ({kind}{prepared})"
    return PromptSet([each.caption for each in chosen], name, real_images)


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Return the middle of an image, resized by Pillow's bilinear filter to size x size; 0 leaves it as it is."""
    return image if not size else crop(Image.fromarray(image), size, size)[0]


def open_geneval(config, part: Part, folder: Path) -> PromptSet:
    """Raise ValueError for a file that is not GenEval's metadata, and if it has fewer prompts."""
    data, report = config.data, config.report
    per_prompt, path = data.images_per_prompt, config.get("settings", {}).get("metadata")

    if not path:
        raise ValueError("data.source 'geneval' requires its evaluation_metadata.jsonl; set --config.settings.metadata")
    prompts = read_metadata(Path(path))
    if report.prompts > len(prompts):
        raise ValueError(f"report.prompts {report.prompts} is more than the {len(prompts)} of {path}; lower it")
    prompts = prompts[: report.prompts]
    images = list_images(prompts, per_prompt)
    return PromptSet(
        [text for text, _ in images],
        "the requirements of the prompts",
        paths=[image_path(Path(), number, per_prompt) for _, number in images],
        prepare=lambda folder: make_folders(folder, prompts),
    )


def open_source(config, part: Part, folder: Path) -> PromptSet:
    """Raise ValueError as the source does."""
    data, report = config.data, config.report
    kind = SOURCES[data.source]
    source = kind(**{field.name: data[field.name] for field in fields(kind) if field.name in data})
    source.check(1)
    dataset = source.open(report.seed, folder, print)
    held_out, batch = dataset.held_out, report.batch_size
    reference = min(report.reference, len(held_out))
    stride = max(-(-len(dataset.train) // MAX_TRAIN_IMAGES), 1)
    return PromptSet(
        dataset.prompts(report.prompts),
        f"{reference} held-out images of {data.source}",
        lambda: read_batches(held_out, part(reference), batch),
        lambda: read_batches(dataset.train, range(0, len(dataset.train), stride), batch),
    )


PROMPT_SETS: Mapping[str, Callable[..., PromptSet]] = {
    **dict.fromkeys(SOURCES, open_source),
    "shapes": open_shapes,
    "coco": open_coco,
    "geneval": open_geneval,
}
