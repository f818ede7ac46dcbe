"""Checks of what a person passes: each returns the value, or raises a ValueError that names argument, value, remedy."""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from lcm_jax.data import text


def integer(name: str, value: Any, minimum: int | None = None, maximum: int | None = None) -> int:
    """An int, or what counts as one in Python (not a bool), from minimum to maximum."""
    allowed = (
        "an integer" if minimum is None else f"{minimum} or more" if maximum is None else f"{minimum} to {maximum}"
    )
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}; use {allowed}") from None
    outside = (minimum is not None and number < minimum) or (maximum is not None and number > maximum)
    if outside or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; use {allowed}")
    return number


def guidance(value: Any) -> float:
    """A finite guidance_scale of 1 or more."""
    if (
        isinstance(value, bool)
        or np.ndim(value)
        or np.asarray(value).dtype.kind not in "iuf"
        or not 1 <= value < np.inf
    ):
        raise ValueError(f"guidance_scale is {value!r}; use 1 (no guidance) or more, such as 8")
    return float(value)


def pair(name: str, value: Any) -> tuple[int, int]:
    """(height, width) or (top, left) in pixels."""
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str) or len(value) != 2:
        raise ValueError(f"{name} is {value!r}; use two integers, such as (512, 512)")
    return integer(name, value[0], 0), integer(name, value[1], 0)


def prompts(name: str, value: Any) -> list[str]:
    """A text or several, valid Unicode."""
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, Sequence) or not given or not all(isinstance(each, str) for each in given):
        raise ValueError(f"{name} is {value!r}; use a text or a list of at least one text")
    return [text.check_unicode(each, name) for each in given]


def choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """One of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; choose {', '.join(allowed)}")
    return value
