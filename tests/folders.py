"""Small folders of captioned images, as people have them."""

import io
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from shards import WORDS


def image(seed: int, width: int = 40, height: int = 24, kind: str = "PNG", mode: str = "RGB", **options) -> bytes:
    """A file of random blocks of 8 pixels."""
    blocks = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), 3))
    pixels = blocks.astype(np.uint8).repeat(8, 0).repeat(8, 1)[:height, :width]
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def write(folder: Path, files: Mapping[str, bytes | str | list | dict]) -> Path:
    """Write files by their paths: bytes and text as they are, a dict as JSON, a list as lines of JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in content)
        elif isinstance(content, dict):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def write_folder(folder: Path, count: int = 24) -> str:
    """Write images of 40 x 24 pixels (width, height) with captions as text or JSON."""
    for i in range(count):
        caption = f"a {WORDS[i % len(WORDS)]}"
        text = {f"{i:02d}.txt": caption} if i % 2 else {f"{i:02d}.json": {"caption": caption}}
        write(folder, {f"{i:02d}.png": image(i)} | text)
    return str(folder)
