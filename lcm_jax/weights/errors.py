"""The errors of everything that reads or writes models. Alone in their file, so that no reader of a file loads jax."""

import errno
import os

FULL = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


class ModelError(ValueError):
    """A model that cannot be read or written; the text names what, which value, and what to do."""


def write_error(target: object, error: Exception) -> ModelError:
    """The error for a target that could not be written. Space helps where the system says that there is none."""
    said = f"{error} {error.__cause__}"  # orbax's errors are cut to a line
    remedy = "Free some space" if any(reason in said for reason in FULL) else "Choose another place"
    return ModelError(f"writing {target} failed ({error}); what was there is untouched. {remedy}")


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + "s" * (count != 1)


def overflowing(keys: list[str], dtype: str, remedy: str) -> ModelError:
    """The error for tensors of which a finite number overflows in `dtype`."""
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    verb = "overflows" if len(keys) == 1 else "overflow"
    return ModelError(f"{plural(len(keys), 'tensor')} {verb} in {dtype}: {', '.join(keys[:5])}{more}; {remedy}")
