"""What a visitor uploads: only undamaged images of three formats and a bounded size are decoded."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from lcm_jax.page import uploads
from lcm_jax.page.uploads import UploadError, decode_data_url, open_upload


def encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def bomb(width, height):
    """A PNG of a few bytes that unpacks to width x height pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_three_formats_are_opened(format):
    image = open_upload(encode(Image.new("RGB", (6, 4), "red"), format))
    assert image.mode == "RGB" and image.size == (6, 4) and np.asarray(image)[0, 0, 0] > 240


def test_orientation_and_transparency_are_what_a_person_sees():
    exif = Image.Exif()
    exif[274] = 6
    assert open_upload(encode(Image.new("RGB", (6, 4)), "JPEG", exif=exif)).size == (4, 6)
    assert open_upload(encode(Image.new("RGBA", (2, 2), (0, 0, 0, 0)))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    "data, message",
    [
        (encode(Image.new("RGB", (4, 4)), "GIF"), "format is unknown"),
        (encode(Image.new("RGB", (4, 4)), "BMP"), "format is unknown"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "format is unknown"),
        (b"", "format is unknown"),
        (encode(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)))[:-500], "truncated"),
        (bomb(60_000, 60_000), "decompression bomb"),
        (bomb(5_000, 5_000), "5000 x 5000 pixels are more than 16777216"),
        (b"\0" * (uploads.MAX_BYTES + 1), "8388609 bytes; use at most 8388608"),
    ],
)
def test_anything_else_is_refused_with_a_remedy(data, message):
    with pytest.raises(UploadError, match=message) as error:
        open_upload(data)
    assert "; use " in str(error.value) and "\n" not in str(error.value)


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UploadError):
        open_upload(bomb(5_000, 5_000))


def test_data_urls():
    data = encode(Image.new("RGB", (4, 4)))
    assert decode_data_url("data:image/png;base64," + base64.b64encode(data).decode()) == data
    for bad in ("/etc/passwd", "file:///etc/passwd", "http://127.0.0.1/", None, 5, ["data:"], {"path": "/etc/passwd"}):
        with pytest.raises(UploadError, match="not a data URL"):
            decode_data_url(bad)
    for bad in ("data:image/png;base64,@@@@", "data:image/png;base64,AAA", "data:text/plain,hello", "data:"):
        with pytest.raises(UploadError, match="not valid base64"):
            decode_data_url(bad)
    with pytest.raises(UploadError, match="more than 8 MiB"):
        decode_data_url("data:image/png;base64," + "A" * 12_000_000)
