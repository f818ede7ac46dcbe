"""What all commands share: XLA's flags and the cache of compiled programs, exit codes, and lines that people read."""

import os
import signal
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

from absl import flags, logging

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


def check_platform() -> None:
    """Raise ValueError if the environment asks JAX for a platform that this machine or installation lacks."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX 0.10 asserts where the platform's plugin is not installed
        if not (asked := jax.config.jax_platforms):
            raise
        jax.config.update("jax_platforms", None)
        there = ", ".join(sorted({device.platform for device in jax.devices()}))
        raise ValueError(f"JAX_PLATFORMS is {asked!r}, but JAX finds only {there}; unset JAX_PLATFORMS") from error


def run(
    work: Callable[[], None], values: flags.FlagValues, describe: Callable[[], str], out_of_memory: str,
    verbosity: int = logging.WARNING,
) -> None:  # fmt: skip
    """Parse sys.argv into `values`, call `work`, and exit: 0 if done, 1 after an error, 130 after Ctrl-C.

    describe: returns the text of --help. out_of_memory: what to lower when the device's memory is full. verbosity: of
    libraries, which speak at INFO. An option that does not exist is an error that names the nearest one. Errors that
    are not a person's to mend keep their traceback.
    """
    if any(option in sys.argv for option in ("--help", "-help", "-h")):
        say(describe())
        return
    logging.use_absl_handler()
    logging.set_verbosity(verbosity)
    flags.FLAGS(sys.argv[:1])  # libraries have flags of their own there, at their defaults
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}", sys.stderr)
        try:
            rest = values(sys.argv)
            if len(rest) > 1:
                raise ValueError(f"unexpected argument {rest[1]!r}; options are written --name=value")
            work()
        except (flags.Error, ValueError, OSError) as error:  # ModelError is a ValueError
            sys.exit(f"error: {error}")
        except KeyboardInterrupt as error:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # pressed again, it would cut short what is removed at exit
            say(": ".join(["interrupted", *map(str, error.args)]), sys.stderr)
            sys.exit(130)
        except RuntimeError as error:  # jax.errors.JaxRuntimeError among others; jax may not be imported
            if not any(sign in str(error) for sign in ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory")):
                raise
            sys.exit(f"error: the device is out of memory; {out_of_memory}\n{str(error).splitlines()[0][:200]}")


def say(line: str, stream: TextIO | None = None) -> None:
    """Print a line at once, by default to stdout. If nobody reads it any more (`| head -1`), the work goes on."""
    stream = stream or sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        print(line.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except OSError:  # a broken pipe, or the terminal is gone
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
