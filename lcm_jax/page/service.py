"""The queue, in which a client's newest request wins, and the worker that generates images, one request at a time."""

import threading
import time
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image

from lcm_jax.data.tokenizer import token_lists
from lcm_jax.diffusion.samplers import SAMPLERS
from lcm_jax.errors import first_line, memory_shortage
from lcm_jax.page.metrics import Metrics
from lcm_jax.page.requests import (
    InvalidRequest,
    Limits,
    QueueFull,
    Refused,
    Request,
    Result,
    Superseded,
    TimedOut,
    Unavailable,
)
from lcm_jax.pipeline import Pipeline
from lcm_jax.sampling import arguments
from lcm_jax.sampling.generate import is_classifier_free, sampler_table
from lcm_jax.sampling.settings import File, Lora, Settings

MAX_SEED = 2**31 - 1
MAX_LORA_WEIGHT = 4.0
MAX_GUIDANCE = 50.0
CLIENTS = 4096  # whose newest request is remembered


@dataclass(frozen=True)
class Job:
    """A request in the queue. Times are of time.monotonic(): when it was sent, and when it may start."""

    request: Request
    future: Future
    sent: float
    ready: float


class Service:
    """The models, the queue and the worker, which alone uses the models once it is started."""

    def __init__(
        self,
        pipe: Pipeline,
        limits: Limits,
        metrics: Metrics,
        samplers: tuple[str, ...],
        teacher: Pipeline | None = None,
        teacher_steps: int = 50,
    ):
        """samplers: names to choose from, the default first. teacher_steps: of the teacher's images."""
        self.pipe, self.teacher, self.teacher_steps = pipe, teacher, teacher_steps
        self.limits, self.metrics, self.samplers = limits, metrics, samplers
        self.max_steps = {name: _find_max_steps(pipe, name, limits.max_steps) for name in samplers}
        self.state = "warming up"
        self.error: BaseException | None = None  # of the warm-up
        self.warm = threading.Event()  # set if the warm-up has ended, in whatever way
        self._changed = threading.Condition()
        self._queue: OrderedDict[str, Job] = OrderedDict()  # by client; a newer request takes its older one's place
        self._tickets: OrderedDict[str, float] = OrderedDict()  # the newest by client
        self._threads = [threading.Thread(target=work, name=work.__name__) for work in (self._work, self._watch)]
        metrics.watch_queue(lambda: len(self._queue))

    def start(self) -> None:
        """Start the worker, which warms up first; `warm` is set when that has ended."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Refuse the queued requests and all that follow; the one that is being generated is finished."""
        with self._changed:
            self.state = "shutting down"
            refused = list(self._queue.values())
            self._queue.clear()
            self._changed.notify_all()
        for job in refused:
            self._refuse(job, Unavailable("the server is shutting down; try again later"))

    def join(self) -> None:
        """Wait until the worker has ended, after `stop`."""
        for thread in self._threads:
            thread.join()

    def submit(
        self, request: Request, client: str, ticket: float | None = None, quiet_s: float = 0.0
    ) -> "Future[Result]":
        """Return the future of the request's result.

        client: who sends it; a request that has not started yet is superseded by the client's next one. ticket: rises
        with each request of the client, so that an older one is recognized even if it arrives late. quiet_s: seconds
        without a newer request before this one may start. Raises Refused, or sets it as the future's exception.
        """
        try:
            self.check(request)
            now = time.monotonic()
            job = Job(request, Future(), now, now + quiet_s)
            older = self._enqueue(job, client, ticket)
        except Refused as refused:
            self.metrics.refuse(refused.outcome)
            raise
        if older is not None:
            self._refuse(older, Superseded("a newer request took its place"))
        return job.future

    def check(self, request: Request) -> None:
        """Raise InvalidRequest with the name, the value and the remedy if the request is beyond a limit."""
        limits = self.limits
        try:
            (prompt,) = arguments.prompts("prompt", [request.prompt])
            if len(prompt) > limits.max_prompt_chars:
                raise ValueError(f"prompt has {len(prompt)} characters; use at most {limits.max_prompt_chars}")
            if request.teacher and self.teacher is None:
                raise ValueError("teacher is set, but no teacher is loaded; start the page with --teacher")
            samplers = self.samplers if self.teacher is None or not request.teacher else (self.teacher.sampler,)
            arguments.choice("sampler", request.sampler, samplers)
            max_steps = self.teacher_steps if request.teacher else self.max_steps[request.sampler]
            arguments.integer("num_inference_steps", request.num_inference_steps, 1, max_steps)
            arguments.integer("seed", request.seed, 0, MAX_SEED)
            arguments.integer("images", request.images, 1, 1 if request.teacher else limits.max_batch)
            arguments.integer("first", request.first, 0, MAX_SEED)
            if request.size is not None and request.size not in limits.sizes:
                sizes = ", ".join(f"{height} x {width}" for height, width in limits.sizes)
                raise ValueError(f"height and width are {request.size[0]} and {request.size[1]}; choose {sizes}")
            _check_number("guidance_scale", request.guidance_scale, 1, MAX_GUIDANCE)
            _check_number("strength", request.strength, 0, 1)
            for name, weight in request.lora_weights.items():
                arguments.choice("LoRA", name, tuple(self.pipe.lora_weights))
                _check_number(f"weight of LoRA {name!r}", weight, -MAX_LORA_WEIGHT, MAX_LORA_WEIGHT)
        except ValueError as error:
            raise InvalidRequest(str(error)) from error

    def has_steps(self, request: Request) -> bool:
        """Return True if the sampler has this number of steps, from a drawing at this strength if there is one."""
        if request.num_inference_steps > self.max_steps.get(request.sampler, 0):
            return False
        try:
            strength = 1.0 if request.image is None else request.strength
            sampler_table(self.pipe.model, request.sampler, request.num_inference_steps, strength)
        except ValueError:
            return False
        return True

    def _enqueue(self, job: Job, client: str, ticket: float | None) -> Job | None:
        """Put the job into the queue; return the older one of the client, whose place it takes."""
        with self._changed:
            if self.state != "ready":
                raise Unavailable(f"the server is {self.state}; try again later")
            if ticket is not None:
                if ticket <= self._tickets.get(client, float("-inf")):
                    raise Superseded("a newer request arrived before it")
                self._tickets[client] = ticket
                self._tickets.move_to_end(client)
                if len(self._tickets) > CLIENTS:
                    self._tickets.popitem(last=False)
            older = self._queue.get(client)
            if older is None and len(self._queue) >= self.limits.queue_size:
                raise QueueFull(f"{len(self._queue)} requests are waiting already; try again in a few seconds")
            self._queue[client] = job
            self._changed.notify_all()
        return older

    def _refuse(self, job: Job, refused: Refused) -> None:
        if job.future.set_running_or_notify_cancel():
            self.metrics.refuse(refused.outcome)
            job.future.set_exception(refused)
        else:
            self.metrics.refuse("cancelled")

    def _work(self) -> None:
        """Warm up, then generate the images of one job after the other until the service is stopped."""
        try:
            for request in self.programs():
                if self.state != "warming up":
                    break
                self.generate(request)
        except Exception as error:
            self.error = error
            self.stop()
        with self._changed:
            self.state = "ready" if self.state == "warming up" else self.state
        self.warm.set()
        while (job := self._next()) is not None:
            self.metrics.leave_queue(time.monotonic() - job.sent)
            if not job.future.set_running_or_notify_cancel():
                self.metrics.refuse("cancelled")
                continue
            try:
                result = self.generate(job.request)
            except Exception as error:
                refused = _explain(error)
                self.metrics.refuse(refused.outcome)
                job.future.set_exception(refused)
            else:
                model = "teacher" if job.request.teacher else "model"
                self.metrics.complete(model, len(result.images), result.seconds)
                job.future.set_result(result)

    def _next(self) -> Job | None:
        """Wait for the first job that may start, and take it; None if the service is stopped."""
        with self._changed:
            while self.state == "ready":
                now = time.monotonic()
                ready = next((client for client, job in self._queue.items() if job.ready <= now), None)
                if ready is not None:
                    return self._queue.pop(ready)
                earliest = min((job.ready for job in self._queue.values()), default=None)
                self._changed.wait(None if earliest is None else earliest - now)
            return None

    def _watch(self) -> None:
        """Refuse jobs that wait too long, also while the worker is busy."""
        while self.state != "shutting down":
            with self._changed:
                self._changed.wait_for(lambda: self.state == "shutting down", timeout=0.1)
                before = time.monotonic() - self.limits.timeout_s
                late = [client for client, job in self._queue.items() if job.sent < before]
                jobs = [self._queue.pop(client) for client in late]
            for job in jobs:
                self._refuse(job, TimedOut(f"the server was busy for {self.limits.timeout_s:g} s; try again later"))

    def programs(self) -> Iterator[Request]:
        """Yield a request for every program that a visitor's requests can need, with the fewest steps."""
        for pipe, samplers in ((self.pipe, self.samplers), (self.teacher, (None,))):
            if pipe is None:
                continue
            guided = (True, False) if is_classifier_free(pipe.model, 2.0) else (True,)
            batches = (1,) if pipe is self.teacher or self.limits.max_batch == 1 else (1, self.limits.max_batch)
            images = (None, Image.new("RGB", (64, 64), "white"))
            for sampler, size, batch, image, guide in product(samplers, self.limits.sizes, batches, images, guided):
                yield Request(
                    prompt="",
                    num_inference_steps=1,
                    guidance_scale=8.0 if guide else 1.0,
                    sampler=sampler or pipe.sampler,
                    images=batch,
                    size=size,
                    image=image,
                    strength=1.0,  # some samplers make no step of 1 at less
                    teacher=pipe is self.teacher,
                )

    def generate(self, request: Request) -> Result:
        """Generate the images of a request at once; the worker's alone once the service is started."""
        pipe = self.teacher if self.teacher is not None and request.teacher else self.pipe
        _check_tokens(pipe, request.prompt)  # by the worker, since a tokenizer serves one thread at a time
        if pipe is self.pipe:
            for name, weight in request.lora_weights.items():
                if pipe.lora_weights[name] != weight:
                    pipe.set_lora_weight(name, weight)
        height, width = request.size or self.limits.sizes[0]
        start = {} if request.image is None else {"image": request.image, "strength": request.strength}
        began = time.monotonic()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            images = pipe(
                request.prompt,
                num_inference_steps=request.num_inference_steps,
                guidance_scale=request.guidance_scale,
                seed=request.seed,
                sampler=request.sampler,
                num_images_per_prompt=request.images,
                # One program for one image, and one for all other numbers.
                batch_size=1 if request.images == 1 else self.limits.max_batch,
                first=request.first,
                height=height,
                width=width,
                progress=False,
                **start,
            ).images
        seconds = time.monotonic() - began
        settings = tuple(
            _settings(pipe, request, (height, width), number, self.limits.max_batch) for number in range(request.images)
        )
        return Result(tuple(images), settings, seconds, tuple(str(each.message) for each in caught))


def _settings(pipe: Pipeline, request: Request, size: tuple[int, int], number: int, max_batch: int) -> Settings:
    """Return what generates image `number` of the request again; a drawing or photo is not part of it."""
    loras = {} if request.teacher else pipe.lora_weights
    return Settings(
        request.prompt,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=float(request.guidance_scale),
        sampler=request.sampler,
        seed=request.seed,
        number=request.first + number,
        height=size[0],
        width=size[1],
        strength=None if request.image is None else float(request.strength),
        loras=tuple(Lora(File(name), weight) for name, weight in loras.items()),
        model=shown_name(pipe),
        dtype=pipe.dtype,
        row=number,
        batch_size=1 if request.images == 1 else max_batch,
    )


def shown_name(pipe: Pipeline) -> str:
    """Return the model's name for visitors: of a folder or file without where it is."""
    path = Path(pipe.name)
    return path.name if path.exists() else pipe.name


def supported_samplers(pipe: Pipeline) -> tuple[str, ...]:
    """Return the names of the samplers that fit the model, its own first."""

    def fits(name: str) -> bool:
        try:
            arguments.sampler(pipe.model, name, tuple(SAMPLERS))
            sampler_table(pipe.model, name, 1)
        except ValueError:
            return False
        return True

    return (pipe.sampler, *(name for name in SAMPLERS if name != pipe.sampler and fits(name)))


def _find_max_steps(pipe: Pipeline, sampler: str, limit: int) -> int:
    """Return the largest number of steps up to `limit` that the sampler has for the model."""
    for steps in range(limit, 1, -1):
        try:
            sampler_table(pipe.model, sampler, steps)
        except ValueError:
            continue
        return steps
    return 1


def _check_tokens(pipe: Pipeline, prompt: str) -> None:
    """Raise ValueError for a prompt longer than the text encoders take at once, which needs another program."""
    for tokenizer in pipe.tokenizers:
        tokens, limit = len(token_lists(tokenizer, [prompt])[0]), tokenizer.model_max_length
        if tokens > limit:
            raise ValueError(f"prompt has {tokens - 2} tokens; use at most {limit - 2}")  # with both ends


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    """Raise ValueError unless the value is a number from low to high; NaN is not."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; use a number from {low:g} to {high:g}")


def _explain(error: Exception) -> Refused:
    """Return the refusal for an error of the pipeline; a traceback is printed for those that nobody expects."""
    if isinstance(error, ValueError):  # of an argument, or ModelError
        return InvalidRequest(str(error))
    if (shortage := memory_shortage(error)) is not None:
        return Refused(f"the server ran out of memory ({shortage}); use fewer images or a smaller size")
    traceback.print_exception(error)
    return Refused(f"the server failed ({first_line(error)}); its log has the details")
