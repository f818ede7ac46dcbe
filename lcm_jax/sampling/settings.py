"""All that an image was generated from, as one record: JSON to repeat it, checked field by field when it is read."""

import dataclasses
import hashlib
import json
import math
import reprlib
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

MAX_BATCH = 4096  # rows of a batch in a file, which nobody has written by hand


class SettingsError(ValueError):
    """Settings that cannot be read: a damaged or a foreign file, or JSON that has other fields."""


@dataclass(frozen=True)
class File:
    """A file that was used. path: as it was given. sha256: of its bytes, in hexadecimal, or the first digits of it."""

    path: str
    sha256: str | None = None

    @classmethod
    def of(cls, path: str | Path, place: Path | None = None) -> "File":
        """Return `path` with the digest of the file there, or at `place`. Raises OSError."""
        with open(path if place is None else place, "rb") as stream:
            return cls(str(path), hashlib.file_digest(stream, "sha256").hexdigest())


@dataclass(frozen=True)
class Lora:
    """A LoRA that was applied, at its weight."""

    file: File
    weight: float = 1.0


@dataclass(frozen=True)
class Control:
    """A ControlNet, the image that it followed, and the scale of what it adds.

    model: as it was given. fingerprint: of the model, as `lcm_jax.weights.model.fingerprint` returns it.
    """

    model: str
    image: File
    scale: float = 1.0
    fingerprint: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Control":
        """Return MODEL:IMAGE or MODEL:IMAGE:SCALE. Raises ValueError, and OSError for the image."""
        model, *parts = text.split(":")
        try:
            scale = float(parts[1]) if len(parts) == 2 else 1.0
        except ValueError:
            scale = math.nan
        if not model or len(parts) not in (1, 2) or not parts[0] or not math.isfinite(scale):
            raise ValueError(f"control {text!r} is not supported; use MODEL:IMAGE, or MODEL:IMAGE:SCALE with a number")
        return cls(model, File.of(parts[0]), scale)


@dataclass(frozen=True)
class Settings:
    """Settings of one image; None for what its file does not record, or what was not used.

    The arguments of `Pipeline` have its names. number: image number of the seed, `first + i` of a call. row: place of
    the image in its batch, which has batch_size rows: a device may round differently in another. model, base, variant,
    vae: as they were given. fingerprint: of the model, as `lcm_jax.weights.model.fingerprint` returns it.
    """

    prompt: str
    negative_prompt: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    prompt_weights: bool = False
    clip_skip: int | None = None
    eta: float | None = None
    strength: float | None = None
    padding_mask_crop: int | None = None
    image: File | None = None
    mask_image: File | None = None
    controls: tuple[Control, ...] = ()
    loras: tuple[Lora, ...] = ()
    number: int = 0
    row: int = 0
    batch_size: int = 1
    model: str | None = None
    base: str | None = None
    variant: str | None = None
    vae: str | None = None
    vae_tiling: bool = False
    dtype: str | None = None
    fingerprint: str | None = None
    device: str | None = None
    jax: str | None = None
    version: str | None = None

    def to_json(self) -> str:
        """Return the settings as JSON in ASCII; fields at their defaults are left out."""
        default = Settings("")
        fields = {name: value for name, value in dataclasses.asdict(self).items() if value != getattr(default, name)}
        return json.dumps({"prompt": self.prompt} | fields, allow_nan=False)


def from_json(text: str) -> Settings:
    """Return the settings of a JSON text. Raises SettingsError that names a field that is unknown or wrong."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"the settings are not valid JSON ({str(error)[:100]}); use another file") from None
    settings = _read("settings", value, Settings)
    if not 0 <= settings.row < settings.batch_size <= MAX_BATCH or settings.number < settings.row:
        raise SettingsError(
            f"number, row and batch_size are {settings.number}, {settings.row} and {settings.batch_size}, which is not "
            "possible; use another file"
        )
    return settings


def differences(before: Settings, after: Settings) -> list[str]:
    """Return a text for each field in which the two differ, such as "seed is 5, was 0"."""
    pairs = {field.name: (getattr(before, field.name), getattr(after, field.name)) for field in _fields(Settings)}
    return [f"{name} is {_show(new)}, was {_show(old)}" for name, (old, new) in pairs.items() if old != new]


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_show, value))}]"
    if dataclasses.is_dataclass(value):
        return " ".join(_show(getattr(value, field.name)) for field in _fields(value))
    return reprlib.repr(value)


def _fields(kind: Any) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(kind)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _read(name: str, value: Any, kind: Any) -> Any:
    """Return a JSON value as `kind`: a dataclass, a tuple of one kind, a kind or None, or str, bool, int or float."""
    if get_origin(kind) in (Union, types.UnionType):
        return None if value is None else _read(name, value, get_args(kind)[0])
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_read(f"{name}[{i}]", each, get_args(kind)[0]) for i, each in enumerate(value))
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _read_fields(name, value, kind)
    if kind is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise SettingsError(f"{name} is {reprlib.repr(value)}, not {_name(kind)}; use another file")
    return value


def _read_fields(name: str, value: dict[str, Any], kind: Any) -> Any:
    hints = get_type_hints(kind)
    if unknown := sorted(value.keys() - hints.keys()):
        raise SettingsError(
            f"{name} has the unknown field {reprlib.repr(unknown[0])}; use the version of lcm_jax that wrote it"
        )
    if missing := [field.name for field in _fields(kind) if _is_required(field) and field.name not in value]:
        raise SettingsError(f"{name} has no {missing[0]}; use another file")
    return kind(**{key: _read(f"{name}.{key}", each, hints[key]) for key, each in value.items()})


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING


def _name(kind: Any) -> str:
    names = {str: "a string", int: "an integer", float: "a finite number", bool: "true or false"}
    return names.get(kind, "a list" if get_origin(kind) is tuple else "an object")
