"""Text of files, whatever editor wrote them: UTF-8, or what a byte order mark says."""

import codecs

# Longer marks first: UTF-32's begins with UTF-16's.
ENCODINGS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class TextError(ValueError):
    """Bytes or characters that are not text."""


def decode(data: bytes, name: str) -> str:
    """Return the text of `data` without its byte order mark. Raises TextError that begins with `name`."""
    encoding = next((encoding for mark, encoding in ENCODINGS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        label = encoding.removesuffix("-sig").upper()
        raise TextError(f"{name} is not {label} ({error.reason} at byte {error.start}); save it as UTF-8") from error
    if "\0" in text:
        raise TextError(f"{name} has NUL characters, as UTF-16 without a byte order mark does; save it as UTF-8")
    return text


def check_unicode(text: str, name: str) -> str:
    """Return `text`. Raises TextError that begins with `name` if it has lone surrogates, which no encoding has."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TextError(
            f"{name} is {text!r}, which is not valid Unicode at character {error.start}; use UTF-8 text"
        ) from error
    return text
