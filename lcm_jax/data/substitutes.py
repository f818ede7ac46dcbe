"""Records that cannot be read, and others in their place, so that a damaged file does not end a run of days."""

import math
import threading
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
MAX_ATTEMPTS = 1000  # records tried in place of an unreadable one before the set counts as unreadable
MAX_NAMED = 1000  # unreadable records that are reported one by one; then every hundredth


class Substitutes:
    """Reads records by number. One that cannot be read is counted, reported once and replaced by another of the set.

    The other one is always the same, so that record i stays a function of i. A set is read by several threads.
    """

    def __init__(
        self,
        total: int,
        name: Callable[[int], str],
        log: Callable[[str], None],
        failure: tuple[str, str],
        fatal: tuple[type[Exception], ...] = (),
    ):
        """total: records of the set. name(number): a record in messages. log: is called with a line per unreadable one.

        failure: the key of the data and the remedy if none can be read. fatal: errors after which no record is
        replaced.
        """
        self.unreadable: dict[int, str] = {}  # record number -> reason
        self._total, self._name, self._log, self._failure, self._fatal = total, name, log, failure, fatal
        self._causes: Counter = Counter()  # unreadable records by kind of error
        self._lock = threading.Lock()

    def read(self, i: int, read: Callable[[int], T]) -> T:
        """Return read(i), or read(another) if that raises. Raises ValueError if none can be read, and `fatal` errors.

        Raises IndexError if there is no record i.
        """
        total = self._total
        if not 0 <= i < total:
            raise IndexError(f"record {i} of {total}")
        # Far apart, so that the record behind a damaged shard is not repeated for each of it; coprime, to reach all.
        stride = next(s for s in range(int(0.618 * total), 2 * total + 2) if math.gcd(s, total) == 1)
        for attempt in range(min(total, MAX_ATTEMPTS)):
            number = (i + attempt * stride) % total
            if number in self.unreadable:
                continue
            try:
                return read(number)
            except self._fatal:
                raise
            except Exception as error:  # Pillow's decoders raise many kinds; every one of them is reported
                self._report(number, f"{type(error).__name__}: {error}".splitlines()[0])
        number, reason = next(iter(self.unreadable.items()))
        key, remedy = self._failure
        raise ValueError(
            f"{key}: none of {min(total, MAX_ATTEMPTS)} records can be read; {self._name(number)}: {reason}; {remedy}"
        )

    def _report(self, number: int, reason: str) -> None:
        with self._lock:
            if number in self.unreadable:
                return
            self.unreadable[number] = reason
            self._causes[reason.split(":")[0]] += 1
            count, causes = len(self.unreadable), ", ".join(f"{n} {kind}" for kind, n in self._causes.most_common())
        if count <= MAX_NAMED or count % 100 == 0:
            self._log(
                f"{self._name(number)} cannot be read ({reason}); skipped; {count} of {self._total} so far ({causes})"
            )
