"""The page itself: controls that redraw when they change, images, the canvas, the gallery."""

import asyncio
import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.themes import Base, Soft

from lcm_jax.page import figures, uploads
from lcm_jax.page.requests import Refused, Request, Result, Superseded
from lcm_jax.page.service import Service, shown_name
from lcm_jax.sampling import png
from lcm_jax.sampling.settings import Settings

FOLDER = Path(__file__).parent
KEPT = ("num_inference_steps", "guidance_scale", "sampler", "seed", "strength")  # of the settings in a PNG
STRIP = (1, 2, 4, 8)
SEEDS = 9999  # on the slider; the number beside it and dropped images may be larger
TEACHER_QUIET_S, STRIP_QUIET_S = 0.7, 0.3  # what takes long waits until the visitor pauses
TICKET = "(...values) => [...values.slice(0, -1), window.lcmTicket()]"
# Ticket 0 is older than all: after an error nothing is redrawn, so that the message stays.
TICKET_IF_LAST = "(...values) => [...values.slice(0, -1), values.at(-1) ? window.lcmTicket() : 0]"
ANNOUNCE = "element.setAttribute('role', 'status'); element.setAttribute('aria-live', 'polite');"
SYSTEM_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
SYSTEM_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "monospace")


@dataclass(frozen=True)
class Defaults:
    """Values that the controls begin with."""

    prompt: str
    num_inference_steps: int
    guidance_scale: float
    strength: float = 0.6


def theme() -> Base:
    """Return the theme, whose fonts are the system's: nothing is fetched from another host."""
    soft = Soft(primary_hue="indigo", neutral_hue="slate", font=SYSTEM_FONTS, font_mono=SYSTEM_MONO)
    plain = {"background_fill": "transparent", "padding": "0", "text_weight": "600", "text_color": "*body_text_color"}
    labels = {f"block_title_{name}": value for name, value in plain.items()}
    dark = {f"block_title_{name}_dark": plain[name] for name in ("background_fill", "text_color")}
    return soft.set(**labels, **dark)


def css() -> str:
    return (FOLDER / "page.css").read_text()


def head() -> str:
    """Return what the page's <head> contains: its scripts, and the width of phones."""
    return f"<script>{(FOLDER / 'page.js').read_text()}</script>"


class Controls:
    """The inputs of the page, in the order in which events send their values; `build` places them."""

    def __init__(self, service: Service, defaults: Defaults):
        limits = service.limits
        sizes = [f"{height} x {width}" for height, width in limits.sizes]
        most = service.max_steps[service.samplers[0]]
        self.prompt = gr.Textbox(
            defaults.prompt,
            label="Prompt",
            placeholder="Describe an image",
            max_length=limits.max_prompt_chars,
            autofocus=True,
            lines=1,
            max_lines=4,
            render=False,
            elem_id="prompt",
        )
        hidden: dict[str, Any] = {"render": False}
        self.canvas = gr.HTML(
            "",
            html_template=figures.canvas(limits.sizes[0]),
            js_on_load="lcmCanvas(element, props, trigger, watch)",
            apply_default_css=False,
            elem_id="canvas",
            **hidden,
        )
        self.steps = gr.Slider(1, most, defaults.num_inference_steps, step=1, label="Steps", **hidden)
        self.guidance = gr.Slider(
            1, max(20, defaults.guidance_scale), defaults.guidance_scale, step=0.5, label="Guidance", **hidden
        )
        self.seed = gr.Slider(0, SEEDS, 0, step=1, label="Seed", **hidden)
        self.images = gr.Slider(
            1, max(limits.max_batch, 2), 1, step=1, label="Images", visible=limits.max_batch > 1, **hidden
        )
        self.sampler = gr.Dropdown(list(service.samplers), value=service.samplers[0], label="Sampler", **hidden)
        self.size = gr.Dropdown(sizes, value=sizes[0], label="Height x width", visible=len(sizes) > 1, **hidden)
        self.strength = gr.Slider(0.05, 1, defaults.strength, step=0.05, label="Drawing strength", **hidden)
        self.loras = {
            name: gr.Slider(-1, 2, weight, step=0.05, label=f"LoRA {name}", **hidden)
            for name, weight in service.pipe.lora_weights.items()
        }
        self.teacher = gr.Checkbox(
            service.teacher is not None, label="Teacher", visible=service.teacher is not None, **hidden
        )
        self.strip = gr.Checkbox(True, label="Steps strip", **hidden)
        self.ticket = gr.Number(0, visible=False, **hidden)
        self.restored = gr.Number(0, visible=False, **hidden)
        self.settings = [
            self.prompt,
            self.canvas,
            self.steps,
            self.guidance,
            self.seed,
            self.images,
            self.sampler,
            self.size,
            self.strength,
            *self.loras.values(),
        ]
        self.all = [*self.settings, self.teacher, self.strip, self.ticket]
        self._service = service

    def read(self, values: tuple) -> tuple[Request, bool, bool, float]:
        """Return the request of the values, whether teacher and strip are shown, and the ticket.

        Raises UploadError for a drawing that is not an image.
        """
        prompt, drawing, steps, guidance, seed, images, sampler, size, strength, *rest = values
        *weights, teacher, strip, ticket = rest
        image = uploads.open_upload(uploads.decode_data_url(drawing)) if drawing else None
        height, _, width = size.partition(" x ")
        request = Request(
            prompt=prompt or "",
            num_inference_steps=int(steps),
            guidance_scale=guidance,
            sampler=sampler,
            seed=int(seed),
            images=int(images),
            size=(int(height), int(width)),
            image=image,
            strength=strength,
            lora_weights=dict(zip(self.loras, weights, strict=True)),
        )
        return request, teacher, strip, ticket

    def show(self, settings: Settings) -> list[Any]:
        """Return the values of `settings` for the controls, an update each; what is not recorded stays.

        Raises InvalidRequest for a value that the controls cannot show.
        """
        limits, loras = self._service.limits, {lora.file.path: lora.weight for lora in settings.loras}
        known = {name: value for name in KEPT if (value := getattr(settings, name)) is not None}
        if "sampler" not in known:
            known["sampler"] = self._service.samplers[0]
        request = Request(settings.prompt, **{"num_inference_steps": 1, "guidance_scale": 1.0} | known)
        size = None
        if settings.height is not None and settings.width is not None:
            size = (settings.height, settings.width)
        request = replace(request, images=settings.number + 1, size=size, lora_weights=loras)
        self._service.check(request)

        def slide(name: str, most: float) -> Any:
            return gr.update(value=known[name], maximum=max(most, known[name])) if name in known else gr.skip()

        return [
            settings.prompt,
            "" if settings.strength is None else gr.skip(),
            slide("num_inference_steps", self._service.max_steps[request.sampler]),
            slide("guidance_scale", 20),
            slide("seed", SEEDS),
            gr.skip() if limits.max_batch == 1 else request.images,
            request.sampler,
            gr.skip() if size is None else f"{size[0]} x {size[1]}",
            gr.skip() if settings.strength is None else settings.strength,
            *(loras.get(name, 0.0) for name in self.loras),
        ]


class Events:
    """Handlers of the page's events; each returns values of its outputs."""

    def __init__(self, service: Service, controls: Controls):
        self._service, self._controls = service, controls

    async def draw(self, request: gr.Request, *values) -> tuple[Any, Any]:
        """Return the images and the status."""
        try:
            job, _, _, ticket = self._controls.read(values)
            result = await self._generate(job, f"{request.session_hash}/images", ticket)
        except Superseded:
            return gr.skip(), gr.skip()
        except (Refused, uploads.UploadError) as error:
            return gr.skip(), _status(str(error), wrong=True)
        steps = _count(job.num_inference_steps, "step")
        caption = f"{steps} · {_seconds(result.seconds)}"
        cards = [figures.figure(*each, caption) for each in zip(result.images, result.settings, strict=True)]
        kind = "result" if len(cards) == 1 else "batch"
        text = f"{_count(len(cards), 'image')} at {steps} in {_seconds(result.seconds)}"
        return figures.figures(cards, kind), _status(". ".join([text, *result.warnings]), wrong=bool(result.warnings))

    async def draw_teacher(self, request: gr.Request, *values) -> Any:
        """Return the teacher's image of the same prompt and seed."""
        try:
            job, shown, _, ticket = self._controls.read(values)
            if not shown or self._service.teacher is None:
                return gr.skip()
            steps, sampler = self._service.teacher_steps, self._service.teacher.sampler
            job = replace(job, num_inference_steps=steps, sampler=sampler, images=1, teacher=True, lora_weights={})
            result = await self._generate(job, f"{request.session_hash}/teacher", ticket, TEACHER_QUIET_S)
        except Superseded:
            return gr.skip()
        except (Refused, uploads.UploadError) as error:
            return figures.placeholder(str(error))
        caption = f"{_count(steps, 'step')} · {_seconds(result.seconds)}"
        return figures.figure(result.images[0], result.settings[0], caption)

    async def draw_strip(self, request: gr.Request, *values) -> Any:
        """Return the image at 1, 2, 4 and 8 steps."""
        try:
            job, _, shown, ticket = self._controls.read(values)
            if not shown:
                return gr.skip()
            steps = [each for each in STRIP if self._service.has_steps(replace(job, num_inference_steps=each))]
            requests = [replace(job, num_inference_steps=each, images=1) for each in steps]
            names = [f"{request.session_hash}/strip/{each}" for each in steps]
            jobs = [self._generate(*each, ticket, STRIP_QUIET_S) for each in zip(requests, names, strict=True)]
            results = await asyncio.gather(*jobs, return_exceptions=True)
        except uploads.UploadError:
            return gr.skip()  # `draw` reports it
        cards = []
        for each, result in zip(steps, results, strict=True):
            if isinstance(result, Superseded):
                return gr.skip()
            if isinstance(result, Refused):
                cards.append(figures.placeholder(str(result)))
            elif isinstance(result, BaseException):
                raise result
            else:
                caption = f"{_count(each, 'step')} · {_seconds(result.seconds)}"
                cards.append(figures.figure(result.images[0], result.settings[0], caption, compact=True))
        return figures.figures(cards, "strip")

    def restore(self, event: gr.EventData) -> list[Any]:
        """Return the controls' values from the settings in a PNG that was sent, the status, and 1; 0 for an error."""
        sent, nothing = event._data, [gr.skip() for _ in self._controls.settings]
        try:
            url = str(sent.get("png", "") if isinstance(sent, dict) else sent)
            settings = png.read(io.BytesIO(uploads.decode_data_url(url)))
            shown = self._controls.show(settings)
        except (Refused, ValueError) as error:  # UploadError, SettingsError
            return [*nothing, _status(f"The settings cannot be restored: {error}", wrong=True), 0]
        note = "Settings restored."
        if settings.strength is not None:
            note += " The image was generated from a drawing or photo, which its PNG does not contain."
        return [*shown, _status(note), 1]

    async def _generate(self, job: Request, client: str, ticket: float, quiet_s: float = 0.0) -> Result:
        return await asyncio.wrap_future(self._service.submit(job, client, ticket, quiet_s))


def build(service: Service, defaults: Defaults) -> gr.Blocks:
    """Return the page; no event of it goes through Gradio's own queue."""
    once: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    with gr.Blocks(title="lcm_jax", analytics_enabled=False, fill_width=True) as page:
        controls = Controls(service, defaults)
        events = Events(service, controls)
        plain: dict[str, Any] = {"apply_default_css": False}
        figure: dict[str, Any] = {"js_on_load": "lcmFigures(element)", **plain}
        gr.HTML(f"<h1>lcm_jax</h1> <p>{figures.escape(shown_name(service.pipe))}</p>", elem_id="title", **plain)
        controls.prompt.render()
        status = gr.HTML(_status("The first image is on its way."), elem_id="status", js_on_load=ANNOUNCE, **plain)
        with gr.Row(elem_id="main"):
            with gr.Column(scale=3, min_width=320):
                with gr.Row(elem_id="side-by-side"):
                    with gr.Column(min_width=140):
                        gr.HTML("<h2>Image</h2>", **plain)
                        image = gr.HTML(figures.placeholder(""), elem_id="image", **figure)
                    with gr.Column(min_width=140, visible=service.teacher is not None) as teacher_column:
                        gr.HTML("<h2>Teacher</h2>", **plain)
                        teacher = gr.HTML(figures.placeholder(""), elem_id="teacher", **figure)
                    with gr.Column(min_width=200, elem_id="drawing"):
                        gr.HTML("<h2>Drawing</h2>", **plain)
                        controls.canvas.render()
                with gr.Column() as strip_column:
                    gr.HTML("<h2>Steps</h2>", **plain)
                    strip = gr.HTML("", elem_id="strip", **figure)
            with gr.Column(scale=1, min_width=260, elem_id="controls"):
                for each in (controls.steps, controls.guidance, controls.seed):
                    each.render()
                new_seed = gr.Button("New seed", size="sm")
                for each in (controls.images, controls.sampler, controls.size, controls.strength):
                    each.render()
                for each in controls.loras.values():
                    each.render()
                with gr.Row():
                    controls.teacher.render()
                    controls.strip.render()
                controls.ticket.render()
                controls.restored.render()
                drop = gr.HTML(figures.DROP, js_on_load="lcmDrop(element, props, trigger)", elem_id="drop", **plain)
        gr.HTML("<h2>Gallery</h2>", **plain)
        gallery = gr.HTML(figures.GALLERY, js_on_load="lcmGallery(element, props, trigger)", elem_id="gallery", **plain)

        drawings = ((events.draw, [image, status]), (events.draw_teacher, teacher), (events.draw_strip, strip))
        # A text box reports `input` for keys alone, not for text that is pasted, dictated or filled in.
        others = [*controls.settings[1:], controls.teacher, controls.strip]
        changes = [controls.prompt.change, *(each.input for each in others)]
        restored = [
            event(events.restore, None, [*controls.settings, status, controls.restored], **once)
            for event in (drop.upload, gallery.click)
        ]
        reseeded = new_seed.click(
            None, None, controls.seed, js=f"() => Math.floor(Math.random() * {SEEDS + 1})", **once
        )
        for draw, outputs in drawings:
            options = {**once, "js": TICKET, "trigger_mode": "multiple"}
            gr.on([page.load, *changes], draw, controls.all, outputs, **options)
            reseeded.then(draw, controls.all, outputs, **options)
            for event in restored:
                event.then(draw, [*controls.all[:-1], controls.restored], outputs, **{**options, "js": TICKET_IF_LAST})
        controls.sampler.input(
            lambda sampler: gr.update(maximum=service.max_steps[sampler]), controls.sampler, controls.steps, **once
        )
        for box, column in ((controls.teacher, teacher_column), (controls.strip, strip_column)):
            box.input(lambda shown: gr.update(visible=shown), box, column, **once)
    return page


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _status(text: str, wrong: bool = False) -> str:
    return f'<p class="{"wrong" if wrong else ""}">{figures.escape(text)}</p>'
