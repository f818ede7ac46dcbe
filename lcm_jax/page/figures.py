"""HTML of the page's images and tools. Whatever a visitor has typed is escaped."""

import base64
from html import escape

from PIL import Image

from lcm_jax.sampling import png
from lcm_jax.sampling.infotext import to_text
from lcm_jax.sampling.settings import Settings

SWATCHES = {
    "black": "#000000",
    "white": "#ffffff",
    "red": "#e02020",
    "orange": "#ff8c00",
    "yellow": "#ffd800",
    "green": "#20a040",
    "blue": "#2050e0",
    "purple": "#8030c0",
}


def figure(image: Image.Image, settings: Settings, caption: str, compact: bool = False) -> str:
    """Return a figure whose image is a PNG with its settings, as a data URL; compact: without buttons but Keep."""
    url = "data:image/png;base64," + base64.b64encode(png.encode(image, settings)).decode()
    name = f"seed{settings.seed}-{settings.number}-{settings.num_inference_steps}steps.png"
    pixelated = " pixelated" if max(image.size) < 256 else ""
    hidden = " compact" if compact else ""
    return (
        f'<figure class="card{hidden}" data-parameters="{escape(to_text(settings))}">'
        f'<img class="drawn{pixelated}" src="{url}" alt="{escape(settings.prompt or "image without a prompt")}" '
        f'width="{image.width}" height="{image.height}">'
        f'<figcaption>{escape(caption)}</figcaption><div class="actions">'
        '<button type="button" class="small" data-action="keep">Keep</button>'
        f'<a class="small" href="{url}" download="{name}">Download</a>'
        '<button type="button" class="small" data-action="copy">Copy settings</button>'
        "</div></figure>"
    )


def placeholder(text: str) -> str:
    """Return an empty card."""
    return f'<figure class="card"><div class="drawn empty">{escape(text)}</div></figure>'


def figures(cards: list[str], kind: str) -> str:
    """Return cards side by side; kind: a CSS class."""
    return f'<div class="cards {kind}">{"".join(cards)}</div>'


def canvas(size: tuple[int, int]) -> str:
    """Return the canvas and its tools; size: (height, width) of an image. It has at least 256 pixels a side."""
    scale = -(-256 // min(size))
    height, width = (side * scale for side in size)
    swatches = "".join(
        f'<button type="button" data-swatch="{value}" style="background:{value}" aria-label="{name}" '
        f'title="{name}"></button>'
        for name, value in SWATCHES.items()
    )
    return (
        '<figure class="card"><div class="drawing">'
        f'<canvas width="{width}" height="{height}" tabindex="0" role="img" class="drawn" '
        'aria-label="Canvas. Draw with the pointer, or move with the arrow keys and paint with Space."></canvas>'
        "<span data-marker></span></div>"
        f'<div class="tools" role="group" aria-label="Colors">{swatches}'
        f'<input type="color" data-color value="{SWATCHES["red"]}" aria-label="Any color" title="Any color"></div>'
        '<div class="tools"><label class="range">Brush <input type="range" data-brush min="2" max="40" value="14" '
        'aria-label="Brush size"></label>'
        '<button type="button" class="small" data-undo>Undo</button>'
        '<button type="button" class="small" data-clear>Clear</button>'
        '<label class="small file">Photo<input type="file" data-photo accept="image/png,image/jpeg,image/webp" '
        'aria-label="Photo to draw on"></label></div></figure>'
    )


DROP = (
    '<label class="drop">Drop a PNG from this page here, or choose one, to restore its settings'
    '<input type="file" accept="image/png" aria-label="PNG whose settings are restored"></label>'
)
GALLERY = (
    '<div class="cards gallery" role="group" aria-label="Gallery"></div>'
    '<p class="hint">Images that you keep appear here.</p>'
)
