"""The input pipeline of training, from files that are written for it: a latent cache, or tar shards of JPEGs."""

import io
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from PIL import Image

from lcm_jax import config_files
from lcm_jax.benchmarks import cases
from lcm_jax.benchmarks.cases import Case
from lcm_jax.data import tokenizer as tokenizers
from lcm_jax.data.batches import image_batches, make_batches
from lcm_jax.data.captioned import Records
from lcm_jax.data.encoding import Plan, write_cache
from lcm_jax.data.latents import Tokenize, open_cache
from lcm_jax.data.sources import load_dataset

RECORDS, DISTINCT = 512, 64  # in the files, and how many of them have their own values
MOMENTS, CONTEXT = (64, 64, 8), (77, 768)  # of Stable Diffusion 1.5 at 512 x 512
JPEG = (768, 576)  # width, height; quality 90


def prepare_data(case: Case) -> tuple[Callable[[], Any], dict[str, int], Callable[[], dict[str, float]]]:
    """Return (a function that reads the next batches, facts, and a function of what the reading has taken since).

    The latter has "cpu_ms", the processor time of an image, and "cores", the number of cores that keep an accelerator
    of `cases.IMAGES_PER_S` fed.
    """
    config = config_files.load("lcd:sd15")
    config.train.batch_size = case.batch
    folder = Path(tempfile.mkdtemp())  # in the folder that the command deletes
    tokenizers.build(cases.PROMPT.split(), folder / "tokenizer", model_max_length=CONTEXT[0])
    tokenizer = tokenizers.load(folder / "tokenizer")
    tokenize = lambda captions: tokenizers.encode(tokenizer, captions)  # noqa: E731
    if case.part == "images":
        config.data.encode, config.data.shards, config.data.held_out = "step", write_jpegs(folder), 64
        config.report.reference = config.report.prompts = 64
        dataset = load_dataset(config, folder, log=lambda line: None)
        batches = image_batches(config, dataset, tokenize, 0)
    else:
        config.data.encode = "cache"
        batches = make_batches(config, write_random(folder / "cache", tokenize, case.part == "prompts"), 0)
    began, images = 0.0, 0

    def run() -> None:
        nonlocal began, images
        for _ in range(cases.BATCHES):
            next(batches)
        if not began:  # the first run is not counted
            began = time.process_time()
        else:
            images += case.images

    def taken() -> dict[str, float]:
        seconds = (time.process_time() - began) / images
        return {"cpu_ms": round(1e3 * seconds, 3), "cores": round(cases.IMAGES_PER_S * seconds, 2)}

    size = sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in (".array_record", ".tar"))
    return run, {"bytes_per_image": size // RECORDS}, taken


def write_random(folder: Path, tokenize: Tokenize, prompts: bool) -> Records:
    """Write a latent cache of random values in the shapes of Stable Diffusion 1.5. Return its records."""
    rng, shapes = np.random.default_rng(0), {"moments": MOMENTS} | ({"context": CONTEXT} if prompts else {})
    pool = {name: rng.standard_normal((DISTINCT, *shape)).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()}
    records = [{"image": np.zeros((512, 512, 3), np.uint8), "caption": cases.PROMPT}] * RECORDS
    encode = lambda images, token_ids: {name: each[: len(images)] for name, each in pool.items()}  # noqa: E731
    write_cache(folder, Plan(records, lambda: encode, tokenize, {"values": "random"}), log=lambda line: None)
    return open_cache(folder, {"values": "random"})


def write_jpegs(folder: Path) -> str:
    """Write tar shards of JPEGs with captions. Return their pattern."""
    rng, files = np.random.default_rng(0), []
    for _ in range(DISTINCT):
        coarse = Image.fromarray(rng.integers(0, 256, (18, 24, 3), np.uint8)).resize(JPEG, Image.Resampling.BICUBIC)
        noise = rng.normal(0, 6, (JPEG[1], JPEG[0], 3))  # about as many bytes as a photograph has
        file = io.BytesIO()
        Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    with tarfile.open(folder / "00000.tar", "w") as archive:
        for i in range(RECORDS):
            for ending, data in (("jpg", files[i % DISTINCT]), ("txt", cases.PROMPT.encode())):
                info = tarfile.TarInfo(f"{i:05d}.{ending}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return str(folder / "00000.tar")
