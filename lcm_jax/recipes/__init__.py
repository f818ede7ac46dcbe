"""Recipes: from a config to the task that the training loop runs. `RECIPES` is the table of them."""

from collections.abc import Callable, Mapping
from pathlib import Path

from lcm_jax.data.sources import check_data
from lcm_jax.recipes import settings
from lcm_jax.recipes.autoencoder import autoencoder_task
from lcm_jax.recipes.diffusion import diffusion_task
from lcm_jax.recipes.finetune import finetune_task
from lcm_jax.recipes.lcd import lcd_task
from lcm_jax.recipes.lcf import lcf_task
from lcm_jax.training.loop import TrainTask, check_run

RECIPES: Mapping[str, Callable[..., TrainTask]] = {
    "autoencoder": autoencoder_task,
    "diffusion": diffusion_task,
    "finetune": finetune_task,
    "lcd": lcd_task,
    "lcf": lcf_task,
}

OBJECTIVES = tuple(name for name in RECIPES if name != "finetune")


def find_recipe(config) -> Callable[..., TrainTask]:
    """Return the recipe of a config, by its objective: diffusion of a `teacher` that exists is fine-tuning."""
    name = config.objective.name
    return RECIPES["finetune" if name == "diffusion" and "teacher" in config else name]


def check_config(config) -> None:
    """Raise ValueError for settings that are not supported; nothing is read."""
    settings.check(config)
    if config.objective.get("name") not in OBJECTIVES:
        raise ValueError(
            f"objective.name {config.objective.get('name')!r} is not supported; use one of {', '.join(OBJECTIVES)}"
        )
    scratch = find_recipe(config) in (autoencoder_task, diffusion_task)
    if "lora" in config and scratch:
        raise ValueError(
            "lora is not supported for a model that is trained from scratch; remove the group, or fine-tune a teacher"
        )
    name = config.objective.name
    for key, unused in (
        ("student", name != "lcd" or "lora" in config),
        ("teacher", name in ("lcf", "autoencoder")),
        ("init", name != "lcf" and not scratch),
        ("base", scratch),
    ):
        if key in config and unused:
            raise ValueError(f"{key} has no effect in this config, whose objective is {name}; remove it")
    settings.check_keys(config, settings.alike(config))


def make_task(config, workdir: Path) -> TrainTask:
    """Build the task of a config. Nothing is written, and no weights are read but those of a LoRA to begin from.

    Raises ValueError for a setting that is not supported, and RunError for a workdir of another run or one in use.
    """
    check_config(config)
    check_data(config)
    check_run(workdir, config)
    return find_recipe(config)(config, workdir)
