"""Images that an evaluation has made, kept in a folder: one that is there is not made again."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lcm_jax.evaluation.evaluate import Images
from lcm_jax.evaluation.image_folder import read_image, stack
from lcm_jax.files import whole_file


@dataclass(frozen=True)
class MadeImages:
    """The images of a row of the report, and the seconds that each batch of them took.

    folder: of the row. paths: of the images within it, by number; None for 000000.png and so on. process: the number of
    this process, which writes a file of seconds of its own.
    """

    folder: Path
    paths: Sequence[Path] | None
    process: int = 0

    def path(self, number: int) -> Path:
        return self.folder / (self.paths[number] if self.paths is not None else f"{number:06d}.png")

    def missing(self, numbers: Sequence[int]) -> list[int]:
        """Return the numbers of the images that are not there."""
        return [number for number in numbers if not self.path(number).exists()]

    def write(self, numbers: Sequence[int], images: np.ndarray, seconds: float) -> None:
        """Write images, each whole or not at all, and that a batch of so many took so long."""
        for number, image in zip(numbers, images, strict=True):
            path = self.path(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as temporary:
                Image.fromarray(image).save(temporary, format="PNG")
        with (self.folder / f"seconds-{self.process}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"images": len(numbers), "seconds": round(seconds, 6)}) + "\n")

    def batches(self, numbers: Sequence[int], size: int) -> Iterator[tuple[Images, list[int]]]:
        """Yield batches of images and their numbers. Raises ValueError for an image that is damaged."""
        for first in range(0, len(numbers), size):
            some = list(numbers[first : first + size])
            yield stack([read_image(self.path(number)) for number in some]), some

    def timings(self) -> tuple[list[int], list[float]]:
        """Return the images and the seconds of the batches that all processes have made so far.

        A line that a kill cut short is left out.
        """
        counts, seconds = [], []
        for file in sorted(self.folder.glob("seconds-*.jsonl")):
            for line in file.read_text(encoding="utf-8").splitlines():
                if line.endswith("}"):
                    batch = json.loads(line)
                    counts.append(batch["images"])
                    seconds.append(batch["seconds"])
        return counts, seconds
