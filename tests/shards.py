"""Small tar shards of captioned images, for tests of whole runs."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

WORDS = ("red", "blue", "circle", "square", "above", "below", "photo")  # of every small tokenizer of the tests


def write_shards(folder: Path, count: int = 24, shards: int = 2) -> str:
    """Write images of 40 x 24 pixels (width, height) with captions as text or JSON; image 3 is damaged."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:02d}.tar", "w") as archive:
            for i in range(shard, count, shards):
                file = io.BytesIO()
                color = tuple(int(c) for c in rng.integers(0, 256, 3))
                Image.new("RGB", (40, 24), color).save(file, "PNG")
                caption = f"a {WORDS[i % len(WORDS)]}"
                text = {"txt": caption.encode()} if i % 2 else {"json": json.dumps({"caption": caption}).encode()}
                image = b"damaged" if i == 3 else file.getvalue()
                for ending, data in ({"png": image} | text).items():
                    info = tarfile.TarInfo(f"{i:05d}.{ending}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return str(folder / f"{{00..{shards - 1:02d}}}.tar")
