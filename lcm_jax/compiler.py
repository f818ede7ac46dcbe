"""Compilation: XLA's options for this device and version, and the cache of compiled programs on disk."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

# Beyond this the least recently used programs are deleted; a full-size training step takes 50 MB.
CACHE_BYTES = 16 * 2**30
MIN_COMPILE_S = 0.1  # programs that compile faster are not kept; JAX's own default is 1 s


def compiler_options(platform: str | None = None) -> dict[str, str | bool]:
    """Return the `compiler_options` of jax.jit for a program with large convolutions or matrix products.

    platform: "cpu", "gpu" or "tpu", by default the one of this process. On a CPU jaxlib 0.10 replaces convolutions by
    micro-kernels that take up to half as long again; other versions do not have this option, and fail on it.
    """
    import jax

    old = version("jaxlib").startswith("0.10.") and (platform or jax.default_backend()) == "cpu"
    return {"xla_cpu_experimental_ynn_fusion_type": ""} if old else {}


def cache_folder() -> Path | None:
    """Return the folder for compiled programs, or None if LCM_JAX_CACHE=0 turns the cache off.

    It is in XDG_CACHE_HOME, by default ~/.cache. Raises ValueError if LCM_JAX_CACHE is neither 0 nor 1.
    """
    switch = os.environ.get("LCM_JAX_CACHE", "1")
    if switch not in ("0", "1"):
        raise ValueError(f"LCM_JAX_CACHE {switch!r} is not supported; use 0 to turn the compilation cache off, or 1")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "lcm_jax" / "compiled" if switch == "1" else None


def enable_cache() -> None:
    """Keep the programs that this process compiles in the user's cache folder, unless JAX has another folder for them.

    JAX's settings take precedence, by its variables or by jax.config. A folder that cannot be made is a warning.
    Raises ValueError as `cache_folder` does.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    folder, own = cache_folder(), jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if folder is None or own is not None or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"warning: compiled programs are not cached ({error}); set XDG_CACHE_HOME", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    for name, value in (
        ("jax_compilation_cache_max_size", CACHE_BYTES),  # JAX locks the folder if there is a limit
        ("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_S),
    ):
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX decides at the first compilation, which may have been before


@dataclass
class CacheUse:
    """Programs that were compiled or loaded, those that were loaded from the cache, and the seconds that this saved."""

    programs: int = 0
    loaded: int = 0
    saved_s: float = 0.0

    def __str__(self) -> str:
        one = "program" if self.programs == 1 else "programs"
        return f"loaded {self.loaded} of {self.programs} {one} from the cache, which saved {self.saved_s:.0f} s"


@contextmanager
def watch_cache() -> Iterator[CacheUse]:
    """Count the programs of the process while the context is open, with the cache turned on."""
    import jax.monitoring

    use = CacheUse()

    def count(event: str, **_) -> None:
        use.programs += event == "/jax/compilation_cache/compile_requests_use_cache"
        use.loaded += event == "/jax/compilation_cache/cache_hits"

    def add_saved(event: str, duration_secs: float, **_) -> None:
        if event == "/jax/compilation_cache/compile_time_saved_sec":  # below 0 for programs that compile fast
            use.saved_s += max(duration_secs, 0.0)

    jax.monitoring.register_event_listener(count)
    jax.monitoring.register_event_duration_secs_listener(add_saved)
    try:
        yield use
    finally:
        jax.monitoring.unregister_event_listener(count)
        jax.monitoring.unregister_event_duration_listener(add_saved)
