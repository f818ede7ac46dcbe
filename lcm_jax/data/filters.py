"""Rules such as `width>=512`, by which records are left out when a set is opened, so that access stays random."""

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lcm_jax.data.captioned import find_field

COMPARISONS = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
RULE = re.compile(r"\s*([^\s<>=!]+)\s*(<=|>=|==|!=|<|>)\s*(\S+)\s*")
MIN_SIZE = "min_size"  # the shorter side of the image, beside the fields that a source has


class Rule(NamedTuple):
    """A comparison that a record must satisfy, if it has a number in that field."""

    text: str
    field: str
    compare: Callable[[Any, Any], Any]
    value: float


def parse_filters(rules: Sequence[str]) -> tuple[Rule, ...]:
    """Return the rules of `data.filters`. Raises ValueError that names the first one that is not a rule."""
    if isinstance(rules, str):
        rules = (rules,)
    return tuple(_parse(rule) for rule in rules)


def _parse(rule: Any) -> Rule:
    match = RULE.fullmatch(rule) if isinstance(rule, str) else None
    value = to_number(match[3]) if match else math.nan
    if match is None or math.isnan(value):
        raise ValueError(
            f"data.filters {rule!r} is not supported; use a field, one of {' '.join(COMPARISONS)} and a number, such "
            "as 'width>=512', 'pwatermark<0.5' or 'min_size>=256'"
        )
    return Rule(rule, match[1], COMPARISONS[match[2]], value)


def to_number(value: Any) -> float:
    """Return a number, or text that is one, as a float; NaN for anything else."""
    try:
        return math.nan if value is None or isinstance(value, bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def to_numbers(rows: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> dict[str, np.ndarray]:
    """Return float64[N] of each field, NaN for rows without a number in it."""
    return {field: np.array([to_number(find_field(row, field)) for row in rows], np.float64) for field in fields}


def select(
    rules: Sequence[Rule], values: Mapping[str, np.ndarray], total: int, log: Callable[[str], None]
) -> np.ndarray:
    """Return the numbers of the records that no rule rejects, int64[n], ascending.

    values: float64[total] of each field that a rule names; NaN, of a record without it, never rejects. log: is called
    with a line for each rule that rejects records, each counted for the first of them.
    """
    kept = np.ones(total, bool)
    for rule in rules:
        value = values[rule.field]
        rejected = kept & ~np.isnan(value) & ~rule.compare(value, rule.value)
        kept &= ~rejected
        missing = int(np.isnan(value).sum())
        log(
            f"data.filters {rule.text!r} leaves out {int(rejected.sum())} of {total} records"
            + (f"; {missing} have no number in {rule.field!r}, and stay" if missing else "")
        )
    return np.flatnonzero(kept)
