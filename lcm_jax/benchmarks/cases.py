"""The cases of the benchmark, as data that both sides read."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

SUITES = ("sample", "train")
DTYPES = ("float32", "bfloat16", "float16")
RANDOM = ("sd15",)  # full size with random weights, made where the case runs
SHIPPED = {"shapes-lcm": "shapes"}  # a student, and the teacher that training distills
PROMPT = "a photo of a red circle above a blue square"
# The settings of a training step that change its work. Latents are encoded beforehand.
DDIM_STEPS, HUBER_C, EMA_RATE, LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM, W = 50, 1e-3, 0.95, 1e-6, 1e-2, 1.0, (5.0, 15.0)


@dataclass(frozen=True)
class Case:
    """One row of the benchmark.

    suite: "matmul", "sample" or "train". model: "sd15", "shapes-lcm", or a diffusers folder. batch: images per call
    or examples per step. steps: of the sampler, 0 elsewhere. size: of an image's side in pixels, and of the matrix's
    in the suite "matmul". dtype: of the computation. remat: blocks are recomputed in the backward pass.
    """

    suite: str
    model: str
    batch: int
    steps: int
    size: int
    dtype: str
    remat: bool = False

    @property
    def name(self) -> str:
        if self.suite == "matmul":
            return f"matmul {self.size} x {self.size}"
        if self.suite == "sample":
            return f"sample, {self.steps} step{'s' * (self.steps > 1)}, batch {self.batch}"
        return f"LCD step, batch {self.batch}{', remat' * self.remat}"

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def check(suites: Sequence[str], model: str, batches: Sequence[int], steps: Sequence[int], dtype: str | None) -> None:
    """Raise ValueError for what is not supported; the arguments are those of `plan`."""
    for suite in suites:
        if suite not in SUITES:
            raise ValueError(f"--suite {suite!r} is not supported; use {', '.join(SUITES)}")
    if model not in (*RANDOM, *SHIPPED) and not (Path(model) / "model_index.json").exists():
        raise ValueError(f"--model {model!r} is not supported; use {', '.join((*RANDOM, *SHIPPED))}, or a model folder")
    if any(value < 1 for value in (*batches, *steps)):
        raise ValueError("--batch and --steps must be 1 or more")
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
    """Return the cases of these suites, after the matrix product that they are compared with.

    batches, steps, dtype: empty or None for the model's own. accelerator: the device is not a CPU.
    """
    full = model in RANDOM
    dtype = dtype or ("bfloat16" if full and accelerator else "float32")
    size = 512 if full else 0  # 0: the model's own
    cases = [Case("matmul", model, 1, 0, 8192 if accelerator else 2048, dtype)]
    for suite in suites:
        if suite == "train":
            for batch in batches or ((16, 32) if full else (16,)):
                cases.append(Case("train", model, batch, 0, size, dtype, remat=full))
        elif batches or steps:
            cases += [Case("sample", model, b, n, size, dtype) for b in batches or (1,) for n in steps or (4,)]
        else:
            cases += [Case("sample", model, b, n, size, dtype) for b, n in ((8, 4), (1, 4), (1, 1))]
    return cases
