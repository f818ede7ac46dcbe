"""The convert command on SDXL at full size with random weights: bits, seconds and peak memory, which it prints."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import reference_families
from flax.traverse_util import flatten_dict

from lcm_jax.data import tokenizer as tokenizers
from lcm_jax.models.families import FAMILIES
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.weights import diffusers_folder as folders
from lcm_jax.weights import layout, naming, stored

ROOT = Path(__file__).resolve().parent.parent
GB = 2**30


def write_sdxl(folder: Path) -> Path:
    """A folder of float16, each tensor of which is made when it is written."""
    configs = FAMILIES["sdxl"]
    model = StableDiffusion.from_configs(configs)
    for name, abstract in model.abstract_params().items():
        outline = {
            naming.to_key(path): stored.placeholder("float16", tuple(naming.tensor_shape(path, leaf.shape)))
            for path, leaf in flatten_dict(abstract).items()
        }

        def random(key, outline=outline):
            rng = np.random.default_rng(len(key) + outline[key].size)
            return rng.standard_normal(outline[key].shape, np.float32).astype(np.float16)

        folders.write_tensors(folder, name, configs[name], stored.Tensors(outline, random))
    for name in ("tokenizer", "tokenizer_2"):
        tokenizers.build(reference_families.WORDS, folder.parent / "words" / name, model_max_length=77)
    folders.write_surroundings(
        folder,
        configs,
        folder.parent / "words" / "tokenizer",
        configs["scheduler"],
        configs.get("model_index"),
        xl=True,
    )
    return folder


# A process begins with the peak of the one that starts it: between this one and the command stands a small one.
MEASURED = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=sys.stderr)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(done.returncode)
"""


def convert(source: Path, target: Path, name: str, *more: str) -> tuple[float, float]:
    """(GB of memory at its peak, seconds) of the command."""
    command = [sys.executable, "-m", "lcm_jax.convert", f"--input={source}", f"--output={target}", f"--format={name}"]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *command, *more],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0
    return int(done.stdout) * 1024 / GB, time.monotonic() - began


@pytest.mark.slow
def test_memory_stays_below_the_size_of_the_model(tmp_path, capfd):
    source = write_sdxl(tmp_path / "sdxl")
    tensors = {name: folders.open_component(source, name)[1] for name in layout.networks_of(layout.read_index(source))}
    size = sum(map(stored.total_bytes, tensors.values())) / GB
    digests = {name: stored.digest(each) for name, each in tensors.items()}
    file, orbax, again = tmp_path / "sdxl.safetensors", tmp_path / "orbax", tmp_path / "again"
    for start, target, name, more in [
        (source, file, "ldm", []),
        (file, orbax, "orbax", []),
        (orbax, again, "diffusers", [f"--base={source}"]),
    ]:
        peak, seconds = convert(start, target, name, *more)
        with capfd.disabled():
            print(f"\nSDXL, float16, {size:.2f} GB, to {name}: {peak:.2f} GB at its peak, {seconds:.0f} s")
        assert peak < (size if orbax in (start, target) else 1)  # of orbax's, one component is held at a time
    found = {name: stored.digest(folders.open_component(again, name)[1]) for name in tensors}
    assert found == digests
