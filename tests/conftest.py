"""Every test sees eight host devices, and broadcasting between arrays of different rank is an error."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported; processes that tests start inherit it

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tests compile the same small networks again and again.
jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp(prefix="lcm_jax-tests-"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def pytest_collection_modifyitems(items):
    """The file that takes longest goes first: two processes, each with a file at a time, then end together."""
    items.sort(key=lambda item: item.path.name != "test_training_run.py")
