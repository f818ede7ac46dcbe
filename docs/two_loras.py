"""Draw a grid of 2 x 2: the bundled teacher in 4 steps, with and without a style LoRA and the LCM-LoRA.

    python docs/two_loras.py runs/style grid.png

The first argument is the workdir of a run of configs/shapes_style_lora.py, or any LoRA of the bundled teacher.
"""

import sys
from pathlib import Path

import numpy as np

from lcm_jax import Pipeline
from lcm_jax.data.shapes import evaluation_prompts
from lcm_jax.sampling.preview import save_grid

STYLE, LCM = 0.8, 1.0  # weights, as the LCM-LoRA report (arXiv 2311.05556) combines them


def main(style: str, path: str) -> None:
    pipe = Pipeline.from_pretrained("shapes")
    pipe.load_lora(style, weight=0, name="style")
    pipe.load_lora("shapes-lcm-lora", weight=0, name="lcm")
    prompts, rows = evaluation_prompts("test", 12), {}
    for style_weight in (0.0, STYLE):
        for lcm_weight in (0.0, LCM):
            pipe.set_lora_weight("style", style_weight)
            pipe.set_lora_weight("lcm", lcm_weight)
            sampler, scale = ("lcm", 1.0) if lcm_weight else ("ddim", 8.0)
            images = pipe(prompts, 4, scale, sampler=sampler, output_type="np").images
            label = " + ".join(["style"] * bool(style_weight) + ["LCM"] * bool(lcm_weight)) or "base"
            rows[label] = np.round(images * 255).astype(np.uint8)
    save_grid(list(rows.values()), Path(path), list(rows))
    print(f"wrote {path}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {__doc__}")
    main(*sys.argv[1:])
