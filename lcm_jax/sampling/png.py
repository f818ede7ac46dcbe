"""PNG files with the settings of their image: A1111's text for other programs, and JSON to repeat it."""

import io
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lcm_jax.data.images import open_upright
from lcm_jax.files import whole_file
from lcm_jax.sampling.infotext import from_text, to_text
from lcm_jax.sampling.settings import Settings, SettingsError, differences, from_json

SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEXT, JSON = "parameters", "lcm_jax"  # keywords of the two texts
MAX_BYTES = 2**20  # of one text, as stored and unpacked: a small file can unpack to more than the memory holds


def encode(image: Image.Image, settings: Settings | None = None) -> bytes:
    """Return the bytes of a PNG with its settings, if any."""
    info = PngInfo()
    if settings is not None:
        info.add_text(TEXT, to_text(settings))
        info.add_text(JSON, settings.to_json())
    buffer = io.BytesIO()
    image.save(buffer, format="png", pnginfo=info)
    return buffer.getvalue()


def write(image: Image.Image, path: Path, settings: Settings | None = None) -> None:
    """Write a PNG with its settings, if any, whole or not at all. The folder must exist. Raises OSError."""
    with whole_file(path) as temporary:
        Path(temporary).write_bytes(encode(image, settings))


def read(file: str | Path | BinaryIO) -> Settings:
    """Return the settings of a PNG: from its JSON, or from A1111's text. Its pixels are not decoded.

    Raises SettingsError, which begins with the path if `file` is one, if it is not an undamaged PNG or its settings are
    missing or wrong, and OSError if it cannot be opened.
    """
    if not isinstance(file, str | Path):
        return _settings(_texts(file))
    with open(file, "rb") as stream:
        try:
            return _settings(_texts(stream))
        except SettingsError as error:
            raise SettingsError(f"{file}: {error}") from None


def compare(file: str | Path, settings: Settings, image: Image.Image) -> tuple[bool, str]:
    """Return True if an image with these settings is that of a PNG, and a text that says so or why not.

    Raises SettingsError as `read` does, and ImageError for damaged pixels.
    """
    recorded = read(file)
    if recorded.version is None:
        return False, f"{file} was made by another program; the image will differ"
    if changed := differences(recorded, settings):
        return False, f"the image may differ from {file}: {'; '.join(changed)}"
    if open_upright(file, ("PNG",), image.width * image.height).tobytes() == image.tobytes():
        return True, f"identical to {file}"
    return False, (
        f"the image differs from {file}, whose settings are the same; its pixels were changed, or this machine "
        "computes differently"
    )


def _settings(texts: dict[str, str]) -> Settings:
    if JSON in texts:
        return from_json(texts[JSON])
    if TEXT in texts:
        return from_text(texts[TEXT])
    raise SettingsError("the file has no settings; use a PNG of lcm_jax or A1111 that no other program has changed")


def _texts(stream: BinaryIO) -> dict[str, str]:
    """Return the texts of the two keywords, each the first of its name."""
    if stream.read(len(SIGNATURE)) != SIGNATURE:
        raise SettingsError("the file is not a PNG; use one of lcm_jax or A1111")
    texts: dict[str, str] = {}
    while True:
        header = stream.read(8)
        if len(header) < 8:
            raise SettingsError("the PNG is truncated; copy it again")
        length, kind = struct.unpack(">I4s", header)
        if kind == b"IEND":
            return texts
        if kind not in (b"tEXt", b"zTXt", b"iTXt"):
            stream.seek(length + 4, 1)
            continue
        if length > MAX_BYTES:
            raise SettingsError(f"a text of the PNG has {length} bytes, more than {MAX_BYTES}; use another file")
        data, checksum = stream.read(length), stream.read(4)
        if len(data) < length or checksum != struct.pack(">I", zlib.crc32(kind + data)):
            raise SettingsError("a text of the PNG is damaged; copy the file again")
        keyword, _, rest = data.partition(b"\0")
        name = keyword.decode("latin-1")
        if name in (TEXT, JSON) and name not in texts:
            texts[name] = _decode(kind, rest)


def _decode(kind: bytes, rest: bytes) -> str:
    """Return the text of a chunk. rest: what follows the keyword and its NUL."""
    if kind == b"tEXt":
        return rest.decode("latin-1")
    if kind == b"zTXt":
        return _unpack(rest[1:]).decode("latin-1")
    compressed, rest = rest[:1] == b"\1", rest[2:]
    text = rest.split(b"\0", 2)[-1]  # after a language and a translated keyword
    try:
        return (_unpack(text) if compressed else text).decode()
    except UnicodeDecodeError as error:
        raise SettingsError(f"a text of the PNG is not UTF-8 ({error.reason}); use another file") from None


def _unpack(data: bytes) -> bytes:
    unpacker = zlib.decompressobj()
    try:
        unpacked = unpacker.decompress(data, MAX_BYTES + 1)
    except zlib.error as error:
        raise SettingsError(f"a text of the PNG cannot be unpacked ({error}); copy the file again") from None
    if len(unpacked) > MAX_BYTES:
        raise SettingsError(f"a text of the PNG unpacks to more than {MAX_BYTES} bytes; use another file")
    if not unpacker.eof:
        raise SettingsError("a text of the PNG is truncated; copy the file again")
    return unpacked
