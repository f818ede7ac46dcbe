"""The HTTP server: Gradio's page, `/api/generate`, `/healthz` and `/metrics`, and nothing else."""

import asyncio
import json
import re
import signal
import socket
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import gradio as gr
import uvicorn
from fastapi import FastAPI, Response
from fastapi import Request as HttpRequest

from lcm_jax.page import layout, uploads
from lcm_jax.page.requests import InvalidRequest, QueueFull, Refused, Request, TimedOut, Unavailable
from lcm_jax.page.service import Service
from lcm_jax.sampling import png

# All that the page fetches. Gradio has many more routes: they read files, fetch addresses, accept uploads.
OPEN = re.compile(
    r"/|/theme\.css|/favicon\.ico|/(assets|static)/[\w./@-]+|/gradio_api/run/predict|/api/generate|/healthz|/metrics"
)
EVENTS = "/gradio_api/run/predict"
MAX_BODY_BYTES = 2 * uploads.MAX_BYTES
STATUS = {InvalidRequest: 400, QueueFull: 429, TimedOut: 504, Unavailable: 503}
# A browser that obeys it asks no other host for anything.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'"
FIELDS = ("prompt", "num_inference_steps", "guidance_scale", "sampler", "seed", "first", "height", "width")


class Gate:
    """ASGI middleware that lets only the routes in OPEN through, with bodies of at most MAX_BODY_BYTES.

    The values of an event are strings, numbers and booleans: Gradio would open the path of an object that describes a
    file, whatever component it is sent to.
    """

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        refusal = _refusal(scope) if scope["type"] == "http" else (404, "there is nothing at this address")
        if refusal is None and scope["path"] == EVENTS:
            body = await HttpRequest(scope, receive).body()
            receive = _replay(body, receive)
            if not _is_flat(body):
                refusal = 400, "the values of an event are strings, numbers and booleans"
        if refusal is not None:
            status, text = refusal
            await _error(status, text)(scope, receive, send)
            return

        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                headers = [(b"content-security-policy", POLICY.encode()), (b"x-content-type-options", b"nosniff")]
                message = message | {"headers": [*message["headers"], *headers]}
            await send(message)

        await self._app(scope, receive, send_with_policy)


def _refusal(scope) -> tuple[int, str] | None:
    """Return the status and the text for a request that is refused by its line and headers."""
    if OPEN.fullmatch(scope["path"]) is None or ".." in scope["path"]:
        return 404, "there is nothing at this address"
    if scope["method"] not in ("GET", "HEAD"):
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit():
            return 411, "the request has no Content-Length; send one"
        if int(length) > MAX_BODY_BYTES:
            return 413, f"the request has {int(length)} bytes; use at most {MAX_BODY_BYTES}"
    return None


def _is_flat(body: bytes) -> bool:
    """Return True if the inputs and the data of an event have neither lists nor objects in them."""
    try:
        event = json.loads(body)
        values, extra = event["data"], event.get("event_data")
        values = [*values, *(extra.values() if isinstance(extra, dict) else [extra])]
    except (ValueError, RecursionError, KeyError, TypeError):
        return False
    return not any(isinstance(each, dict | list) for each in values)


def _replay(body: bytes, receive):
    """Return an ASGI `receive` that begins with the body, which has been read."""
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def again():
        return next(messages, None) or await receive()

    return again


def _error(status: int, text: str) -> Response:
    return Response(json.dumps({"error": text}), status, media_type="application/json")


def make_app(service: Service, defaults: layout.Defaults, on_warm) -> FastAPI:
    """Return the application; on_warm() is called in its event loop when the warm-up has ended."""

    @asynccontextmanager
    async def lifespan(_: FastAPI):
        service.start()
        waiting = asyncio.create_task(_when_warm(service, on_warm))
        yield
        await waiting

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Gate)

    @app.get("/healthz")
    def healthz() -> Response:
        return Response(service.state + "\n", 200 if service.state == "ready" else 503, media_type="text/plain")

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(service.metrics.render(), media_type=service.metrics.content_type)

    @app.post("/api/generate")
    async def generate(http: HttpRequest) -> Response:
        try:
            request = parse(await http.body(), defaults, service)
            result = await asyncio.wrap_future(service.submit(request, client=str(uuid4())))
        except Refused as refused:
            return _error(STATUS.get(type(refused), 500), str(refused))
        return Response(png.encode(result.images[0], result.settings[0]), media_type="image/png")

    page = layout.build(service, defaults)
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        blocked_paths=["/"],
        theme=layout.theme(),
        css=layout.css(),
        head=layout.head(),
    )
    return app


def parse(body: bytes, defaults: layout.Defaults, service: Service) -> Request:
    """Return the request for one image that a JSON object describes; what is left out has the page's defaults.

    Raises InvalidRequest for anything else.
    """
    try:
        given: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(
            f'the body is not JSON ({error}); send an object such as {{"prompt": "a circle"}}'
        ) from error
    if not isinstance(given, dict):
        raise InvalidRequest(f'the body is a {type(given).__name__}; send an object such as {{"prompt": "a circle"}}')
    if unknown := [name for name in given if name not in FIELDS]:
        raise InvalidRequest(f"{unknown[0]!r} is not supported; use {', '.join(FIELDS)}")
    if "prompt" not in given:
        raise InvalidRequest('prompt is missing; send an object such as {"prompt": "a circle"}')
    height, width = (
        given.pop(name, side) for name, side in zip(("height", "width"), service.limits.sizes[0], strict=True)
    )
    values = {
        "num_inference_steps": defaults.num_inference_steps,
        "guidance_scale": defaults.guidance_scale,
        "sampler": service.samplers[0],
    }
    return Request(**values | given, size=(height, width))


async def _when_warm(service: Service, on_warm) -> None:
    await asyncio.to_thread(service.warm.wait)
    on_warm()


class Server(uvicorn.Server):
    """uvicorn, which tells the service first that it shuts down, so that waiting clients get an answer."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets=None) -> None:
        self._service.stop()
        await super().shutdown(sockets)


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound. Raises OSError with the remedy."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise OSError(
            f"--host={host} --port={port} cannot be listened on ({error.strerror}); use another --port"
        ) from None
    return bound


def serve(service: Service, defaults: layout.Defaults, bound: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C: the image that is being generated is finished, queued requests get an error.

    Prints the address when the service is warm. Raises the error of the warm-up, if it fails.
    """
    host, port = bound.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host

    def on_warm() -> None:
        if service.state == "ready":
            print(f"ready: http://{host}:{port}")
        elif service.error is not None:
            server.should_exit = True

    app = make_app(service, defaults, on_warm)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=60, ws="none")
    server = Server(config, service)
    # uvicorn raises the signal again when it is done, for whoever has handled it before: to be stopped is no failure.
    signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        server.run(sockets=[bound])
    finally:
        service.stop()
        service.join()
    if service.error is not None:
        raise service.error
