"""Records that cannot be read, and others in their place, so that a damaged file does not end a run of days."""

import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
Failures = tuple[tuple[int, str], ...]  # (record number, reason) of each that another one replaced
MAX_ATTEMPTS = 1000  # records tried in place of an unreadable one before the set counts as unreadable
MAX_NAMED = 1000  # unreadable records that are reported one by one; then every hundredth
MIN_READ = 300  # records of which a share tells something
EXAMPLES = 3


class Substitutes:
    """Reads records by number. One that cannot be read is counted, reported once and replaced by another of the set.

    The other one is always the same, so that record i stays a function of i. A set is read by several threads. A copy
    in another process counts and reports for itself alone, without a log: what it has replaced is to be handed to
    `count` of this one.
    """

    def __init__(
        self,
        total: int,
        name: Callable[[int], str],
        log: Callable[[str], None],
        failure: tuple[str, str],
        fatal: tuple[type[Exception], ...] = (),
        groups: np.ndarray | None = None,
        max_share: float = 1.0,
    ):
        """total: records of the set. name(number): a record in messages. log: is called with a line per unreadable one.

        failure: the key of the data and the remedy if none can be read. fatal: errors after which no record is
        replaced. groups: int[total], by which a record is replaced by one of its own group alone. max_share: the part
        of the records in training batches that others may replace.
        """
        self.unreadable: dict[int, str] = {}  # record number -> reason
        self._total, self._name, self._log, self._failure, self._fatal = total, name, log, failure, fatal
        self._groups = groups
        self._members = {} if groups is None else {int(g): np.flatnonzero(groups == g) for g in np.unique(groups)}
        self._max_share, self._read, self._replaced = max_share, 0, 0
        self._causes: Counter[str] = Counter()  # unreadable records by kind of error
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lock": None, "_log": None}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock, self._log = threading.Lock(), lambda line: None

    def read(self, i: int, read: Callable[[int], T]) -> tuple[T, Failures]:
        """Return read(i), or read(another) if that raises, and the records that could not be read before it.

        Raises ValueError if none can be read, and `fatal` errors; IndexError if there is no record i.
        """
        if not 0 <= i < self._total:
            raise IndexError(f"record {i} of {self._total}")
        members = range(self._total) if self._groups is None else self._members[int(self._groups[i])]
        total, place = len(members), i if self._groups is None else int(np.searchsorted(members, i))
        # Far apart, so that the record behind a damaged shard is not repeated for each of it; coprime, to reach all.
        stride = next(s for s in range(int(0.618 * total), 2 * total + 2) if math.gcd(s, total) == 1)
        failures = []
        for attempt in range(min(total, MAX_ATTEMPTS)):
            number = int(members[(place + attempt * stride) % total])
            if number not in self.unreadable:
                try:
                    return read(number), tuple(failures)
                except self._fatal:
                    raise
                except Exception as error:  # Pillow's decoders raise many kinds; every one of them is reported
                    self._report(number, describe(error))
            failures.append((number, self.unreadable[number]))
        number, reason = failures[0]
        key, remedy = self._failure
        raise ValueError(
            f"{key}: none of {len(failures)} records can be read; {self._name(number)}: {reason}; {remedy}"
        )

    def count(self, rows: int, replaced: Sequence[Failures]) -> None:
        """Count `rows` records of a training batch, some of which replaced others that could not be read.

        Raises ValueError with causes and examples if more than `max_share` of all so far were replaced.
        """
        for failures in replaced:
            for number, reason in failures:
                self._report(number, reason)
        with self._lock:
            self._read, self._replaced = self._read + rows, self._replaced + len(replaced)
            share = self._replaced / self._read
        if self._read >= MIN_READ and share > self._max_share:
            key, remedy = self._failure
            examples = "; ".join(f"{self._name(n)}: {self.unreadable[n]}" for n in list(self.unreadable)[:EXAMPLES])
            raise ValueError(
                f"{key}: {share:.1%} of {self._read} records could not be read, more than data.max_skipped "
                f"{self._max_share:.1%} ({self._summary()}); {examples}; {remedy}, or raise data.max_skipped"
            )

    def counts(self) -> dict[str, int]:
        """Return the number of records that could not be read so far, by kind of error."""
        with self._lock:
            return dict(self._causes)

    def _summary(self) -> str:
        return ", ".join(f"{n} {kind}" for kind, n in self._causes.most_common())

    def _report(self, number: int, reason: str) -> None:
        with self._lock:
            if number in self.unreadable:
                return
            self.unreadable[number] = reason
            self._causes[reason.split(":")[0]] += 1
            count, causes = len(self.unreadable), self._summary()
        if count <= MAX_NAMED or count % 100 == 0:
            self._log(
                f"{self._name(number)} cannot be read ({reason}); skipped; {count} of {self._total} so far ({causes})"
            )


def describe(error: Exception) -> str:
    """Return the kind of an error and the first line of its text."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
