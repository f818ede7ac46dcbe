"""PNG files in memory, with the settings of their image."""

import io

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lcm_jax.sampling import png
from lcm_jax.sampling.infotext import to_text
from lcm_jax.sampling.settings import Settings


def to_png(image: Image.Image, settings: Settings) -> bytes:
    """Return the bytes of a PNG with its settings."""
    info = PngInfo()
    info.add_text(png.TEXT, to_text(settings))
    info.add_text(png.JSON, settings.to_json())
    buffer = io.BytesIO()
    image.save(buffer, "png", pnginfo=info)
    return buffer.getvalue()


def read(data: bytes) -> Settings:
    """Return the settings of a PNG. Raises SettingsError."""
    return png.read(io.BytesIO(data))
