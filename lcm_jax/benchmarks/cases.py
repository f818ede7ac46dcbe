"""The cases of the benchmark, shared by both sides."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

SUITES = ("sample", "train", "data")
DTYPES = ("float32", "bfloat16", "float16")
RANDOM = ("sd15",)  # full size with random weights
SHIPPED = {"shapes-lcm": "shapes"}  # student -> teacher
PROMPT = "a photo of a red circle above a blue square"
IMAGES_PER_S = 164  # of an accelerator that the input pipeline is to keep busy: an H100 at batch 64, by its FLOPs
BATCHES = 8  # that a run of the suite data reads, since some are read ahead
INPUTS = {  # of the suite data: what is read
    "prompts": "latent cache with encoded prompts",
    "tokens": "latent cache with tokens",
    "images": "JPEGs in tar shards, decoded to 512 x 512",
}
# Settings of the training step that affect its work. Latents are encoded beforehand.
DDIM_STEPS, HUBER_C, EMA_RATE, LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM, W = 50, 1e-3, 0.95, 1e-6, 1e-2, 1.0, (5.0, 15.0)


@dataclass(frozen=True)
class Case:
    """One row of the benchmark.

    suite: "matmul", "sample", "train" or "data". model: "sd15", "shapes-lcm", or a diffusers folder. batch: images per
    call or examples per step. steps: sampling steps, otherwise 0. size: side of the image in pixels (0: the model's
    own), or of the matrix. dtype: compute dtype. remat: recompute blocks in the backward pass. input: one of INPUTS,
    for "data".
    """

    suite: str
    model: str
    batch: int
    steps: int
    size: int
    dtype: str
    remat: bool = False
    input: str = ""

    @property
    def images(self) -> int:
        """Images or examples of a run."""
        return self.batch * (BATCHES if self.suite == "data" else 1)

    @property
    def name(self) -> str:
        if self.suite == "matmul":
            return f"matmul {self.size} x {self.size}"
        if self.suite == "sample":
            return f"sample, {self.steps} step{'s' * (self.steps > 1)}, batch {self.batch}"
        if self.suite == "data":
            return f"{INPUTS[self.input]}, {BATCHES} batches of {self.batch}"
        return f"LCD step, batch {self.batch}{', remat' * self.remat}"

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def check(suites: Sequence[str], model: str, batches: Sequence[int], steps: Sequence[int], dtype: str | None) -> None:
    """Raise ValueError for an argument of `plan` that is not supported."""
    for suite in suites:
        if suite not in SUITES:
            raise ValueError(f"--suite {suite!r} is not supported; use {', '.join(SUITES)}")
    if model not in (*RANDOM, *SHIPPED) and not (Path(model) / "model_index.json").exists():
        raise ValueError(f"--model {model!r} is not supported; use {', '.join((*RANDOM, *SHIPPED))}, or a model folder")
    if any(value < 1 for value in (*batches, *steps)):
        raise ValueError("--batch and --steps below 1 are not supported; use positive numbers")
    if dtype not in (None, *DTYPES):
        raise ValueError(f"--dtype {dtype!r} is not supported; use {', '.join(DTYPES)}")


def plan(
    suites: Sequence[str],
    model: str,
    batches: Sequence[int],
    steps: Sequence[int],
    dtype: str | None,
    accelerator: bool,
) -> list[Case]:
    """Return the cases of `suites`, preceded by the matrix product that those of networks are compared with.

    batches, steps, dtype: empty or None for the defaults. accelerator: True if the device is not a CPU.
    """
    full = model in RANDOM
    dtype = dtype or ("bfloat16" if full and accelerator else "float32")
    size = 512 if full else 0  # 0: the model's own
    cases = [Case("matmul", model, 1, 0, 8192 if accelerator else 2048, dtype)] if {*suites} - {"data"} else []
    for suite in suites:
        if suite == "data":
            cases += [Case("data", model, b, 0, 512, dtype, input=name) for b in batches or (64,) for name in INPUTS]
        elif suite == "train":
            for batch in batches or ((16, 32) if full else (16,)):
                cases.append(Case("train", model, batch, 0, size, dtype, remat=full))
        elif batches or steps:
            cases += [Case("sample", model, b, n, size, dtype) for b in batches or (1,) for n in steps or (4,)]
        else:
            cases += [Case("sample", model, b, n, size, dtype) for b, n in ((8, 4), (1, 4), (1, 1))]
    return cases
