"""The page's HTTP server: its own routes, and that nothing of Gradio beyond the page is reachable."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_pipeline import FakePipeline
from PIL import Image

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
pytest.importorskip("gradio")

from starlette.testclient import TestClient  # noqa: E402

from lcm_jax.page import server, uploads  # noqa: E402
from lcm_jax.page.layout import Defaults  # noqa: E402
from lcm_jax.page.metrics import Metrics  # noqa: E402
from lcm_jax.page.requests import Limits  # noqa: E402
from lcm_jax.page.service import Service  # noqa: E402
from lcm_jax.sampling import png  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
DEFAULTS = Defaults("a circle", 4, 8.0)
PNG = "data:image/png;base64,"


@pytest.fixture(scope="module")
def app():
    """(a client of the server, its service)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lcm_jax.page.service._find_max_steps", lambda *_: 8)
        pipe = FakePipeline()
        pipe.gate.set()
        service = Service(pipe, Limits(((64, 64),), max_prompt_chars=100), Metrics(), ("lcm",))
        with TestClient(server.make_app(service, DEFAULTS, lambda: None)) as client:
            assert service.warm.wait(20)
            yield client, service
            service.stop()
        service.join()


def settings_of(data: bytes):
    return png.read(io.BytesIO(data))


# --- routes of its own ---


def test_health_and_metrics(app):
    client, service = app
    answer = client.get("/healthz")
    assert (answer.status_code, answer.text) == (200, "ready\n")
    for state in ("warming up", "shutting down"):
        service.state = state
        answer = client.get("/healthz")
        assert (answer.status_code, answer.text) == (503, state + "\n")
        answer = client.post("/api/generate", json={"prompt": "a"})
        assert answer.status_code == 503 and answer.json()["error"] == f"the server is {state}; try again later"
        service.state = "ready"
    text = client.get("/metrics").text
    for name in ("requests_total", "images_total", "queue_length", "queue_seconds_bucket", "generation_seconds"):
        assert f"lcm_jax_{name}" in text


def test_an_image_of_the_api_has_its_settings(app):
    client, _ = app
    answer = client.post("/api/generate", json={"prompt": "a red circle", "seed": 7, "num_inference_steps": 2})
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/png"
    settings = settings_of(answer.content)
    assert (settings.prompt, settings.seed, settings.num_inference_steps) == ("a red circle", 7, 2)
    assert (settings.guidance_scale, settings.sampler, settings.height, settings.width) == (8.0, "lcm", 64, 64)
    expected = FakePipeline.image("a red circle", seed=7, num_inference_steps=2, height=64, width=64)
    assert (np.asarray(Image.open(io.BytesIO(answer.content))) == np.asarray(expected)).all()


@pytest.mark.parametrize(
    "body, message",
    [
        ("{", "the body is not JSON"),
        ("[" * 100_000, "the body is not JSON"),
        ("[]", "the body is a list; send an object"),
        ("{}", "prompt is missing"),
        ('{"prompt": "a", "image": "/etc/passwd"}', "'image' is not supported; use prompt, num_inference_steps"),
        ('{"prompt": ["a"]}', "use a string"),
        ('{"prompt": "a", "guidance_scale": NaN}', "guidance_scale is nan"),
        ('{"prompt": "a", "seed": 1e400}', "seed is inf"),
        ('{"prompt": "a", "seed": true}', "seed is True"),
        ('{"prompt": "a", "height": 4096}', "height and width are 4096 and 64; choose 64 x 64"),
        ('{"prompt": "a", "height": [64]}', "height and width are"),
        ('{"prompt": "a", "num_inference_steps": 9}', "use 1 to 8"),
        (json.dumps({"prompt": "a" * 101}), "at most 100"),
    ],
)
def test_a_wrong_request_is_one_line(app, body, message):
    client, _ = app
    answer = client.post("/api/generate", content=body)
    assert answer.status_code == 400 and message in answer.json()["error"] and "\n" not in answer.json()["error"]


# --- what is closed ---


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=/proc/self/environ",
        "/gradio_api/file=http://127.0.0.1:1/",
        "/gradio_api/file/etc/passwd",
        "/file=/etc/passwd",
        "/gradio_api/proxy=http://127.0.0.1:1/",
        "/gradio_api/upload_progress",
        "/gradio_api/info",
        "/gradio_api/queue/data",
        "/gradio_api/deep_link",
        "/monitoring",
        "/docs",
        "/assets/../../../../../../etc/passwd",
        "/assets/..%2f..%2f..%2f..%2f..%2f..%2fetc/passwd",
        "/static/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/static/%2fetc%2fpasswd",
        "/assets//etc/passwd",
        "/svelte/../../../etc/passwd",
        "/custom_component/a/client/component/..%2f..%2fetc",
    ],
)
def test_no_file_is_served(app, path):
    client, _ = app
    answer = client.get(path)
    assert answer.status_code in (403, 404) and b"root:" not in answer.content, answer.content[:200]


def test_nothing_can_be_uploaded_or_called_but_the_page(app):
    client, _ = app
    file = {"files": ("a.png", b"png", "image/png")}
    for path in (
        "upload",
        "queue/join",
        "component_server",
        "run/lambda_1",
        "api/predict",
        "call/draw",
        "reset",
        "login",
    ):
        answer = client.post(f"/gradio_api/{path}", **({"files": file} if path == "upload" else {"json": {}}))
        assert answer.status_code == 404, path


def test_bodies_are_bounded(app):
    client, _ = app
    answer = client.post("/gradio_api/run/predict", content=b"a" * (server.MAX_BODY_BYTES + 1))
    assert answer.status_code == 413 and "use at most" in answer.json()["error"]
    answer = client.post("/api/generate", content=iter([b"{}"]))  # chunked
    assert answer.status_code == 411


def test_the_policy_allows_no_other_host(app):
    client, _ = app
    answer = client.get("/")
    assert answer.headers["content-security-policy"].startswith("default-src 'self'")
    assert "googleapis" not in answer.text and "cdnjs" not in answer.text


# --- events of the page, by hand ---


def find_event(client, name):
    """(number of the event in the page's config, its inputs)"""
    text = client.get("/").text
    start = text.index("window.gradio_config = ") + len("window.gradio_config = ")
    config, _ = json.JSONDecoder().raw_decode(text, start)[0], None
    event = next(each for each in config["dependencies"] if each["api_name"].startswith(name))
    values = {each["id"]: each["props"].get("value") for each in config["components"]}
    return event["id"], [values[each] for each in event["inputs"]]


def send(client, name, change=None, event_data=None, ticket=[0]):  # noqa: B006
    """The data that the page's event returns, with other values of some inputs, by place."""
    number, values = find_event(client, name)
    for place, value in (change or {}).items():
        values[place] = value
    if values:
        ticket[0] += 1
        values[-1] = ticket[0]
    body = {"data": values, "fn_index": number, "session_hash": "visitor", "event_data": event_data}
    return client.post("/gradio_api/run/predict", json=body)


def test_the_page_draws(app):
    client, _ = app
    card, status = send(client, "draw", {0: '<script>alert("x")</script>'}).json()["data"]
    assert "<script>" not in card and "&lt;script&gt;" in card and "1 image at 4 steps" in status
    data = base64.b64decode(card.split(PNG)[1].split('"')[0])
    assert settings_of(data).prompt == '<script>alert("x")</script>'


def test_a_drawing_is_what_images_start_from(app):
    client, _ = app
    buffer = io.BytesIO()
    Image.new("RGB", (300, 300), "red").save(buffer, "png")
    url = PNG + base64.b64encode(buffer.getvalue()).decode()
    plain, drawn = (send(client, "draw", {1: value}).json()["data"][0] for value in ("", url))
    assert plain.split(PNG)[1] != drawn.split(PNG)[1]
    assert settings_of(base64.b64decode(drawn.split(PNG)[1].split('"')[0])).strength == 0.6


OPENED = []  # files of the system, by whatever code of this process; a hook stays for good
sys.addaudithook(lambda event, args: OPENED.append(args) if event == "open" and "passwd" in str(args[0]) else None)


@pytest.mark.parametrize(
    "drawing",
    [
        "/etc/passwd",
        "file:///etc/passwd",
        {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
        {"path": "/etc/passwd", "url": PNG, "meta": {"_type": "gradio.FileData"}},
        {"path": "../../../etc/passwd", "meta": {"_type": "gradio.FileData"}},
        [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}],
    ],
)
def test_no_path_that_a_visitor_sends_is_opened(app, drawing, monkeypatch):
    client, _ = app
    monkeypatch.setattr(uploads, "open_upload", lambda data: OPENED.append(data))
    for answer in (send(client, "draw", {1: drawing}), send(client, "restore", event_data={"png": drawing})):
        assert b"root:" not in answer.content and OPENED == []
        if isinstance(drawing, str):
            assert "not a data URL" in json.dumps(answer.json()["data"])
        else:
            assert answer.status_code == 400


def test_values_beyond_the_controls_are_refused(app):
    client, _ = app
    for change in ({2: 900}, {4: 10**12}, {5: 99}, {6: "../ddim"}, {7: "4096 x 4096"}, {0: "a" * 101}, {2: "x"}):
        answer = send(client, "draw", change)
        assert answer.status_code == 500 or "wrong" in answer.json()["data"][1], change


def test_settings_are_restored_from_a_png(app):
    client, service = app
    answer = client.post("/api/generate", json={"prompt": "two", "seed": 70_000, "num_inference_steps": 3, "first": 2})
    url = PNG + base64.b64encode(answer.content).decode()
    *values, status, restored = send(client, "restore", event_data={"png": url}).json()["data"]
    assert restored == 1
    assert values[0] == "two" and values[1] == "" and values[2]["value"] == 3 and values[5] == 3
    assert (values[4]["value"], values[4]["maximum"]) == (70_000, 70_000) and "Settings restored." in status
    settings = replace(settings_of(answer.content), height=128)
    from lcm_jax.sampling import png

    other = PNG + base64.b64encode(png.encode(Image.new("RGB", (4, 4)), settings)).decode()
    bad = {
        "data:image/png;base64,AAAA": "not a PNG",
        "/etc/passwd": "not a data URL",
        other: "128 and 64; choose 64 x 64",
    }
    for png_sent, message in bad.items():
        *_, status, restored = send(client, "restore", event_data={"png": png_sent}).json()["data"]
        assert message in status and restored == 0, status
    for nothing in ({}, None, "/etc/passwd", 5):
        assert "not a data URL" in send(client, "restore", event_data=nothing).json()["data"][-2]
    for not_flat in ([], [{"path": "/etc/passwd"}], {"png": {"path": "/etc/passwd"}}):
        assert send(client, "restore", event_data=not_flat).status_code == 400


# --- the command ---


def run(*arguments):
    command = [sys.executable, "-m", "lcm_jax.app", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_a_port_that_is_taken_is_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"--port={port} cannot be listened on .*; use another --port"):
            server.bind("127.0.0.1", port)
    with pytest.raises(OSError, match="--host=no.such.host.invalid"):
        server.bind("no.such.host.invalid", 0)


def test_help_and_wrong_flags():
    done = run("--help")
    assert done.returncode == 0 and "python -m lcm_jax.app --model=shapes-lcm --port=7860" in done.stdout
    done = run("--model=no-such-folder", "--port=0")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
