"""The range of every number in a config, by its key, and what must hold between them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from lcm_jax import config_files
from lcm_jax.data.shapes import STYLES
from lcm_jax.data.sources import SOURCES
from lcm_jax.diffusion.samplers import SAMPLERS
from lcm_jax.evaluation.metrics import check_metrics
from lcm_jax.evaluation.report import MODELS
from lcm_jax.models.remat import POLICIES
from lcm_jax.pipeline import DTYPES
from lcm_jax.ranges import (
    ABOVE_ZERO,
    DECAY,
    EVERY,
    FRACTION,
    GUIDANCE,
    MANY,
    MANY_STEPS,
    POSITIVE,
    REAL,
    STEPS,
    Range,
    check_setting,
)

RANGES: Mapping[str, Range] = {
    "objective.backward_simulation": FRACTION,
    "student.guidance_embedding_dim": Range(4, multiple=2),  # a sine and a cosine of two frequencies or more
    "data.size": Range(8),
    "data.length": POSITIVE,
    "data.held_out": POSITIVE,
    "data.repeats": POSITIVE,
    "data.images_per_prompt": Range(1, 9999),
    "data.real_size": Range(8, also=0),
    "data.buckets": Range(8, many=True),
    "data.max_skipped": FRACTION,
    "data.workers": Range(0, 256),
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
    "mesh.tensor": POSITIVE,
    "checkpoint.every_steps": EVERY,
    "checkpoint.every_minutes": REAL,
    "checkpoint.keep": POSITIVE,
    "checkpoint.keep_every": EVERY,
    "log.every_steps": EVERY,
    "sample.every_steps": EVERY,
    "sample.prompts": POSITIVE,
    "sample.scored_prompts": Range(2, also=0),  # a covariance takes two images
    "sample.batch_size": POSITIVE,
    "sample.guidance_scale": GUIDANCE,
    "sample.steps": STEPS,
    "sample.teacher_steps": STEPS,
    "sample.*_steps": MANY_STEPS,  # of every other model that previews sample from
    "sample.images": Range(2, 512, multiple=2),  # half of them in each pair of rows
    "report.prompts": Range(2),  # a covariance takes two images
    "report.batch_size": POSITIVE,
    "report.reference": Range(2),
    "report.guidance_scale": replace(GUIDANCE, also=0),  # 0, in an evaluation: of each model's preset
    "report.seed": Range(0, 2**31 - 1),
    "settings.max_overlap": FRACTION,
    **{f"report.{who}.*": MANY_STEPS for who in MODELS},
    "plan.*": MANY_STEPS,
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
    "data.style": tuple(STYLES),
    "data.encode": ("cache", "step"),
    "data.crop": ("center", "random"),
    "data.flip": (False, True),
    "mesh.frozen": ("sharded", "replicated"),
    "train.dtype": DTYPES,
    "export.dtype": DTYPES,
    "train.remat": tuple(POLICIES),
    "student.guidance_embedding_init": ("zero", "normal"),
    "vae.mid_block_add_attention": (False, True),
}


def check(config, groups: Sequence[str] = GROUPS, choices: Mapping[str, tuple] = CHOICES) -> None:
    """Raise ValueError for a setting that is not supported; the text has its key, its value and the valid ones.

    config: a ConfigDict. groups: the keys at its top that it must have. choices: by key, the valid values. Reads no
    file.
    """
    required = [*groups, *(["metrics"] if "report" in config else [])]
    if missing := [key for key in required if key not in config]:
        raise ValueError(f"the config has no {missing[0]}; copy it from a bundled config (--list_configs)")
    settings = dict(leaves(config.to_dict()))
    for key, value in settings.items():
        if (allowed := range_of(key) or choices.get(key)) is not None:
            check_setting(key, value, allowed)
    _check_pairs(settings)
    for who in MODELS:
        plan = config.get("report", {}).get(who)
        if plan is not None and not any(plan.to_dict().values()):
            raise ValueError(f"report.{who} has no steps; use numbers for a sampler, such as (1, 2, 4)")
    if "metrics" in config:
        check_metrics(config.metrics, config.data.source)


def alike(config) -> list:
    """Return the bundled configs of the same objective, those that train the same part of a model if there are any."""
    bundled = [config_files.load(name) for name, _ in config_files.bundled()]
    name = config.objective.name
    same = [each for each in bundled if each.get("objective", {}).get("name") == name]
    if name == "diffusion":  # with a teacher, it is fine-tuning
        same = [each for each in same if ("teacher" in each) == ("teacher" in config)]
    return [each for each in same if ("lora" in each) == ("lora" in config)] or same


def check_keys(config, examples: Sequence[Any]) -> None:
    """Raise ValueError for a key that the config lacks and all `examples`, bundled configs of its kind, have.

    The groups `objective` and `data` and the plans of a report are left out: their keys have defaults, depend on the
    source of the data, or may be absent.
    """
    keys = [{key for key, _ in leaves(each.to_dict())} for each in examples]
    required = set.intersection(*keys) if keys else set()
    free = ("objective.", "data.", *(f"report.{who}." for who in MODELS))
    present = {key for key, _ in leaves(config.to_dict())}
    if missing := sorted(key for key in required - present if not key.startswith(free)):
        raise ValueError(f"the config has no {missing[0]}; copy it from a bundled config (--list_configs)")


def _check_pairs(settings: Mapping[str, Any]) -> None:
    grid = settings.get("objective.num_ddim_steps")
    for key in ("sample.student_steps", "report.student.lcm"):
        longest = max(settings.get(key, ()), default=0)
        if grid is not None and longest > grid:
            raise ValueError(
                f"{key} has {longest}, and a student samples in at most objective.num_ddim_steps = {grid} steps; "
                f"lower the one, or raise the other"
            )
    known = sorted(SAMPLERS)
    for who in MODELS:
        plan = {key: steps for key, steps in settings.items() if key.startswith(f"report.{who}.")}
        for key in plan:
            if (name := key.split(".", 2)[2]) not in known:
                raise ValueError(f"{key} is not supported: there is no sampler {name!r}; use one of {', '.join(known)}")


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
