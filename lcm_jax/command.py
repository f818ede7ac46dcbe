"""The shared part of all commands: XLA flags, the compilation cache, one-line errors and exit codes."""

import os
import signal
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from absl import flags, logging

from lcm_jax.errors import Interrupted, RunError, memory_shortage
from lcm_jax.output import outliving

# Beyond this the least recently used programs are deleted; a full-size training step takes 50 MB.
CACHE_BYTES = 16 * 2**30


def cache_folder() -> Path | None:
    """Return the folder for compiled programs, or None if LCM_JAX_CACHE=0 turns the cache off.

    It is in XDG_CACHE_HOME, by default ~/.cache. Raises ValueError if LCM_JAX_CACHE is neither 0 nor 1.
    """
    switch = os.environ.get("LCM_JAX_CACHE", "1")
    if switch not in ("0", "1"):
        raise ValueError(f"LCM_JAX_CACHE {switch!r} is not supported; use 0 to turn the compilation cache off, or 1")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "lcm_jax" / "compiled" if switch == "1" else None


def configure_jax() -> None:
    """Set XLA's flags and turn on the persistent compilation cache. Call it before any device is used.

    JAX's own variables take precedence: if JAX_COMPILATION_CACHE_DIR is set, the cache is not changed. Raises
    ValueError as `cache_folder` does.
    """
    if version("jaxlib").startswith("0.10."):
        # On a CPU the fused micro-kernels of this version slow training by 20%; other versions abort on this flag.
        os.environ["XLA_FLAGS"] = f"--xla_cpu_experimental_ynn_fusion_type= {os.environ.get('XLA_FLAGS', '')}"
    folder = cache_folder()
    if folder is None or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    import jax

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"warning: compiled programs are not cached ({error}); set XDG_CACHE_HOME", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
        jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)  # JAX locks the folder if there is a limit


def run(
    work: Callable[[], None],
    parse: Callable[[list[str]], list[str]],
    describe: Callable[[], str],
    out_of_memory: str,
    must_be_seen: bool = False,
) -> None:
    """Parse sys.argv, call `work`, and exit: 0 if done, 1 after an error, 130 after Ctrl-C.

    parse: reads the flags and returns the remaining arguments, as absl's FlagValues does. describe: returns the text of
    --help. out_of_memory: the remedy for a memory shortage. must_be_seen: print to standard error if standard output is
    a closed pipe (`| head -1`), which does not end the work. An unknown option is an error that suggests the nearest
    one. Errors that the user cannot fix keep their traceback.
    """
    with outliving(stderr_instead=must_be_seen):
        if any(option in sys.argv for option in ("--help", "-help", "-h")):
            print(describe())
            return
        logging.use_absl_handler()
        logging.set_verbosity(logging.ERROR)  # libraries log at INFO, and orbax warns that it opens runs read-only
        flags.FLAGS(sys.argv[:1])  # flags of libraries, at their defaults
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
            try:
                rest = parse(sys.argv)
                if len(rest) > 1:
                    raise ValueError(f"unexpected argument {rest[1]!r}; options are written --name=value")
                work()
            except (flags.Error, ValueError, OSError, RunError) as error:  # ModelError is a ValueError
                sys.exit(f"error: {error}")
            except KeyboardInterrupt as error:
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would interrupt the cleanup at exit
                parts = error.args if isinstance(error, Interrupted) else ["interrupted", *error.args]
                print(": ".join(map(str, parts)), file=sys.stderr)
                sys.exit(130)
            except (RuntimeError, MemoryError) as error:  # jax.errors.JaxRuntimeError among others
                if (shortage := memory_shortage(error)) is None:
                    raise
                sys.exit(f"error: out of memory ({shortage}); {out_of_memory}")
