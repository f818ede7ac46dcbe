"""Small tar shards of captioned images, for tests of whole runs."""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

WORDS = ("red", "blue", "circle", "square", "above", "below", "photo")  # of every small tokenizer of the tests


def write_shards(folder: Path, count: int = 24, shards: int = 2, damaged: int = 3) -> str:
    """Write images of 40 x 24 pixels (width, height) with captions as text or JSON; image `damaged` is."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for shard in range(shards):
        files = {}
        for i in range(shard, count, shards):
            file = io.BytesIO()
            color = tuple(int(c) for c in rng.integers(0, 256, 3))
            Image.new("RGB", (40, 24), color).save(file, "PNG")
            caption = f"a {WORDS[i % len(WORDS)]}"
            files[f"{i:05d}.png"] = b"damaged" if i == damaged else file.getvalue()
            if i % 2:
                files[f"{i:05d}.txt"] = caption.encode()
            else:
                files[f"{i:05d}.json"] = json.dumps({"caption": caption}).encode()
        write_tar(folder / f"{shard:02d}.tar", files)
    return str(folder / f"{{00..{shards - 1:02d}}}.tar")


def write_tar(path: Path, files: Mapping[str, bytes]) -> str:
    """Write a shard of these members."""
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)
