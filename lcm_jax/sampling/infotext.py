"""A1111's text of settings, which most programs and sites read: written, and read from its files too.

The prompt; a line that begins with "Negative prompt: "; and a last line "Steps: 4, Sampler: LCM, ...", whose values are
JSON strings if they have commas, colons or newlines. LoRAs are tags in the prompt, `<lora:name:0.8>`. The text is for
others: a prompt of several lines with such beginnings cannot be told apart in it, and JSON has the settings beside it.
"""

import json
import math
import re
from pathlib import PurePath
from typing import Any

from lcm_jax.sampling.settings import File, Lora, Settings, SettingsError

NEGATIVE = "Negative prompt:"
SAMPLERS = {
    "lcm": "LCM",
    "ddim": "DDIM",
    "pndm": "PLMS",
    "euler": "Euler",
    "euler_karras": "Euler Karras",
    "euler_ancestral": "Euler a",
    "dpmsolver++": "DPM++ 2M",
    "dpmsolver++_karras": "DPM++ 2M Karras",
    "tcd": "TCD",
}
# Each is matched in time proportional to the text, whatever a hostile file has in it.
PAIR = re.compile(r'\s*(\w[\w \-/]*+):\s*("(?:\\.|[^"\\])*+"|[^,]*+)(?:,|$)')
TAG = re.compile(r"\s?<lora:([^:<>]+):([+-]?(?:[0-9]{1,9}(?:\.[0-9]{0,20})?|\.[0-9]{1,20}))>")
MARKUP = re.compile(r"[()\[\]\\]|\bBREAK\b")  # what weights are written with


def to_text(settings: Settings) -> str:
    """Return the settings as A1111 writes them; those that it has no name for are left out."""
    s = settings
    plain = not s.prompt_weights and MARKUP.search(f"{s.prompt} {s.negative_prompt or ''}")
    names = [_lora_name(lora) for lora in s.loras]
    hashes = [f"{name}: {lora.file.sha256[:10]}" for name, lora in zip(names, s.loras, strict=True) if lora.file.sha256]
    values = {
        "Steps": s.num_inference_steps,
        "Sampler": None if s.sampler is None else SAMPLERS.get(s.sampler, s.sampler),
        "CFG scale": None if s.guidance_scale is None else _plain(s.guidance_scale),
        "Seed": s.seed,
        "Size": None if s.width is None or s.height is None else f"{s.width}x{s.height}",
        "Model": None if s.model is None else _stem(s.model),
        "VAE": None if s.vae is None else _stem(s.vae),
        "Denoising strength": None if s.strength is None else _plain(s.strength),
        "Clip skip": None if not s.clip_skip else s.clip_skip + 1,  # A1111 counts the last layer that is used
        "Eta": None if s.eta is None else _plain(s.eta),
        "Emphasis": "None" if plain else None,  # A1111 reads brackets as weights unless told otherwise
        "Lora hashes": ", ".join(hashes) or None,
        "Version": None if s.version is None else f"lcm_jax {s.version}",
    }
    tags = [f"<lora:{name}:{_plain(lora.weight)}>" for name, lora in zip(names, s.loras, strict=True)]
    lines = [" ".join([s.prompt, *tags])]
    if s.negative_prompt:
        lines.append(f"{NEGATIVE} {s.negative_prompt}")
    lines.append(", ".join(f"{key}: {_quote(str(value))}" for key, value in values.items() if value is not None))
    return "\n".join(lines).replace("\0", "")


def from_text(text: str) -> Settings:
    """Return the settings in a text of A1111 or of a program that writes the same.

    A sampler that has no name here keeps the program's. Raises SettingsError if there is no line of settings, and for a
    value that is not what its name says.
    """
    lines = text.replace("\r\n", "\n").strip().split("\n")
    last = max((i for i, line in enumerate(lines) if re.match(r"\s*Steps: *[0-9]", line)), default=None)
    if last is None:
        raise SettingsError("the text has no line that begins with 'Steps: '; use an image with A1111's settings")
    values = _pairs(lines[last])
    begin = next((i for i, line in enumerate(lines[:last]) if line.startswith(NEGATIVE)), last)
    prompt = "\n".join(lines[:begin])
    negative = "\n".join(lines[begin:last]).removeprefix(NEGATIVE).strip() or None
    hashes = {}
    for each in values.get("lora hashes", "").split(","):
        name, _, digest = each.strip().partition(": ")
        hashes[name] = digest or None
    loras = tuple(Lora(File(name, hashes.get(name)), float(weight)) for name, weight in TAG.findall(prompt))
    prompt = TAG.sub("", prompt).strip()
    width, height = _size(values.get("size"))
    skip = _number(values, "clip skip", int)
    weighted = values.get("emphasis") != "None" and MARKUP.search(f"{prompt} {negative or ''}") is not None
    version = values.get("version", "")
    return Settings(
        prompt,
        negative,
        num_inference_steps=_number(values, "steps", int),
        guidance_scale=_number(values, "cfg scale", float),
        sampler=_sampler(values.get("sampler"), values.get("schedule type")),
        seed=_number(values, "seed", int),
        width=width,
        height=height,
        prompt_weights=weighted,
        clip_skip=None if skip is None or skip < 2 else skip - 1,
        eta=_number(values, "eta", float),
        # Beside an upscaler it is the strength of the second pass, which there is none of here.
        strength=None if "hires upscale" in values else _number(values, "denoising strength", float),
        loras=loras,
        model=values.get("model"),
        vae=None if values.get("vae") in (None, "Automatic", "None") else values["vae"],
        version=version.removeprefix("lcm_jax ") if version.startswith("lcm_jax ") else None,
    )


def _pairs(line: str) -> dict[str, str]:
    """Return the values of a line of settings by lower-case name; what is not a pair is skipped up to its comma."""
    values, position = {}, 0
    while position < len(line):
        if match := PAIR.match(line, position):
            values[match[1].lower()] = _unquote(match[2].strip())
        end = match.end() if match else line.find(",", position) + 1
        position = end or len(line)
    return values


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else repr(number)


def _stem(path: str) -> str:
    """Return the name of a model without its folder and the suffix of a weight file."""
    name = PurePath(path).name
    return re.sub(r"\.(safetensors|ckpt|pt|pth|bin)$", "", name) or path


def _lora_name(lora: Lora) -> str:
    return re.sub("[:<>,\n]", "_", _stem(lora.file.path))


def _quote(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ",:\n") else value


def _unquote(value: str) -> str:
    if len(value) < 2 or value[0] != '"' or value[-1] != '"':
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value


def _sampler(name: str | None, schedule: str | None) -> str | None:
    """Return the sampler's name here; A1111 has written a schedule beside the sampler since its version 1.9."""
    if name is None:
        return None
    full = f"{name.removesuffix(' Karras')} Karras" if schedule == "Karras" else name
    return next((ours for ours, theirs in SAMPLERS.items() if theirs.lower() == full.lower()), full)


def _size(value: str | None) -> tuple[int | None, int | None]:
    if value is None:
        return None, None
    if not (match := re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", value)):
        raise SettingsError(f"Size is {value[:40]!r}, not width x height such as 512x512; use another file")
    return int(match[1]), int(match[2])


def _number(values: dict[str, str], key: str, kind: type) -> Any:
    """Return an int or a finite float, or None if the text has no such key."""
    if (value := values.get(key)) is None:
        return None
    try:
        number = kind(value if len(value) < 40 else "")
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        what = "an integer" if kind is int else "a number"
        raise SettingsError(f"{key.capitalize()} is {value[:40]!r}, not {what}; use another file")
    return number
