"""PEFT's settings of a LoRA, from adapter_config.json beside it or from the metadata of its file.

They hold what the tensors do not: alpha, by which an update counts alpha / rank, or alpha / sqrt(rank) with rsLoRA.
Every setting has its line here: it is used, or has one value that is supported, or changes nothing in the weights.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.layout import shown

FILE = "adapter_config.json"  # and the key under which its content stands among the metadata of a LoRA
METADATA = (
    "lora_adapter_metadata"  # diffusers' name among a file's metadata: JSON, keys with the component's name first
)
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")

Number = lambda value: type(value) in (int, float) and abs(value) <= 1e9  # noqa: E731
# setting -> (what it must be, the same in words)
USED = {
    "r": (lambda value: type(value) is int and 1 <= value <= 2**16, "an integer from 1"),
    "lora_alpha": (Number, "a number"),
    "use_rslora": (lambda value: value in (None, False, True), "true or false"),
    "rank_pattern": (
        lambda value: value is None or type(value) is dict and all(USED["r"][0](each) for each in value.values()),
        "an object of integers from 1",
    ),
    "alpha_pattern": (
        lambda value: value is None or type(value) is dict and all(map(Number, value.values())),
        "an object of numbers",
    ),
}
# Settings that would change the weights in another way than by up down.
FIXED: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
# Of training, of other adapters, or given by the tensors themselves.
HARMLESS = frozenset(
    """
    task_type auto_mapping peft_version base_model_name_or_path revision inference_mode target_modules exclude_modules
    lora_dropout layers_to_transform layers_pattern megatron_core eva_config qalora_group_size ensure_weight_tying
    runtime_config
    """.split()
)
# A module's name, with at most one wildcard: the patterns of a file that is not trusted must not take forever to match.
PATTERN = re.compile(r"(?:\w|\\?\.(?!\*)|[$^|()-])*(?:(?:\.\*|\\d\+)(?:\w|\\?\.(?!\*)|[$^|()-])*)?")

Settings = dict[str, Any]


def read_settings(metadata: Mapping[str, str], where: str) -> dict[str, Settings]:
    """Return the settings by component, those of adapter_config.json under "", from a LoRA's metadata.

    where: the file, for errors. Raises ModelError for settings that are not supported, and JSON that is not PEFT's.
    """
    found: dict[str, Settings] = {}
    for key in (FILE, METADATA):
        if (text := metadata.get(key)) is None:
            continue
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{where}: {key} is not valid JSON ({error}): copy the file again") from None
        if not isinstance(content, dict):
            raise ModelError(f"{where}: {key} contains {shown(content)}, not a JSON object: copy the file again")
        if key == FILE:
            found[""] = content
            continue
        for name, value in content.items():
            component, _, setting = name.partition(".")
            if component in COMPONENTS:
                found.setdefault(component, {})[setting] = value
    for component, settings in found.items():
        check(settings, f"{where}: {component or FILE}")
    return found


def check(settings: Settings, where: str) -> None:
    """Raise ModelError for a setting that is missing, or whose value is not supported."""
    for name in ("r", "lora_alpha"):
        if name not in settings:
            raise ModelError(f"{where} has no {name}: copy the file again")
    for name, value in settings.items():
        wanted = None
        if name in USED:
            is_valid, wanted = USED[name]
            wanted = None if is_valid(value) else f"it must be {wanted}"
        elif name in FIXED:
            same = any(type(value) is type(one) and value == one for one in FIXED[name])
            wanted = None if same or value is None else f"only {' or '.join(map(str, FIXED[name]))} is"
        elif name not in HARMLESS and value not in (None, False, [], {}):
            wanted = "merge the LoRA with the tool that made it"
        if wanted:
            raise ModelError(
                f"{where}: {name if name.isidentifier() else shown(name)}={shown(value)} is not supported; {wanted}"
            )
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in settings.get(name) or {}:
            compiled(pattern, f"{where}: {name}")


def compiled(pattern: str, where: str) -> re.Pattern:
    """PEFT's rule: the pattern matches the end of a module's name, from a dot on."""
    try:
        if not PATTERN.fullmatch(pattern):
            raise ValueError
        return re.compile(rf"(.*\.)?({pattern})$")
    except (ValueError, re.error):
        raise ModelError(
            f"{where} has the pattern {shown(pattern)}, which is not supported; use modules' names, with at most one .*"
        ) from None


class Strengths:
    """Alphas of modules by one component's settings."""

    def __init__(self, settings: Settings, where: str):
        self.settings, self.where = settings, where
        self.patterns = {
            name: [(compiled(pattern, where), value) for pattern, value in (settings.get(name) or {}).items()]
            for name in ("rank_pattern", "alpha_pattern")
        }

    def value(self, name: str, module: str) -> Any:
        """Return the value of the first pattern that matches the module; text encoders have had two forms of names."""
        for pattern, value in self.patterns[name]:
            if pattern.match(module) or pattern.match(module.removeprefix("text_model.")):
                return value
        return self.settings[{"rank_pattern": "r", "alpha_pattern": "lora_alpha"}[name]]

    def alpha(self, module: str, rank: int) -> float:
        """Return the alpha for which alpha / rank is the update's weight. Raises ModelError for another rank."""
        if (stated := self.value("rank_pattern", module)) != rank:
            raise ModelError(
                f"{self.where} states rank {stated} for {module}, its tensors have {rank}; use the settings that "
                "belong to this file"
            )
        alpha = self.value("alpha_pattern", module)
        return alpha * math.sqrt(rank) if self.settings.get("use_rslora") else alpha
