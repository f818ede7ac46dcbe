"""The cases of the benchmark, shared by both sides."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

SUITES = ("sample", "decode", "train", "start", "data")
# By compute dtype, the largest difference of the sides' outputs, see `compare.difference`. The bundled model and random
# ones differ by less than 0.001 in float32 on a CPU; GPUs multiply float32 with the 10 bits of TensorFloat-32.
TOLERANCES = {"float32": 0.01, "float16": 0.05, "bfloat16": 0.1}
DTYPES = tuple(TOLERANCES)
RANDOM = {"sd15": ("lcm-dreamshaper", "sd15"), "sdxl": ("lcm-sdxl", "sdxl")}  # full size: families of student, teacher
SHIPPED = {"shapes-lcm": "shapes"}  # student -> teacher
VAES = ("own", "tiny")  # the model's, or a random one of the size of TAESD
OBJECTIVES = {"lcd": "LCD step", "lora": "LCM-LoRA step"}
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
LORA_RANK = 64  # or half the width of the narrowest layers


@dataclass(frozen=True)
class Case:
    """One row of the benchmark for each side.

    suite: one of SUITES, or "peak". model: sd15, sdxl, shapes-lcm, or a diffusers folder. batch: images per call or
    examples per step. steps: sampling steps, otherwise 0. size: side of the image in pixels (0: the model's own), or of
    the matrix. dtype: compute dtype. vae: one of VAES. remat: recompute blocks in the backward pass. part: "matmul" or
    "copy" (peak), "lcd" or "lora" (train), "image", "help" or "import" (start), or one of INPUTS (data).
    """

    suite: str
    model: str
    batch: int
    steps: int
    size: int
    dtype: str
    vae: str = "own"
    part: str = ""
    remat: bool = False

    @property
    def images(self) -> int:
        """Images or examples of a run; 0 if there are none."""
        if self.suite == "data":
            return self.batch * BATCHES
        return self.batch if self.suite in ("sample", "decode", "train") else 0

    @property
    def alone(self) -> bool:
        """True if the peer has no such case."""
        return self.suite == "data" or self.part == "help"

    @property
    def group(self) -> tuple:
        """Cases of one group are run in the same process, which compiles once for any number of steps."""
        return (
            self.suite,
            self.model,
            self.batch,
            self.size * (self.suite != "peak"),
            self.dtype,
            self.vae,
            (self.part if self.suite == "train" else ""),
        )

    @property
    def name(self) -> str:
        size, vae = f", {self.size} x {self.size}" if self.size else "", ", tiny VAE" if self.vae == "tiny" else ""
        if self.suite == "peak":
            return f"matmul {self.size} x {self.size}" if self.part == "matmul" else f"copy of {self.size} MB"
        if self.suite == "sample":
            return f"sample, {count(self.steps, 'step')}, batch {self.batch}{size}{vae}"
        if self.suite == "decode":
            return f"decode, batch {self.batch}{size}{vae}"
        if self.suite == "start":
            first = f"process to first image, {count(self.steps, 'step')}{size}"
            return {"image": first, "help": "--help, slowest command", "import": "import"}[self.part]
        if self.suite == "data":
            return f"{INPUTS[self.part]}, {BATCHES} batches of {self.batch}"
        return f"{OBJECTIVES[self.part]}, batch {self.batch}{size}{', remat' * self.remat}"

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


@dataclass(frozen=True)
class Selection:
    """The cases that a user selects; an empty field selects the defaults. Raises ValueError for unsupported values.

    suites: of SUITES, or "all". model: as in Case. vaes, objectives: names in VAES and OBJECTIVES.
    """

    suites: Sequence[str]
    model: str
    batches: Sequence[int] = ()
    steps: Sequence[int] = ()
    sizes: Sequence[int] = ()
    dtype: str | None = None
    vaes: Sequence[str] = ()
    objectives: Sequence[str] = ()

    def __post_init__(self):
        for flag, values, allowed in (
            ("suite", self.suites or [""], ("all", *SUITES)),
            ("vae", self.vaes, VAES),
            ("objective", self.objectives, tuple(OBJECTIVES)),
            ("dtype", [] if self.dtype is None else [self.dtype], DTYPES),
        ):
            for value in values:
                if value not in allowed:
                    raise ValueError(f"--{flag} {value!r} is not supported; use {', '.join(allowed)}")
        names = (*SHIPPED, *RANDOM)
        if self.model not in names and not (Path(self.model) / "model_index.json").exists():
            raise ValueError(f"--model {self.model!r} is not supported; use {', '.join(names)}, or a model folder")
        for flag, values in (("batch", self.batches), ("steps", self.steps), ("size", self.sizes)):
            if any(value < 1 for value in values):
                raise ValueError(f"--{flag} {min(values)} is not supported; use positive numbers")


def plan(selection: Selection, accelerator: bool) -> list[Case]:
    """Return the cases, preceded by the two peaks that those of networks are compared with.

    accelerator: True if the device is not a CPU.
    """
    model, full = selection.model, selection.model in RANDOM
    batches, steps, vaes = selection.batches, selection.steps, selection.vaes or ("own",)
    suites = SUITES if "all" in selection.suites else tuple(dict.fromkeys(selection.suites))
    dtype = selection.dtype or ("bfloat16" if full and accelerator else "float32")
    sizes = selection.sizes or ({"sd15": 512, "sdxl": 1024}.get(model, 0),)
    cases: list[Case] = []
    if {*suites} & {"sample", "decode", "train"}:
        peak = "bfloat16" if accelerator else "float32"
        cases.append(Case("peak", model, 1, 0, 8192 if accelerator else 2048, peak, part="matmul"))
        cases.append(Case("peak", model, 1, 0, 2048 if accelerator else 256, peak, part="copy"))
    for suite in suites:
        if suite == "sample":
            cases += sample_cases(selection, sizes, dtype, accelerator)
        elif suite == "decode":
            number = (8 if accelerator else 1) if full else 16
            chosen = product(vaes, batches or (number,), sizes)
            cases += [Case("decode", model, b, 0, s, dtype, vae) for vae, b, s in chosen]
        elif suite == "train":
            number = ({"sd15": 64, "sdxl": 8}[model] if accelerator else 1) if full else 16
            parts = selection.objectives or (("lora",) if model == "sdxl" else tuple(OBJECTIVES))
            chosen = product(parts, batches or (number,), sizes)
            cases += [Case("train", model, b, 0, s, dtype, part=part, remat=full) for part, b, s in chosen]
        elif suite == "start":
            cases += [Case("start", model, 1, n, s, dtype, part="image") for s, n in product(sizes, steps or (4,))]
            cases += [Case("start", model, 1, 0, 0, dtype, part=part) for part in ("help", "import")]
        else:
            cases += [Case("data", model, b, 0, 512, dtype, part=name) for b in batches or (64,) for name in INPUTS]
    return cases


def sample_cases(selection: Selection, sizes: Sequence[int], dtype: str, accelerator: bool) -> list[Case]:
    """Return the cases of the suite "sample"; on a CPU without the large batch of a full-size model."""
    full = selection.model in RANDOM
    if selection.batches or selection.steps or selection.vaes:
        chosen = [*product(selection.vaes or ("own",), selection.batches or (1,), selection.steps or (4,))]
    else:
        chosen = [("own", 8 if full else 16, 4)] if accelerator or not full else []
        chosen += [("own", 1, 4), ("own", 1, 1)] + [("tiny", 1, 4)] * full
    return [Case("sample", selection.model, b, n, s, dtype, vae) for s in sizes for vae, b, n in chosen]


def model_folder(case: Case, student: bool, folder: Path) -> str:
    """Return the name or folder of the case's model or its teacher. folder: of the run, with random models."""
    if case.model in RANDOM:
        return str(folder / "models" / ("student" if student else "teacher"))
    return case.model if student else SHIPPED.get(case.model, case.model)


def tiny_vae_folder(folder: Path) -> Path:
    return folder / "models" / "tiny_vae"
