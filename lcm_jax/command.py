"""The shared part of all commands: the compilation cache, one-line errors and exit codes."""

import signal
import sys
import warnings
from collections.abc import Callable

from absl import flags, logging

from lcm_jax.compiler import enable_cache
from lcm_jax.errors import Interrupted, RunError, memory_shortage
from lcm_jax.output import outliving


def configure_jax() -> None:
    """Turn on the compilation cache. Call it before any device is used. Raises ValueError as `enable_cache` does."""
    enable_cache()


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
