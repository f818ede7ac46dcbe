"""Clips of videos in a folder: folders of numbered frames, or animations that Pillow decodes (GIF, WebP, APNG)."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError

CLIP_FRAMES = 16
SEED = 0
FRAMES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
ANIMATIONS = (".gif", ".webp", ".png", ".apng")
NOT_DECODED = (".mp4", ".webm", ".mov", ".avi", ".mkv", ".m4v", ".mpg", ".mpeg")


def list_videos(folder: Path) -> list[Path]:
    """Return the videos in a folder, sorted by name: its subfolders and its animations.

    Raises ValueError if there are none, and for a video that must be decoded by another program.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; use a folder of videos")
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for path in entries:
        if path.suffix.lower() in NOT_DECODED:
            raise ValueError(
                f"{path} is a video that cannot be decoded here; extract its frames into a folder of its own "
                f"(ffmpeg -i {path.name} {path.stem}/%05d.png)"
            )
    videos = [path for path in entries if path.is_dir() or path.suffix.lower() in ANIMATIONS]
    if not videos:
        raise ValueError(f"{folder} has no videos; use a folder whose subfolders hold the frames of a video each")
    return videos


def read_clips(
    folder: Path, random: bool, frames: int = CLIP_FRAMES, skip_short: bool = False
) -> Iterator[tuple[Path, np.ndarray]]:
    """Yield (video, its clip uint8[frames, H, W, 3]) of the videos in a folder, in order.

    random: begin at a random frame, which is the same at each call, or at the first. skip_short: leave out videos of
    fewer frames. Raises ValueError for such a video otherwise, and as `list_videos` and `read_frames` do.
    """
    count = 0
    for number, path in enumerate(list_videos(folder)):
        available = count_frames(path)
        if available < frames:
            if skip_short:
                continue
            raise ValueError(
                f"{path} has {available} frames, and a clip has {frames}; remove it, or leave short videos out"
            )
        count += 1
        rng = np.random.default_rng((SEED, number))
        yield path, read_frames(path, int(rng.integers(available - frames + 1)) if random else 0, frames)
    if not count:
        raise ValueError(f"{folder} has no video of {frames} frames or more; use longer videos")


def clip_batches(
    folder: Path, random: bool, batch_size: int, skip_short: bool = False
) -> Iterator[tuple[Sequence[np.ndarray], list[str]]]:
    """Yield batches (clips, their videos' names): what a metric of videos measures in place of images and prompts."""
    clips, names = [], []
    for path, clip in read_clips(folder, random, skip_short=skip_short):
        clips.append(clip)
        names.append(path.name)
        if len(clips) == batch_size:
            yield clips, names
            clips, names = [], []
    if clips:
        yield clips, names


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
            raise ValueError(f"{path} cannot be decoded ({error}); replace it, or remove its video") from None


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{path} cannot be opened ({error}); replace it, or remove its video") from None
