"""Run an exported image generator: python run.py --prompt="a red circle" --output=image.png

This file lies beside the program and needs jax, numpy, safetensors, pillow and tokenizers, nothing else. `load(folder)`
returns the same as a function: generate(prompts) -> uint8[N, H, W, 3].
"""

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path

import jax
import jax.export
import numpy as np
from PIL import Image
from safetensors import safe_open
from tokenizers import Tokenizer


def read_tensors(path):
    """Return the arrays of a file by name, on the device."""
    with safe_open(path, "flax") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def load(folder):
    """Return generate(prompts, negative_prompts=None, seed=0, guidance_scale=None) -> uint8[N, H, W, 3].

    N prompts, at most the batch size of the export; image i depends on the seed, its prompt and i alone.
    """
    folder = Path(folder)
    about = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    # The option with which the images were equal, bit by bit, when the program was exported; others do not have it.
    old = version("jaxlib").startswith("0.10.") and jax.default_backend() == "cpu"
    options = {"xla_cpu_experimental_ynn_fusion_type": ""} if old else {}
    noise, images = (
        jax.jit(
            jax.export.deserialize(bytearray((folder / f"{name}.stablehlo").read_bytes())).call,
            compiler_options=options,
        )
        for name in ("noise", "images")
    )
    params, table = (read_tensors(folder / f"{name}.safetensors") for name in ("parameters", "table"))
    tokenizers = [(Tokenizer.from_file(str(folder / each["file"])), each) for each in about["tokenizers"]]
    for tokenizer, _ in tokenizers:
        tokenizer.no_padding()
        tokenizer.no_truncation()

    def tokenize(prompts):
        rows = []
        for prompt in prompts:
            row = []
            for tokenizer, each in tokenizers:
                ids = tokenizer.encode(prompt).ids
                if len(ids) > each["length"]:
                    limit = f"use at most {each['length']}, begin and end included"
                    raise ValueError(f"prompt {prompt[:40]!r} has {len(ids)} tokens; {limit}")
                row.append([*ids, *[each["pad"]] * (each["length"] - len(ids))])
            rows.append(row if len(row) > 1 else row[0])
        return np.array(rows, np.int32)

    def generate(prompts, negative_prompts=None, seed=0, guidance_scale=None):
        count, batch = len(prompts), about["batch_size"]
        if not 0 < count <= batch:
            raise ValueError(f"there are {count} prompts; use 1 to {batch}, the batch size of this export")
        if negative_prompts is not None and not about["negative_prompt"]:
            raise ValueError("this export takes no negative prompts; export a model that is guided by two passes")
        if negative_prompts is not None and len(negative_prompts) != count:
            raise ValueError(
                f"there are {len(negative_prompts)} negative prompts for {count} prompts; use one for each"
            )
        filled = [*prompts, *[prompts[-1]] * (batch - count)]
        negatives = list(negative_prompts or [""] * count)
        negatives += [negatives[-1]] * (batch - count)
        scale = about["guidance_scale"] if guidance_scale is None else guidance_scale
        latents, keys = noise(np.int32(seed), np.minimum(np.arange(batch), count - 1).astype(np.uint32))
        made, finite = images(params, table, tokenize(filled), tokenize(negatives), latents, keys, np.float32(scale))
        if not all(map(bool, finite)):
            raise FloatingPointError("the images have NaN or infinity; export the model with dtype float32")
        return np.asarray(made)[:count]

    generate.about = about
    return generate


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", action="append", required=True, help="repeat it, up to the batch size")
    parser.add_argument("--negative_prompt", help="what to guide away from, if the model takes it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance_scale", type=float, help="by default the one of the export")
    parser.add_argument(
        "--output", type=Path, default=Path("image.png"), help="a PNG; with more prompts, image-1.png ..."
    )
    flags = parser.parse_args()
    names = [
        flags.output.with_stem(f"{flags.output.stem}-{i}" if i else flags.output.stem) for i in range(len(flags.prompt))
    ]
    if existing := [name for name in names if name.exists()]:
        sys.exit(f"{existing[0]} exists already; use another --output")
    negatives = None if flags.negative_prompt is None else [flags.negative_prompt] * len(flags.prompt)
    try:
        made = load(Path(__file__).resolve().parent)(flags.prompt, negatives, flags.seed, flags.guidance_scale)
    except ValueError as error:
        sys.exit(str(error))
    for name, image in zip(names, made, strict=True):
        Image.fromarray(image).save(name)
        print(name)


if __name__ == "__main__":
    main()
