"""Every test sees eight host devices, and broadcasting between arrays of different rank is an error."""

import os
import shutil
import tempfile
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported; processes that tests start inherit it
# Tests compile the same small networks again and again. Each process of pytest-xdist inherits the folder of the first;
# a limit of its size is what makes jax lock it.
MADE = None if "JAX_COMPILATION_CACHE_DIR" in os.environ else tempfile.mkdtemp(prefix="lcm_jax-tests-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", MADE or "")
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**32))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Most time goes into compiling what runs for a moment: the older emitters of XLA in jaxlib 0.10, without the passes
# that are left out below, take half the processor time. Later versions do not have these flags, and abort on them.
QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
if version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')}"

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# The commands that tests start as processes are optimised.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """`-m gpu` tests one accelerator from one process, with the optimizations that users have."""
    if config.option.markexpr == "gpu":
        config.option.numprocesses = 0
        jax.config.update("jax_platforms", None)
        jax.config.update("jax_disable_most_optimizations", False)


def pytest_unconfigure():
    if MADE is not None:
        shutil.rmtree(MADE, ignore_errors=True)  # a process that a test has killed may still be writing to it


LONG = (
    "docs",
    "notebooks",
    "page_load",
    "page",
    "lcd_config",
    "lora_run",
    "lcf_run",
    "training_run",
    "benchmark",
    "killed_runs",
    "convert",
    "family_pipelines",
    "inpainting",
    "dry_run",
    "sharding",
    "latent_cache",
)


def pytest_collection_modifyitems(items):
    """The files that take longest go first: two processes, each with a file at a time, then end together."""
    order = {f"test_{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    for item in items:
        if item.path.name in order:
            item.add_marker(pytest.mark.long)
