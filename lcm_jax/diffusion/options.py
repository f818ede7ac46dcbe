"""Options of a scheduler_config.json, checked where they are used: an option that nothing uses refuses no model.

Each function returns the option's value, or `default` (that of the scheduler's class in diffusers) if it is absent, and
raises ValueError for a value that is not supported.
"""

import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

Config = Mapping[str, Any]


def unsupported(name: str, value: Any, remedy: str) -> ValueError:
    return ValueError(f"scheduler/scheduler_config.json: {name} {reprlib.repr(value)} is not supported; use {remedy}")


def choice(config: Config, name: str, default: Any, choices: Sequence) -> Any:
    """One of `choices`; the default may be a value that is not among them, and is then not supported either."""
    value = config.get(name, default)
    if value not in choices:
        raise unsupported(name, value, " or ".join(repr(each) for each in choices))
    return value


def flag(config: Config, name: str, default: bool = False) -> bool:
    """A bool; null counts as false, as in diffusers."""
    value = config.get(name, default)
    if value not in (True, False, None):
        raise unsupported(name, value, "true or false")
    return bool(value)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def number(config: Config, name: str, default: float | None, low: float, high: float = math.inf) -> float | None:
    """A number between `low` and `high`, both excluded, or the default."""
    value = config.get(name, default)
    if value != default and not (is_number(value) and low < value < high):
        raise unsupported(name, value, f"a number between {low:g} and {high:g}")
    return value


def whole(config: Config, name: str, default: int, low: int, high: int) -> int:
    """A whole number from `low` to `high`."""
    value = config.get(name, default)
    if not (is_number(value) and isinstance(value, int) and low <= value <= high):
        raise unsupported(name, value, f"a whole number from {low} to {high}")
    return value
