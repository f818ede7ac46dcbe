"""Where the time of a run goes, and how much of its devices it uses."""

import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax

from lcm_jax.cost import peak_flops
from lcm_jax.profiling.trace import Tracer


class Meter:
    """Counts updates, their FLOPs, and the seconds that a run spends beside them, since the last `read`.

    batch_size: images of an update. skipped(): unreadable records so far, by cause.
    """

    def __init__(self, batch_size: int, devices: Sequence[Any], skipped: Callable[[], Mapping[str, int]] = dict):
        self._batch_size, self._devices, self._skipped = batch_size, devices, skipped
        peak = peak_flops(devices[0].device_kind)
        self._peak = None if peak is None else peak * len(devices)
        self._skipped_before: Mapping[str, int] = dict(skipped())
        self.restart()

    def restart(self) -> None:
        """Begin to count anew: what came before, such as a preview, is not part of any rate."""
        self._began, self._updates, self._flops, self._waited = time.monotonic(), 0, 0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the seconds of the block as spent waiting for data."""
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    def count(self, flops: int) -> None:
        """Count an update of so many FLOPs, those of all devices together."""
        self._updates += 1
        self._flops += flops

    def read(self) -> dict[str, float]:
        """Return the rates since the last reading, and begin to count anew; call it when the updates have finished.

        steps_per_second and images_per_second; step_seconds and data_seconds of an update, the latter spent waiting for
        its batch; tflops_per_second, without recomputed activations, and mfu, its share of the devices' published peak,
        if that is known; memory_gb, the peak of the fullest device, or on a CPU of this process; skipped, the records
        that could not be read, and skipped/CAUSE.
        """
        seconds, updates = time.monotonic() - self._began, self._updates
        rates = {
            "steps_per_second": updates / seconds,
            "images_per_second": updates / seconds * self._batch_size,
            "step_seconds": (seconds - self._waited) / updates,
            "data_seconds": self._waited / updates,
            "tflops_per_second": self._flops / seconds / 1e12,
            "memory_gb": peak_memory(self._devices) / 1e9,
        }
        if self._peak is not None:
            rates["mfu"] = self._flops / seconds / self._peak
        skipped = dict(self._skipped())
        new = {cause: count - self._skipped_before.get(cause, 0) for cause, count in skipped.items()}
        if any(new.values()):
            rates["skipped"] = sum(new.values())
            rates |= {f"skipped/{cause}": count for cause, count in new.items() if count}
        self._skipped_before = skipped
        self.restart()
        return rates


def peak_memory(devices: Sequence[Any]) -> int:
    """Return the peak bytes of the fullest device of this process; of the process itself where devices report none."""
    local = [device for device in devices if device.process_index == jax.process_index()]
    stats = [device.memory_stats() for device in local]
    used = [each["peak_bytes_in_use"] for each in stats if each and "peak_bytes_in_use" in each]
    return max(used) if used else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class ProfiledSteps:
    """The updates `first` to `last`, 1-based, of which `tracer` records a profile; tracer: None for no profile."""

    def __init__(self, tracer: Tracer | None, steps: tuple[int, int], log: Callable[[str], None]):
        self._tracer, self._steps, self._log = tracer, steps, log
        self._tracing, self._done = False, 0

    def before(self, step: int, state: Any) -> None:
        """Begin the trace if `step` is its first update, once `state` has been computed."""
        if self._tracer is not None and step == self._steps[0]:
            jax.block_until_ready(state)
            self._tracer.start()
            self._tracing = True

    def after(self, step: int, metrics: Any) -> None:
        """End the trace if `step` is its last update, once `metrics` have been computed."""
        if self._tracing:
            self._done += 1
            if step == self._steps[1]:
                jax.block_until_ready(metrics)
                self.close()

    def close(self) -> None:
        """End the trace if the run ends before its last update; log why if there is no profile."""
        if self._tracer is not None:
            tracer, self._tracer, self._tracing = self._tracer, None, False
            if not self._done:
                self._log(f"no profile was written: this process ran no update {self._steps[0]}")
                return
            try:
                self._log(tracer.stop(self._done))
            except (ValueError, OSError) as error:  # such as a driver that records no kernels: training goes on
                self._log(f"no profile was written: {error}")
