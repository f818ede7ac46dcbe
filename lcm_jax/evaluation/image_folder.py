"""Folders of images made by anything, as the reference tools of metrics read them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lcm_jax.evaluation.evaluate import Images
from lcm_jax.evaluation.geneval_files import find_prompt
from lcm_jax.files import decode

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MAX_NAMED = 5


def read_image(path: Path) -> np.ndarray:
    """Return uint8[H, W, 3] by Pillow's own conversion to RGB, which the tools of the field use: 16 bits are clipped to
    8, and transparency is dropped.

    Raises ValueError that names a file which is not an undamaged image.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise many kinds
        raise ValueError(f"{path} is not an undamaged image ({error})") from error


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder at any depth, by the order of their paths."""

    root: Path
    paths: tuple[Path, ...]

    def batches(self, size: int, paths: Sequence[Path] | None = None) -> Iterator[tuple[Images, list[Path]]]:
        """Yield batches of `size` images and their paths: an array if all of a batch have one size, else a list.

        paths: some of the folder's images; all by default.
        """
        chosen = self.paths if paths is None else paths
        for first in range(0, len(chosen), size):
            some = list(chosen[first : first + size])
            yield stack([read_image(path) for path in some]), some


def stack(images: Sequence[np.ndarray]) -> Images:
    """Return images as one array if all have one size, else as they are."""
    return np.stack(images) if len({image.shape for image in images}) == 1 else list(images)


def open_folder(root: Path, flag: str, skip_bad: bool = False, log: Callable[[str], None] = print) -> ImageFolder:
    """List the images of a folder, each of which is read once to know that it can be.

    flag: that named the folder. skip_bad: leave out what cannot be read; each is logged. Raises ValueError if there is
    no image, and for one that cannot be read.
    """
    if not root.is_dir():
        raise ValueError(f"{flag}={root} is not a folder; use a folder of images")
    found = (path for path in root.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
    # GenEval's own script writes a grid of the images of each prompt beside them.
    paths = sorted(path for path in found if path.name != "grid.png" or not (path.parent / "metadata.jsonl").exists())
    if not paths:
        raise ValueError(f"{flag}={root} has no images ({', '.join(EXTENSIONS)}); use another folder")
    bad = [path for path in paths if not _readable(path)]
    if bad:
        named = ", ".join(str(path) for path in bad[:MAX_NAMED]) + (", ..." if len(bad) > MAX_NAMED else "")
        if not skip_bad:
            raise ValueError(f"{len(bad)} of {len(paths)} images in {root} cannot be read: {named}; use --skip_bad")
        log(f"{len(bad)} of {len(paths)} images in {root} cannot be read and are left out: {named}")
    readable = tuple(path for path in paths if path not in set(bad))
    if not readable:
        raise ValueError(f"{flag}={root} has no image that can be read; use another folder")
    return ImageFolder(root, readable)


def _readable(path: Path) -> bool:
    try:
        read_image(path)
    except ValueError:
        return False
    return True


def read_prompts(folder: ImageFolder, file: Path | None) -> list[str]:
    """Return the prompt of each image: a line of `file` for each, or in GenEval's layout that of its metadata.jsonl, or
    the text of NAME.txt beside NAME.png.

    Raises ValueError if they do not pair.
    """
    if file is not None:
        if not file.is_file():
            raise ValueError(f"--prompts={file} is not a file; use a text file with a line for each image")
        prompts = decode(file.read_bytes(), str(file)).splitlines()
        if len(prompts) != len(folder.paths):
            raise ValueError(
                f"--prompts={file} has {len(prompts)} lines, and {folder.root} has {len(folder.paths)} images; use a "
                "line for each, in the order of the images' names"
            )
    else:
        beside = [path.with_suffix(".txt") for path in folder.paths]
        missing = [path for path in beside if not path.is_file()]
        listed = [find_prompt(path) for path in folder.paths] if len(missing) == len(beside) else [None]
        prompts = [prompt for prompt in listed if prompt is not None]
        if missing and len(prompts) < len(beside):
            raise ValueError(
                f"{len(missing)} of {len(beside)} images in {folder.root} have no prompt, first {missing[0].name}; add "
                "these files, or use --prompts"
            )
        prompts = prompts or [decode(path.read_bytes(), str(path)).strip() for path in beside]
    if empty := [path for path, prompt in zip(folder.paths, prompts, strict=True) if not prompt.strip()]:
        raise ValueError(f"the prompt of {empty[0]} is empty; write one")
    return prompts
