"""Requests for images, their limits and results, and the reasons for which a request is refused."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from PIL import Image

from lcm_jax.sampling.settings import Settings


class Refused(Exception):
    """A request that gets no images; the message contains the reason, and `outcome` its name in the metrics."""

    outcome = "failed"


class InvalidRequest(Refused):
    """A value that is not supported or beyond a limit."""

    outcome = "invalid"


class QueueFull(Refused):
    """More clients wait than the queue has places."""

    outcome = "queue_full"


class TimedOut(Refused):
    """A request that waited too long."""

    outcome = "timed_out"


class Superseded(Refused):
    """A request whose client has sent a newer one before it was started."""

    outcome = "superseded"


class Unavailable(Refused):
    """A service that is warming up or shutting down."""

    outcome = "unavailable"


@dataclass(frozen=True)
class Limits:
    """Bounds of requests. sizes: the (height, width) to choose from, in pixels, the default first.

    timeout_s: seconds that a request may wait in the queue; queue_size: the most requests in it.
    """

    sizes: tuple[tuple[int, int], ...]
    max_steps: int = 50
    max_batch: int = 4
    max_prompt_chars: int = 1000
    queue_size: int = 64
    timeout_s: float = 30.0


@dataclass(frozen=True)
class Request:
    """Arguments of a call of the pipeline, under its names, for one prompt.

    images: their number; they are numbered from `first` on, and image i depends on the seed and i alone. size: (height,
    width) in pixels; None is the default. image: where image-to-image starts from. lora_weights: by name, of the LoRAs
    to change. teacher: generate with the teacher.
    """

    prompt: str
    num_inference_steps: int
    guidance_scale: float
    sampler: str
    seed: int = 0
    images: int = 1
    first: int = 0
    size: tuple[int, int] | None = None
    image: Image.Image | None = None
    strength: float = 0.6
    lora_weights: Mapping[str, float] = field(default_factory=dict)
    teacher: bool = False


@dataclass(frozen=True)
class Result:
    """Images of a request, with the settings of each; seconds of generation; what the pipeline warned of."""

    images: tuple[Image.Image, ...]
    settings: tuple[Settings, ...]
    seconds: float
    warnings: tuple[str, ...]
