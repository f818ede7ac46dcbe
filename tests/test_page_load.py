"""Many visitors at once: no request is lost or mixed up, memory stays flat, and SIGTERM answers everyone."""

import hashlib
import io
import json
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from page_process import serve
from PIL import Image

from lcm_jax.pipeline import Pipeline
from lcm_jax.sampling import png

pytest.importorskip("gradio")
CLIENTS, REQUESTS = 50, 4
COLORS, SHAPES = ("red", "green", "blue", "yellow"), ("circle", "square", "triangle")
MEMORY_BYTES = 64 * 2**20  # that the second half of the requests may add


def digest(prompt, seed):
    return hashlib.sha256(f"{seed} {prompt}".encode()).hexdigest()


def ask(address, prompt, seed, steps=2):
    """(status, body, seconds) of a request for an image; status 0 if there is no answer at all."""
    body = json.dumps({"prompt": prompt, "seed": seed, "num_inference_steps": steps, "guidance_scale": 6.0}).encode()
    began = time.monotonic()
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{address}/api/generate", body), timeout=120) as answer:
            return answer.status, answer.read(), time.monotonic() - began
    except urllib.error.HTTPError as error:
        return error.code, error.read(), time.monotonic() - began
    except (urllib.error.URLError, ConnectionError) as error:
        return 0, str(error).encode(), time.monotonic() - began


def prompt_of(client, number):
    return f"a {COLORS[client % 4]} {SHAPES[(client + number) % 3]} above a {COLORS[number % 4]} square"


@pytest.fixture(scope="module")
def server():
    with serve(
        "--model=shapes-lcm", "--teacher=none", "--sampler=lcm", "--max_batch=1", "--queue_size=60", "--timeout_s=100"
    ) as server:
        yield server


def test_fifty_clients_each_get_their_own_images(server, capsys):
    def visit(client):
        return [(prompt, seed, *ask(server.address, prompt, seed)) for prompt, seed in plans[client]]

    memory = []
    with ThreadPoolExecutor(CLIENTS) as pool:
        for part in range(2):  # the first half fills the allocator's pools
            plans = [
                [(prompt_of(client, i), 1000 * part + 10 * client + i) for i in range(REQUESTS // 2)]
                for client in range(CLIENTS)
            ]
            results = [each for answers in pool.map(visit, range(CLIENTS)) for each in answers]
            memory.append(server.memory())
            assert [status for _, _, status, *_ in results] == [200] * (CLIENTS * REQUESTS // 2)
            for prompt, seed, _, body, _ in results:
                settings = png.read(io.BytesIO(body))
                assert digest(settings.prompt, settings.seed) == digest(prompt, seed)
            seconds = sorted(each[-1] for each in results)
    pipe = Pipeline.from_pretrained("shapes-lcm")
    images = []
    for prompt, seed, _, body, _ in results:
        images.append(np.asarray(Image.open(io.BytesIO(body))).astype(int))
        expected = pipe(prompt, num_inference_steps=2, guidance_scale=6.0, seed=seed).images[0]
        assert np.abs(images[-1] - np.asarray(expected)).max() <= 2, (prompt, seed)
    apart = min(np.abs(images[i] - images[j]).max() for i in range(len(images)) for j in range(i))
    assert apart > 20, "images of different requests are alike, so that the comparison proves nothing"
    p50, p99 = (seconds[int(len(seconds) * share)] for share in (0.5, 0.99))
    with capsys.disabled():
        print(f"\n{CLIENTS} clients: p50 {p50:.2f} s, p99 {p99:.2f} s, memory {memory[0] >> 20}, {memory[1] >> 20} MiB")
    assert memory[1] - memory[0] < MEMORY_BYTES
    metrics = urllib.request.urlopen(f"{server.address}/metrics").read().decode()
    assert f'lcm_jax_requests_total{{outcome="done"}} {CLIENTS * REQUESTS}.0' in metrics


def test_sigterm_answers_everyone_and_exits_cleanly(server):
    answers = []
    threads = [
        threading.Thread(target=lambda i=i: answers.append(ask(server.address, "a red circle", i, steps=8)))
        for i in range(CLIENTS)
    ]
    for thread in threads:
        thread.start()
    waiting = 0.0
    while waiting < 20:  # in flight and in the queue
        text = urllib.request.urlopen(f"{server.address}/metrics").read().decode()
        waiting = float(next(line for line in text.splitlines() if line.startswith("lcm_jax_queue_length")).split()[-1])
    server.terminate()
    assert server.process.wait(60) == 0, server.log()
    for thread in threads:
        thread.join(60)
    statuses = [status for status, *_ in answers]
    assert len(statuses) == CLIENTS and set(statuses) <= {200, 503, 0}, statuses
    assert statuses.count(200) >= 1 and statuses.count(503) >= 10, statuses
    for status, body, _ in answers:
        if status == 200:
            assert Image.open(io.BytesIO(body)).size == (64, 64)
        elif status == 503:
            assert json.loads(body)["error"] == "the server is shutting down; try again later"
    assert "Traceback" not in server.log()
