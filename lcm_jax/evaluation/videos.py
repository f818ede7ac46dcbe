"""Clips of videos in a folder: folders of numbered frames, or animations that Pillow decodes (GIF, WebP, APNG)."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError

CLIP_FRAMES = 16
SEED = 0
FRAMES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
ANIMATIONS = (".gif", ".webp", ".png", ".apng")
NOT_DECODED = (".mp4", ".webm", ".mov", ".avi", ".mkv", ".m4v", ".mpg", ".mpeg")


@dataclass(frozen=True)
class VideoFolder:
    """The videos of a folder, each of which has a clip, by the order of their names.

    random: a clip begins at a random frame, the same at each call, or at the first one.
    """

    root: Path
    paths: tuple[Path, ...]
    random: bool

    def batches(self, size: int, paths: Sequence[Path] | None = None) -> Iterator[tuple[list[np.ndarray], list[Path]]]:
        """Yield batches of `size` clips, uint8[CLIP_FRAMES, H, W, 3] each, and the paths of their videos.

        paths: some of the folder's videos; all by default. Raises ValueError as `read_frames` does.
        """
        chosen = self.paths if paths is None else paths
        for first in range(0, len(chosen), size):
            some = list(chosen[first : first + size])
            yield [read_frames(path, self._first_frame(path), CLIP_FRAMES) for path in some], some

    def _first_frame(self, path: Path) -> int:
        if not self.random:
            return 0
        rng = np.random.default_rng((SEED, self.paths.index(path)))
        return int(rng.integers(count_frames(path) - CLIP_FRAMES + 1))


def open_videos(
    root: Path, flag: str, random: bool, skip_bad: bool = False, log: Callable[[str], None] = print
) -> VideoFolder:
    """List the videos in a folder: its subfolders, and its animations. Their frames are counted, not decoded.

    flag: that named the folder. random: see `VideoFolder`. skip_bad: leave out those that cannot be opened or have
    fewer frames than a clip; each is logged. Raises ValueError for one of these otherwise, for a video that another
    program must decode, and if there is none.
    """
    if not root.is_dir():
        raise ValueError(f"{flag}={root} is not a folder; use a folder of videos")
    entries = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    for path in entries:
        if path.suffix.lower() in NOT_DECODED:
            raise ValueError(
                f"{path} is a video that cannot be decoded here; extract its frames into a folder of its own "
                f"(ffmpeg -i {path.name} {path.stem}/%05d.png)"
            )
    videos = [path for path in entries if path.is_dir() or path.suffix.lower() in ANIMATIONS]
    if not videos:
        raise ValueError(f"{flag}={root} has no videos; use a folder whose subfolders have the frames of a video each")
    usable = []
    for path in videos:
        try:
            if (count := count_frames(path)) < CLIP_FRAMES:
                raise ValueError(f"{path} has {count} frames, and a clip has {CLIP_FRAMES}")
        except ValueError as error:
            if not skip_bad:
                raise ValueError(f"{error}; remove it, or use --skip_bad") from None
            log(f"{error}: it is left out")
        else:
            usable.append(path)
    if not usable:
        raise ValueError(f"{flag}={root} has no video of {CLIP_FRAMES} frames or more; use longer videos")
    return VideoFolder(root, tuple(usable), random)


def count_frames(path: Path) -> int:
    """Return the number of frames of a video. Raises ValueError for a file that is not an animation."""
    if path.is_dir():
        return len(_frame_files(path))
    with _open(path) as image:
        return getattr(image, "n_frames", 1)


def read_frames(path: Path, first: int, count: int) -> np.ndarray:
    """Return `count` consecutive frames of a video from `first` on, uint8[count, H, W, 3].

    Raises ValueError for a frame that cannot be read or has another size than the first.
    """
    if path.is_dir():
        files = _frame_files(path)[first : first + count]
        images = [(file.name, _decode(file)) for file in files]
    else:
        images = []
        with _open(path) as animation:
            for i, frame in enumerate(ImageSequence.Iterator(animation)):
                if i >= first + count:
                    break
                if i >= first:
                    images.append((f"frame {i}", np.asarray(frame.convert("RGB"))))
    for name, image in images:
        if image.shape != images[0][1].shape:
            (height, width), (other_height, other_width) = images[0][1].shape[:2], image.shape[:2]
            raise ValueError(
                f"{path}: {name} is {other_width} x {other_height}, and its first frame {width} x {height}; use frames "
                "of one size"
            )
    return np.stack([image for _, image in images])


def _frame_files(folder: Path) -> list[Path]:
    """Return the images in a folder by their numbers: 2 before 10, with or without leading zeros."""
    files = [path for path in folder.iterdir() if path.suffix.lower() in FRAMES and not path.name.startswith(".")]
    return sorted(files, key=lambda path: [int(part) if part.isdigit() else part for part in _parts(path.name)])


def _parts(name: str) -> list[str]:
    """Split a name so that every second part is a number: two such lists can be compared."""
    return re.split(r"([0-9]+)", name)


def _decode(path: Path) -> np.ndarray:
    with _open(path) as image:
        try:
            return np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{path} cannot be decoded ({error}); remove its video") from None


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{path} cannot be opened ({error})") from None
