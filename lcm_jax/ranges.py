"""Ranges of settings, and dataclasses whose fields are settings with a range each."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Range:
    """Finite numbers between two bounds, which are included; whole ones unless `real`.

    above, below: exclude the lower and the upper bound. multiple: of what. also: a value beside them. many: any number
    of them, in tuples of any depth. flat: many, in one tuple. infinite: the upper bound may be infinity itself.
    """

    low: float = 1
    high: float = math.inf
    real: bool = False
    above: bool = False
    below: bool = False
    multiple: int = 1
    also: int | None = None
    many: bool = False
    flat: bool = False
    infinite: bool = False

    def has(self, value: Any) -> bool:
        if self.flat:
            return isinstance(value, tuple | list) and all(map(replace(self, flat=False, many=False).has, value))
        if self.many and isinstance(value, tuple | list):
            return all(map(self.has, value))
        if isinstance(value, bool) or not isinstance(value, int | float if self.real else int):
            return False
        # Integers are finite, and those that no float can hold cannot be asked.
        if isinstance(value, float) and not (math.isfinite(value) or (self.infinite and value == math.inf)):
            return False
        low = value > self.low if self.above else value >= self.low
        high = value < self.high if self.below else value <= self.high
        return (low and high and (self.real or value % self.multiple == 0)) or value == self.also

    def __str__(self) -> str:
        noun = "number" if self.real else f"multiple of {self.multiple}" if self.multiple > 1 else "whole number"
        noun = f"{noun}s" if self.many else f"a {noun}"
        bounds = f"above {self.low}" if self.above else f"of at least {self.low}"
        if self.high < math.inf:
            bounds += f" and {'below' if self.below else 'at most'} {self.high}"
        return f"{noun} {bounds}" + ("" if self.also is None else f", or {self.also}")


POSITIVE = Range()
EVERY = Range(0)  # 0 is never; the last update is logged and saved in any case
STEPS = Range(1, 1000)
REAL = Range(0, real=True)
FRACTION = Range(0, 1, real=True)
DECAY = Range(0, 1, real=True, below=True)
ABOVE_ZERO = Range(0, real=True, above=True)
GUIDANCE = Range(1, 1000, real=True)  # w + 1, as a pipeline takes it
MANY = Range(many=True)
MANY_STEPS = Range(1, 1000, many=True, flat=True)


def setting(default: Any, allowed: Range | tuple) -> Any:
    """Return a dataclass field with a default and what it may be: numbers of a range, or one of a tuple."""
    return dataclasses.field(default=default, metadata={"allowed": allowed})


def allowed_values(kind: type) -> dict[str, Range | tuple]:
    """Return what each field made by `setting` may be, by its name."""
    return {f.name: f.metadata["allowed"] for f in dataclasses.fields(kind) if "allowed" in f.metadata}


def check_setting(key: str, value: Any, allowed: Range | tuple) -> None:
    """Raise ValueError that names the key, the value and what it may be."""
    if isinstance(allowed, Range):
        if not allowed.has(value):
            raise ValueError(f"{key} {value!r} is not supported; use {allowed}")
    elif not (type(value) is type(allowed[0]) and value in allowed):
        raise ValueError(f"{key} {value!r} is not supported; use {' or '.join(map(str, allowed))}")


def check_fields(instance: Any, group: str) -> None:
    """Raise ValueError for a field of a dataclass instance that is not what its `setting` allows: `group.name`."""
    for name, allowed in allowed_values(type(instance)).items():
        check_setting(f"{group}.{name}", getattr(instance, name), allowed)


def from_settings(kind: type, group: str, settings: Mapping[str, Any]) -> Any:
    """Build the dataclass `kind` from a group of a config; its `name`, which has chosen `kind`, is not a field.

    Raises ValueError for a setting that `kind` does not have, and those of its own checks.
    """
    settings = {name: value for name, value in settings.items() if name != "name"}
    names = [field.name for field in dataclasses.fields(kind)]
    if unknown := [name for name in settings if name not in names]:
        raise ValueError(f"{group}.{unknown[0]} is not a setting of {kind.__name__}; use {', '.join(names)}")
    return kind(**settings)


def span(name: str, text: str | None) -> tuple[int, int] | None:
    """Return the numbers of "first:last", both from 1, or None for no text. Raises ValueError with `name`."""
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ValueError(f"{name} {text!r} is not supported; use the first and the last one, such as 10:15")
    return int(first), int(last)
