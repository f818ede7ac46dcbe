"""The range of every number in a config, by its key, and what must hold between them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from lcm_jax.data.sources import SOURCES
from lcm_jax.diffusion.samplers import SAMPLERS
from lcm_jax.evaluation.metrics import check_metrics
from lcm_jax.pipeline import DTYPES


@dataclass(frozen=True)
class Range:
    """Finite numbers between two bounds, which are included; whole ones unless `real`.

    above, below: exclude the lower and the upper bound. multiple: of what. also: a value beside them. many: any number
    of them, in tuples of any depth. infinite: the upper bound may be infinity itself.
    """

    low: float = 1
    high: float = math.inf
    real: bool = False
    above: bool = False
    below: bool = False
    multiple: int = 1
    also: int | None = None
    many: bool = False
    infinite: bool = False

    def has(self, value: Any) -> bool:
        if self.many and isinstance(value, tuple | list):
            return all(map(self.has, value))
        if isinstance(value, bool) or not isinstance(value, int | float if self.real else int):
            return False
        if not (math.isfinite(value) or (self.infinite and value == math.inf)):
            return False
        low = value > self.low if self.above else value >= self.low
        high = value < self.high if self.below else value <= self.high
        return (low and high and (self.real or value % self.multiple == 0)) or value == self.also

    def __str__(self) -> str:
        noun = "number" if self.real else f"multiple of {self.multiple}" if self.multiple > 1 else "whole number"
        noun = f"{noun}s" if self.many else f"a {noun}"
        bounds = f"above {self.low}" if self.above else f"of at least {self.low}"
        if self.high < math.inf:
            bounds += f" and {'below' if self.below else 'at most'} {self.high}"
        return f"{noun} {bounds}" + ("" if self.also is None else f", or {self.also}")


POSITIVE = Range()
EVERY = Range(0)  # 0 is never; the last update is logged and saved in any case
STEPS = Range(1, 1000)
REAL = Range(0, real=True)
SHARE = Range(0, 1, real=True)
DECAY = Range(0, 1, real=True, below=True)
ABOVE_ZERO = Range(0, real=True, above=True)
MANY = Range(many=True)
MANY_STEPS = Range(1, 1000, many=True)

RANGES: Mapping[str, Range] = {
    "objective.num_ddim_steps": STEPS,
    "objective.w_min": REAL,
    "objective.w_max": REAL,
    "objective.w_caps": Range(0, real=True, many=True, infinite=True),
    "objective.huber_c": ABOVE_ZERO,
    "objective.own_share": SHARE,
    "objective.empty_prompts": SHARE,
    "objective.guidance_embedding_dim": Range(4, multiple=2),  # a sine and a cosine of two frequencies or more
    "objective.timestep_power": ABOVE_ZERO,
    "objective.kl_weight": REAL,
    "data.size": Range(8),
    "data.length": POSITIVE,
    "data.held_out": POSITIVE,
    "train.steps": POSITIVE,
    "train.batch_size": POSITIVE,
    "train.accumulate": POSITIVE,
    "train.seed": Range(0, 2**32 - 1),
    "train.ema_rate": DECAY,
    "optimizer.learning_rate": REAL,
    "optimizer.warmup_steps": Range(0),
    "optimizer.b1": DECAY,
    "optimizer.b2": DECAY,
    "optimizer.weight_decay": REAL,
    "optimizer.clip_norm": ABOVE_ZERO,
    "mesh.data": Range(1, also=-1),
    "mesh.fsdp": POSITIVE,
    "checkpoint.every_steps": EVERY,
    "checkpoint.keep": POSITIVE,
    "log.every_steps": EVERY,
    "sample.every_steps": EVERY,
    "sample.prompts": POSITIVE,
    "sample.batch_size": POSITIVE,
    "sample.guidance_scale": REAL,
    "sample.steps": STEPS,
    "sample.teacher_steps": STEPS,
    "sample.student_steps": MANY_STEPS,
    "sample.pictures": Range(2, 512, multiple=2),  # half of them in each pair of rows
    "report.prompts": POSITIVE,
    "report.batch_size": POSITIVE,
    "report.reference": Range(2),  # a covariance takes two
    "report.guidance_scale": REAL,
    "report.seed": Range(0, 2**31 - 1),
    "report.teacher.*": MANY_STEPS,
    "report.student.*": MANY_STEPS,
    "unet.block_out_channels": MANY,
    "unet.layers_per_block": MANY,
    "unet.attention_head_dim": MANY,
    "unet.norm_num_groups": POSITIVE,
    "text_encoder.hidden_size": POSITIVE,
    "text_encoder.intermediate_size": POSITIVE,
    "text_encoder.num_hidden_layers": POSITIVE,
    "text_encoder.num_attention_heads": POSITIVE,
    "text_encoder.max_position_embeddings": Range(3),  # where a prompt begins and ends, and a word
    "vae.block_out_channels": MANY,
    "vae.layers_per_block": POSITIVE,
    "vae.latent_channels": POSITIVE,
    "vae.norm_num_groups": POSITIVE,
}
GROUPS = ("objective", "data", "train", "optimizer", "mesh", "checkpoint", "log", "sample")  # of every run's config
CHOICES: Mapping[str, tuple] = {
    "data.source": tuple(SOURCES),
    "data.encode": ("cache", "step"),
    "train.dtype": DTYPES,
    "export.dtype": DTYPES,
    "train.remat": (False, True),
    "objective.zero_terminal_snr": (False, True),
    "vae.mid_block_add_attention": (False, True),
}


def check(config, groups: Sequence[str] = GROUPS) -> None:
    """Raise ValueError for a setting that is not supported; the text has its key, its value and the valid ones.

    config: a ConfigDict. groups: the keys at its top that it must have. Reads nothing else.
    """
    required = [*groups, *(["metrics"] if "report" in config else [])]
    if missing := [key for key in required if key not in config]:
        raise ValueError(f"the config has no {missing[0]}; copy it from a bundled config (--list_configs)")
    settings = dict(leaves(config.to_dict()))
    for key, value in settings.items():
        if (allowed := range_of(key)) is not None and not allowed.has(value):
            raise ValueError(f"{key} {value!r} is not supported; use {allowed}")
        choices = CHOICES.get(key)
        if choices and not (type(value) is type(choices[0]) and value in choices):
            raise ValueError(f"{key} {value!r} is not supported; use {' or '.join(map(str, choices))}")
    _check_pairs(settings)
    if "metrics" in config:
        check_metrics(config.metrics, config.data.source)


def _check_pairs(settings: Mapping[str, Any]) -> None:
    low, high = settings.get("objective.w_min"), settings.get("objective.w_max")
    if low is not None and high is not None and low > high:
        raise ValueError(f"objective.w_min {low} is above objective.w_max {high}; lower it")
    grid = settings.get("objective.num_ddim_steps")
    for key in ("sample.student_steps", "report.student.lcm"):
        most = max(settings.get(key, ()), default=0)
        if grid is not None and most > grid:
            raise ValueError(
                f"{key} has {most}, and a student samples in at most objective.num_ddim_steps = {grid} steps; "
                f"lower the one, or raise the other"
            )
    known = sorted(SAMPLERS)
    for who in ("teacher", "student"):
        plan = {key: steps for key, steps in settings.items() if key.startswith(f"report.{who}.")}
        for key in plan:
            if (name := key.split(".", 2)[2]) not in known:
                raise ValueError(f"{key} is not supported: there is no sampler {name!r}; use one of {', '.join(known)}")
        if plan and not any(plan.values()):
            raise ValueError(f"{', '.join(plan)} have no steps; use numbers such as (1, 2, 4)")


def range_of(key: str) -> Range | None:
    """Return the range of a config's key, or None if the table has none."""
    return next((allowed for pattern, allowed in RANGES.items() if fnmatchcase(key, pattern)), None)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every setting in a plain nested dict."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
