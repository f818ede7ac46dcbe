"""The environment that all commands share: XLA's flags and the cache of compiled programs."""

import os
import sys
from importlib.metadata import version
from pathlib import Path

CACHE_BYTES = 16 * 2**30  # the programs used longest ago are deleted beyond this; a full-size training step takes 50 MB


def cache_folder() -> Path | None:
    """Return the folder for compiled programs, or None if LCM_JAX_CACHE=0 turns the cache off.

    It lies in XDG_CACHE_HOME, by default ~/.cache. Raises ValueError if LCM_JAX_CACHE is neither 0 nor 1.
    """
    switch = os.environ.get("LCM_JAX_CACHE", "1")
    if switch not in ("0", "1"):
        raise ValueError(f"LCM_JAX_CACHE {switch!r} is not supported; use 0 to turn the compilation cache off, or 1")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "lcm_jax" / "compiled" if switch == "1" else None


def configure_jax() -> None:
    """Set XLA's flags and turn on the persistent compilation cache; call it before any device is used.

    JAX's own variables have precedence: with JAX_COMPILATION_CACHE_DIR set, the cache is left as it is. Raises
    ValueError as `cache_folder` does.
    """
    if version("jaxlib").startswith("0.10."):
        # On a CPU the fused micro-kernels of this version slow training by a fifth; other versions abort on this flag.
        os.environ["XLA_FLAGS"] = f"--xla_cpu_experimental_ynn_fusion_type= {os.environ.get('XLA_FLAGS', '')}"
    folder = cache_folder()
    if folder is None or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    import jax

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"warning: compiled programs are not cached: {error}; set XDG_CACHE_HOME", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
        jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)  # with a limit JAX locks the folder
