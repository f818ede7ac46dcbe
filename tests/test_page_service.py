"""The queue and the worker of the page, without a browser: a fake pipeline for the order, a real one for programs."""

import time
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny_model
from fake_pipeline import FakePipeline
from PIL import Image
from safetensors.numpy import save_file

from lcm_jax.page.metrics import Metrics
from lcm_jax.page.requests import InvalidRequest, Limits, QueueFull, Refused, Request, Superseded, TimedOut, Unavailable
from lcm_jax.page.service import Service, supported_samplers
from lcm_jax.pipeline import Pipeline

SIZES = ((64, 64), (32, 64))
LORA = (("A", (1, 16)), ("B", (16, 1)))


@pytest.fixture
def gated(monkeypatch):
    """make(**limits) -> (service, pipeline), warm, with the gate closed."""
    monkeypatch.setattr("lcm_jax.page.service._find_max_steps", lambda *_: 8)
    services = []

    def make(**limits):
        pipe = FakePipeline()
        service = Service(pipe, Limits(SIZES, **limits), Metrics(), ("lcm",))
        services.append((service, pipe))
        service.start()
        pipe.gate.set()
        assert service.warm.wait(20) and service.state == "ready" and pipe.prompts == []
        pipe.gate.clear()
        pipe.started.clear()
        return service, pipe

    yield make
    for service, pipe in services:
        pipe.gate.set()
        service.stop()
        service.join()


def ask(prompt, **values):
    return Request(prompt, **{"num_inference_steps": 4, "guidance_scale": 8.0, "sampler": "lcm"} | values)


def busy(service, pipe):
    """Occupy the worker, so that what follows waits in the queue."""
    future = service.submit(ask("first"), "first")
    assert pipe.started.wait(20)
    return future


def count(service, outcome):
    lines = service.metrics.render().decode().splitlines()
    return float(next(line for line in lines if f'requests_total{{outcome="{outcome}"}}' in line).split()[-1])


# --- order ---


def test_the_newest_request_of_a_client_takes_the_place_of_its_older_one(gated):
    service, pipe = gated()
    running = busy(service, pipe)
    typed = [service.submit(ask(prompt), "typist") for prompt in ("a", "ab")]
    other = service.submit(ask("other"), "other")
    typed.append(service.submit(ask("abc"), "typist"))
    pipe.gate.set()
    assert [future.result(20).settings[0].prompt for future in (running, typed[2], other)] == ["first", "abc", "other"]
    for future in typed[:2]:
        with pytest.raises(Superseded, match="newer request"):
            future.result(20)
    assert pipe.prompts == ["first", "abc", "other"]  # not behind the other client
    assert count(service, "superseded") == 2 and count(service, "done") == 3


def test_an_older_request_that_arrives_late_is_refused(gated):
    service, pipe = gated()
    pipe.gate.set()
    assert service.submit(ask("abc"), "typist", ticket=3).result(20)
    with pytest.raises(Superseded):
        service.submit(ask("ab"), "typist", ticket=2)
    assert service.submit(ask("ab"), "other", ticket=2).result(20)


def test_a_request_waits_until_its_client_is_quiet(gated):
    service, pipe = gated()
    pipe.gate.set()
    began = time.monotonic()
    hasty = service.submit(ask("a"), "typist", quiet_s=0.3)
    final = service.submit(ask("ab"), "typist", quiet_s=0.3)
    assert service.submit(ask("other"), "other").result(20)  # overtakes it
    assert final.result(20) and time.monotonic() - began >= 0.3 and pipe.prompts == ["other", "ab"]
    assert isinstance(hasty.exception(20), Superseded)


# --- limits ---


def test_a_full_queue_refuses_new_clients_but_takes_newer_requests(gated):
    service, pipe = gated(queue_size=2)
    busy(service, pipe)
    waiting = [service.submit(ask(prompt), prompt) for prompt in ("a", "b")]
    with pytest.raises(QueueFull, match="2 requests are waiting already; try again"):
        service.submit(ask("c"), "c")
    newer = service.submit(ask("a"), "a")
    assert isinstance(waiting[0].exception(20), Superseded) and count(service, "queue_full") == 1
    assert "lcm_jax_queue_length 2.0" in service.metrics.render().decode()
    pipe.gate.set()
    assert newer.result(20) and waiting[1].result(20)


def test_a_request_that_waits_too_long_is_refused_while_the_worker_is_busy(gated):
    service, pipe = gated(timeout_s=0.2)
    running = busy(service, pipe)
    late = service.submit(ask("late"), "late")
    assert isinstance(late.exception(20), TimedOut) and "busy for 0.2 s" in str(late.exception())
    pipe.gate.set()
    assert running.result(20) and pipe.prompts == ["first"]


def test_a_client_that_is_gone_costs_nothing(gated):
    service, pipe = gated()
    running = busy(service, pipe)
    assert service.submit(ask("gone"), "gone").cancel()
    last = service.submit(ask("last"), "last")
    pipe.gate.set()
    assert running.result(20) and last.result(20)
    assert pipe.prompts == ["first", "last"] and count(service, "cancelled") == 1


@pytest.mark.parametrize(
    "values, message",
    [
        ({"prompt": "a" * 41}, "prompt has 41 characters; use at most 40"),
        ({"prompt": 3}, r"prompt is \[3\]; use a string"),
        ({"prompt": "\ud800"}, "not valid Unicode"),
        ({"num_inference_steps": 9}, "num_inference_steps is 9; use 1 to 8"),
        ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5; use 1 to 8"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan; use a number from 1 to 50"),
        ({"guidance_scale": "8"}, "guidance_scale is '8'"),
        ({"sampler": "ddim"}, "sampler is 'ddim'; choose lcm"),
        ({"sampler": ["lcm"]}, "sampler is"),
        ({"seed": -1}, "seed is -1; use 0 to 2147483647"),
        ({"images": 5}, "images is 5; use 1 to 4"),
        ({"first": 2**31}, "first is 2147483648"),
        ({"size": (64, 4096)}, "height and width are 64 and 4096; choose 64 x 64, 32 x 64"),
        ({"strength": 1.5}, "strength is 1.5; use a number from 0 to 1"),
        ({"lora_weights": {"other": 1.0}}, "LoRA is 'other'; choose style"),
        ({"lora_weights": {"style": 99.0}}, "weight of LoRA 'style' is 99.0"),
        ({"teacher": True}, "no teacher is loaded; start the page with --teacher"),
    ],
)
def test_a_request_beyond_a_limit_is_refused_before_it_waits(gated, values, message):
    service, pipe = gated(max_prompt_chars=40)
    with pytest.raises(InvalidRequest, match=message):
        service.submit(ask(**{"prompt": "a circle"} | values), "client")
    assert count(service, "invalid") == 1 and pipe.prompts == []


# --- results ---


def test_results_have_settings_warnings_and_the_weights_of_loras(gated):
    service, pipe = gated()
    pipe.gate.set()
    result = service.submit(ask("warn", images=2, first=3, lora_weights={"style": 0.5}), "client").result(20)
    assert [each.number for each in result.settings] == [3, 4] and len(result.images) == 2
    assert result.warnings == ("the prompt was cut",) and pipe.lora_weights == {"style": 0.5}
    (lora,) = result.settings[0].loras
    assert (lora.file.path, lora.weight, result.settings[0].strength) == ("style", 0.5, None)
    drawn = ask("a", image=Image.new("RGB", (8, 8)), strength=0.5)
    assert service.submit(drawn, "client").result(20).settings[0].strength == 0.5


def test_a_failure_is_one_request_s_alone(gated, capsys):
    service, pipe = gated()
    pipe.gate.set()
    failed = service.submit(ask("fail"), "client").exception(20)
    assert (
        type(failed) is Refused and str(failed) == "the server failed (a fault of the device); its log has the details"
    )
    assert "with details" in capsys.readouterr().err
    failed = service.submit(ask("too much"), "client").exception(20)
    assert str(failed) == "the server ran out of memory (2.00 GB); use fewer images or a smaller size"
    assert service.submit(ask("next"), "client").result(20) and count(service, "failed") == 2


# --- start and end ---


def test_a_stopped_service_finishes_what_is_running_and_refuses_the_rest(gated):
    service, pipe = gated()
    running = busy(service, pipe)
    queued = service.submit(ask("queued"), "queued")
    service.stop()
    assert isinstance(queued.exception(20), Unavailable) and not running.done()
    with pytest.raises(Unavailable, match="the server is shutting down; try again later"):
        service.submit(ask("late"), "late")
    pipe.gate.set()
    assert running.result(20).settings[0].prompt == "first"
    service.join()


def test_a_service_that_is_warming_up_refuses_requests_and_reports_what_fails(monkeypatch):
    monkeypatch.setattr("lcm_jax.page.service._find_max_steps", lambda *_: 8)
    pipe = FakePipeline()
    service = Service(pipe, Limits(SIZES), Metrics(), ("lcm",))
    service.start()
    assert pipe.started.wait(20)
    with pytest.raises(Unavailable, match="the server is warming up"):
        service.submit(ask("a"), "client")

    def fail(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(service, "generate", fail)
    pipe.gate.set()
    assert service.warm.wait(20)
    service.join()
    assert service.state == "shutting down" and str(service.error) == "no memory"


# --- real models ---


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A service of a tiny model with a LoRA and a teacher, and the list of programs that JAX compiles."""
    folder = tmp_path_factory.mktemp("model")
    unet = tiny_model.SHALLOW | {"time_cond_proj_dim": 256}
    student = Pipeline.from_pretrained(tiny_model.write(folder / "student", unet=unet, scheduler="LCMScheduler"))
    key = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
    save_file(
        {f"{key}.lora_{side}.weight": np.ones(shape, np.float32) for side, shape in LORA}, folder / "style.safetensors"
    )
    student.load_lora(folder / "style.safetensors")
    teacher = Pipeline.from_pretrained(tiny_model.write(folder / "teacher", unet=tiny_model.SHALLOW))
    side = tiny_model.UNET["sample_size"] * student.model.downscale
    limits = Limits(((side, side),), max_steps=12, max_batch=2)
    service = Service(student, limits, Metrics(), supported_samplers(student)[:1], teacher, teacher_steps=3)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: (
            compiled.append(event) if event == "/jax/core/compile/backend_compile_duration" else None
        )
    )
    service.start()
    assert supported_samplers(student) == ("lcm", "tcd") and supported_samplers(teacher)[0] == "ddim"
    assert service.warm.wait(300) and service.error is None, service.error
    yield service, compiled
    service.stop()
    service.join()


def test_no_request_compiles_a_program(warm):
    service, compiled = warm
    assert compiled, "the event that counts programs has another name in this version of JAX"
    before = len(compiled)
    drawing = Image.new("RGB", (100, 50), "red")
    requests = [
        ask("a", num_inference_steps=1),
        ask("a red circle", num_inference_steps=7, guidance_scale=3.5, seed=123456),
        ask("b", guidance_scale=1.0, lora_weights={"style": 0.5}),
        ask("b", images=2),
        ask("b", images=2, image=drawing),
        ask("c", num_inference_steps=2, image=drawing, strength=0.8),
        ask("c", num_inference_steps=3, image=drawing, strength=0.5, seed=9),
        *(
            ask(
                "d",
                sampler=service.teacher.sampler,
                num_inference_steps=3,
                guidance_scale=scale,
                image=image,
                teacher=True,
            )
            for scale in (1.0, 5.0)
            for image in (None, drawing)
        ),
    ]
    requests.append(replace(requests[1], lora_weights={"style": 0.0}))
    images = [np.asarray(service.submit(each, "client").result(60).images[0]) for each in requests]
    assert len(compiled) == before
    assert np.abs(images[-1].astype(int) - images[1]).max() > 0, "the LoRA has no effect"
    assert np.abs(images[4].astype(int) - images[3]).max() > 0, "the drawing has no effect"


def test_a_prompt_of_more_tokens_than_one_program_takes_is_refused(warm):
    service, compiled = warm
    before = len(compiled)
    error = service.submit(ask("a red circle " * 10), "client").exception(60)
    assert isinstance(error, InvalidRequest) and str(error) == "prompt has 30 tokens; use at most 18"
    assert service.submit(ask("red " * 18), "client").result(60) and len(compiled) == before


def test_images_are_those_of_the_pipeline(warm):
    service, _ = warm
    result = service.submit(ask("a red circle", seed=5, images=2, first=1), "client").result(60)
    whole = service.pipe(
        "a red circle", num_inference_steps=4, guidance_scale=8.0, seed=5, num_images_per_prompt=3
    ).images
    for ours, theirs in zip(result.images, whole[1:], strict=True):
        assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max() <= 1
