"""Prometheus metrics of the page, in a registry of their own."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
OUTCOMES = ("done", "invalid", "queue_full", "timed_out", "superseded", "unavailable", "cancelled", "failed")


class Metrics:
    """Counts and times of requests; all methods may be called from any thread."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self):
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("lcm_jax_requests", "Requests by outcome.", ["outcome"], registry=registry)
        self._images = Counter("lcm_jax_images", "Images generated.", registry=registry)
        self._queue = Gauge("lcm_jax_queue_length", "Requests that wait.", registry=registry)
        self._queued = Histogram("lcm_jax_queue_seconds", "Seconds in the queue.", registry=registry, buckets=SECONDS)
        self._generation = Histogram(
            "lcm_jax_generation_seconds", "Seconds of generation.", ["model"], registry=registry, buckets=SECONDS
        )
        for outcome in OUTCOMES:  # all are there from the start, at 0
            self._requests.labels(outcome)

    def watch_queue(self, length: Callable[[], int]) -> None:
        """Report what `length` returns as the length of the queue."""
        self._queue.set_function(length)

    def refuse(self, outcome: str) -> None:
        """Count a request that gets no images."""
        self._requests.labels(outcome).inc()

    def complete(self, model: str, images: int, seconds: float) -> None:
        """Count a request that got its images. model: "model" or "teacher"."""
        self._requests.labels("done").inc()
        self._images.inc(images)
        self._generation.labels(model).observe(seconds)

    def leave_queue(self, seconds: float) -> None:
        """Record the time that a request has waited before it was started."""
        self._queued.observe(seconds)

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)
