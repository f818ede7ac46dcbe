"""Images that a visitor sends, checked before they are decoded."""

import base64
import binascii
import io
import re

from PIL import Image

from lcm_jax.data.images import ImageError, open_upright, to_rgb

FORMATS = ("PNG", "JPEG", "WEBP")  # recognized by content, whatever the sender calls it
MAX_BYTES = 8 * 2**20
MAX_PIXELS = 2**24
DATA_URL = re.compile(r"data:[\w/+.-]*;base64,([A-Za-z0-9+/]*={0,2})", re.ASCII)


class UploadError(ValueError):
    """An upload that is not accepted."""


def decode_data_url(url: str) -> bytes:
    """Return the bytes of a base64 data URL. Raises UploadError for any other text, and beyond MAX_BYTES."""
    if not isinstance(url, str) or not url.startswith("data:"):
        raise UploadError(f"the upload is not a data URL ({str(url)[:40]!r}); use data:image/png;base64,...")
    if len(url) > MAX_BYTES * 4 // 3 + 100:
        raise UploadError(f"the upload has more than {MAX_BYTES // 2**20} MiB; use a smaller file")
    found = DATA_URL.fullmatch(url)
    try:
        return base64.b64decode(found[1] if found else "?", validate=True)
    except binascii.Error as error:
        raise UploadError("the upload is not valid base64; use data:image/png;base64,...") from error


def open_upload(data: bytes) -> Image.Image:
    """Return an uploaded image in RGB, turned as its EXIF orientation says.

    Raises UploadError if it is not an undamaged PNG, JPEG or WebP file, has more than MAX_BYTES, or unpacks to more
    than MAX_PIXELS, which is checked before anything is decoded.
    """
    if len(data) > MAX_BYTES:
        raise UploadError(f"the upload has {len(data)} bytes; use at most {MAX_BYTES}")
    try:
        return to_rgb(open_upright(io.BytesIO(data), formats=FORMATS, max_pixels=MAX_PIXELS))
    except (ImageError, OSError) as error:
        raise UploadError(f"the upload cannot be used ({error}); use an undamaged PNG, JPEG or WebP image") from error
