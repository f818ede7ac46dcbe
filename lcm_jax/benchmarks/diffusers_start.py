"""Generate one image with diffusers and write it, as the peer of `python -m lcm_jax.sample` in the suite "start".

python -m lcm_jax.benchmarks.diffusers_start FOLDER PROMPT STEPS SIZE DTYPE OUTPUT
"""

# diffusers declares its classes by lazy imports, and both libraries are optional.
# pyright: reportPrivateImportUsage=false, reportMissingImports=false

import sys
from typing import Any

import torch
from diffusers import DiffusionPipeline

if __name__ == "__main__":
    model, prompt, steps, size, dtype, output = sys.argv[1:]
    pipe: Any = DiffusionPipeline.from_pretrained(model, torch_dtype=getattr(torch, dtype), safety_checker=None)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    side = {"height": int(size), "width": int(size)} if int(size) else {}
    pipe(prompt, num_inference_steps=int(steps), **side).images[0].save(output)
