"""The errors of everything that reads or writes models. Alone in their file, so that no reader of a file loads jax."""

from lcm_jax.errors import disk_is_full


class ModelError(ValueError):
    """A model that cannot be read or written; the text names the problem, the value and the remedy."""


def write_error(target: object, error: Exception) -> ModelError:
    """Return the error for a target that could not be written."""
    remedy = "Free some space" if disk_is_full(error) else "Choose another place"
    return ModelError(f"writing {target} failed ({error}); what was there is untouched. {remedy}")


def plural(count: int, noun: str) -> str:
    """Return "1 tensor", "2 tensors"."""
    return f"{count} {noun}" + "s" * (count != 1)


def overflowing(keys: list[str], dtype: str, remedy: str) -> ModelError:
    """Return the error for tensors with a finite number that overflows in `dtype`."""
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    verb = "overflows" if len(keys) == 1 else "overflow"
    return ModelError(f"{plural(len(keys), 'tensor')} {verb} in {dtype}: {', '.join(keys[:5])}{more}; {remedy}")
