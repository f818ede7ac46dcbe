"""Draw docs/samples.png: held-out captions by the bundled teacher and by its student.

    python docs/samples.py docs/samples.png

Guidance scales and samplers are those of the models' presets; the seed is 0.
"""

import sys
from pathlib import Path

import numpy as np

from lcm_jax import Pipeline
from lcm_jax.data.shapes import evaluation_prompts
from lcm_jax.sampling.preview import save_grid

STEPS = {"shapes": ("teacher", (50,)), "shapes-lcm": ("student", (1, 2, 4, 8))}


def main(path: str) -> None:
    rows = {}
    for name, (label, numbers) in STEPS.items():
        pipe = Pipeline.from_pretrained(name)
        for n in numbers:
            images = pipe(evaluation_prompts("test", 12), n).images
            rows[f"{label}, {n} step{'s' * (n > 1)}"] = np.stack([np.asarray(image) for image in images])
    save_grid(list(rows.values()), Path(path), list(rows))
    print(f"wrote {path}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {__doc__}")
    main(sys.argv[1])
