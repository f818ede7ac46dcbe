"""How a model is sampled if the caller does not say: sampler, steps and guidance scale, stored beside the weights.

A diffusers folder has them in preset.json, which diffusers ignores, a safetensors file among its metadata, an orbax
model in configs.json. A run's follow from its config.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from lcm_jax.diffusion.samplers import CONSISTENCY_SCHEDULERS, SAMPLERS
from lcm_jax.ranges import GUIDANCE, STEPS
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.layout import read_json, shown
from lcm_jax.weights.scheduler import is_consistency_model, is_turbo

FILE = "preset.json"
METADATA = "lcm_jax.preset"  # key among the metadata of a safetensors file; the value is the content of FILE
FEW_STEPS, MANY_STEPS = 4, 50


@dataclass(frozen=True)
class Preset:
    """Settings that a model is sampled with by default.

    sampler: a name in SAMPLERS; None is the sampler of the model's scheduler. guidance_scale: in diffusers' convention,
    w + 1. guidance_range: the lowest and the highest guidance scale that the model was distilled for; None for a model
    that was not, or if they are unknown. Raises ValueError that names a setting, its value and the allowed ones.
    """

    sampler: str | None
    num_inference_steps: int
    guidance_scale: float
    guidance_range: tuple[float, float] | None = None

    def __post_init__(self):
        if self.sampler is not None and not (isinstance(self.sampler, str) and self.sampler in SAMPLERS):
            raise ValueError(f"sampler={shown(self.sampler)} is not supported; use one of {', '.join(SAMPLERS)}")
        for name, allowed in (("num_inference_steps", STEPS), ("guidance_scale", GUIDANCE)):
            if not allowed.has(value := getattr(self, name)):
                raise ValueError(f"{name}={shown(value)} is not supported; use {allowed}")
        if (bounds := self.guidance_range) is None:
            return
        numbers = isinstance(bounds, tuple) and len(bounds) == 2 and all(map(GUIDANCE.has, bounds))
        if not numbers or bounds[0] > bounds[1]:
            raise ValueError(f"guidance_range={shown(bounds)} is not supported; use two numbers of 1 or more, in order")
        if not bounds[0] <= self.guidance_scale <= bounds[1]:
            raise ValueError(
                f"guidance_scale={self.guidance_scale:g} is outside guidance_range={shown(bounds)}; use a number in it"
            )

    def __str__(self) -> str:
        sampler = "the scheduler's sampler" if self.sampler is None else f"sampler {self.sampler}"
        steps = f"{self.num_inference_steps} step{'s' * (self.num_inference_steps > 1)}"
        bounds = "" if self.guidance_range is None else " ({:g} to {:g})".format(*self.guidance_range)
        return f"{sampler}, {steps}, guidance scale {self.guidance_scale:g}{bounds}"

    @classmethod
    def from_json(cls, content: Any, where: str) -> Self:
        """Return the preset of a JSON value. Raises ModelError, which begins with `where`, for any other value."""
        if not isinstance(content, dict):
            raise ModelError(f"{where} contains {shown(content)}, not a preset; remove it, or write the model again")
        fields = {field.name: field.default for field in dataclasses.fields(cls)}
        for name, default in fields.items():
            if name not in content and default is dataclasses.MISSING:
                raise ModelError(f"{where} has no {name}; add it, or remove the preset")
        if unknown := [name for name in content if name not in fields]:
            raise ModelError(f"{where}: {shown(unknown[0])} is not a setting of a preset; use {', '.join(fields)}")
        settings: dict[str, Any] = dict(content)
        if isinstance(bounds := settings.get("guidance_range"), list):
            settings["guidance_range"] = tuple(bounds)
        try:
            return cls(**settings)
        except ValueError as error:
            raise ModelError(f"{where}: {error}") from None

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Self | None:
        """Return the preset among the metadata of a safetensors file, or None if there is none. Raises ModelError."""
        if (text := metadata.get(METADATA)) is None:
            return None
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ModelError(f"metadata {METADATA} is not valid JSON ({error}); copy the file again") from None
        return cls.from_json(content, f"metadata {METADATA}")

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of the preset, the inverse of `from_json`."""
        return dataclasses.asdict(self)

    def to_metadata(self) -> dict[str, str]:
        """Return the preset as metadata of a safetensors file, the inverse of `from_metadata`."""
        return {METADATA: json.dumps(self.to_json(), sort_keys=True)}


def read_preset(folder: Path) -> Preset | None:
    """Return the preset of a diffusers folder, or None if it has none. Raises ModelError."""
    path = folder / FILE
    return Preset.from_json(read_json(path), str(path)) if path.exists() else None


def default_preset(configs: Mapping[str, Mapping[str, Any]]) -> Preset:
    """Return the preset of a model that has none stored, by its kind. configs: by component.

    An LCM takes few steps, at guidance scale 8 if that is an input of its UNet, else at 1, as do Turbo models. Any
    other model has diffusers' defaults: 50 steps, and guidance scale 5 for SDXL or 7.5.
    """
    if is_consistency_model(configs):
        guided = configs["unet"].get("time_cond_proj_dim") is not None
        own = configs["scheduler"].get("_class_name") in CONSISTENCY_SCHEDULERS
        return Preset(None if own else "lcm", FEW_STEPS, 8.0 if guided else 1.0)
    if is_turbo(configs):
        return Preset(None, 1, 1.0)
    return Preset(None, MANY_STEPS, 5.0 if "text_encoder_2" in configs else 7.5)


def run_preset(config: Mapping[str, Any], guided: bool, before: Preset | None) -> Preset | None:
    """Return the preset of the model that a run trains.

    config: of the run, a plain dict with checked values. guided: the model has an input for the guidance weight.
    before: the preset of the model that the run began from. An LCM takes the steps of its previews that are nearest to
    4, at their guidance scale, or the nearest one that it is distilled for. Fine-tuning keeps `before`. Raises
    ValueError.
    """
    objective, sample = config["objective"], config.get("sample") or {}
    if objective["name"] == "diffusion" and not config.get("teacher") and "steps" in sample:
        return Preset(None, sample["steps"], sample["guidance_scale"])
    if objective["name"] not in ("lcd", "lcf"):
        return before
    steps = min(sample.get("student_steps") or (FEW_STEPS,), key=lambda n: abs(n - FEW_STEPS))
    if not guided:
        return Preset("lcm", steps, 1.0)
    low, high = (objective[name] + 1.0 if name in objective else None for name in ("w_min", "w_max"))
    scale = sample.get("guidance_scale", 8.0)
    if low is None or high is None:
        return Preset("lcm", steps, scale)
    return Preset("lcm", steps, min(max(scale, low), high), (low, high))


def adapter_preset(config: Mapping[str, Any]) -> Preset | None:
    """Return the preset of a model with the adapters that a run trains, or None if they leave it as it is.

    config: as in `run_preset`. Distilled adapters make an LCM, without an input for the guidance weight, of any model
    of their family; all others belong to a model that has a preset of its own. Raises ValueError.
    """
    return run_preset(config, False, None) if config["objective"]["name"] == "lcd" else None
