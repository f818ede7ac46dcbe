"""Write a real set to fine-tune on, as a folder of images: 1,797 scans of handwritten digits, from scikit-learn.

    python docs/digits.py runs/digits

The scans of 8 x 8 pixels become PNGs of 64 x 64, blue ink on white, and `metadata.jsonl` has a caption for each. The
ink and its sharp edge are what the bundled autoencoder can represent: it has seen no black, and makes it green. The
script needs scikit-learn (pip install scikit-learn), and no network. The source `folder` holds out the last images by
the digests of their names, which are a random part of every digit:

    python -m lcm_jax.main --config=configs/lcf.py --workdir=runs/lcf_digits --config.data.source=folder \\
        --config.data.folder=runs/digits --config.data.held_out=180 --config.report.reference=180 \\
        --config.metrics="('classifier','frechet')"
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

SIZE, BORDER = 64, 4  # pixels
INK, PAPER = np.array((44, 84, 226)), np.array((255, 255, 255))  # sRGB
# With the numeral, the bundled text encoder, which knows neither, tells the ten captions apart best.
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = tuple(f"a drawing of {name} {i} {i} {i}" for i, name in enumerate(NAMES))


def upscale(scan: np.ndarray) -> Image.Image:
    """scan: float[8, 8], ink in [0, 16]. Return an RGB image of SIZE x SIZE."""
    side = SIZE - 2 * BORDER
    smooth = Image.fromarray((scan / 16).astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
    ink = np.pad(np.clip(4 * (np.asarray(smooth) - 0.45) + 0.5, 0, 1), BORDER)[..., None]
    return Image.fromarray(np.round(PAPER + ink * (INK - PAPER)).astype(np.uint8))


def write(folder: Path) -> int:
    """Write the images and their captions to a new folder. Return their number."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    folder.mkdir(parents=True)
    rows = []
    for number, (scan, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        name = f"{number:04d}.png"
        upscale(scan).save(folder / name, compress_level=1)
        rows.append({"file_name": name, "text": CAPTIONS[digit]})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
    return len(rows)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/digits.py FOLDER")
    try:
        print(f"{write(Path(sys.argv[1]))} images in {sys.argv[1]}")
    except ImportError:
        sys.exit("scikit-learn is not installed; install it (pip install scikit-learn)")
    except FileExistsError:
        sys.exit(f"{sys.argv[1]} exists already; use another folder")
