"""Options of a scheduler_config.json, checked only where they are used, so that an unused option rejects no model.

Each function returns the option's value, or `default` (the scheduler class's in diffusers) if it is absent, and raises
ValueError for a value that is not supported.
"""

import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

Config = Mapping[str, Any]


def unsupported(name: str, value: Any, remedy: str) -> ValueError:
    """Build the error for a value of the option `name`; remedy: the values that are supported."""
    return ValueError(f"scheduler/scheduler_config.json: {name} {reprlib.repr(value)} is not supported; use {remedy}")


def choice(config: Config, name: str, default: Any, choices: Sequence) -> Any:
    """Return one of `choices`. The default is checked as well, since diffusers' may not be supported."""
    value = config.get(name, default)
    if value not in choices:
        raise unsupported(name, value, " or ".join(repr(each) for each in choices))
    return value


def flag(config: Config, name: str, default: bool = False) -> bool:
    """Return a bool; null means false, as in diffusers."""
    value = config.get(name, default)
    if value not in (True, False, None):
        raise unsupported(name, value, "true or false")
    return bool(value)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def number(config: Config, name: str, default: float | None, low: float, high: float = math.inf) -> float | None:
    """Return a number in the open interval (low, high), or the default."""
    value = config.get(name, default)
    if value != default and not (is_number(value) and low < value < high):
        raise unsupported(name, value, f"a number between {low:g} and {high:g}")
    return value


def whole(config: Config, name: str, default: int, low: int, high: int) -> int:
    """Return an integer in [low, high]."""
    value = config.get(name, default)
    if not (is_number(value) and isinstance(value, int) and low <= value <= high):
        raise unsupported(name, value, f"a whole number from {low} to {high}")
    return value
