"""Recipes: from a config to the task that the training loop runs. `RECIPES` is the table of objectives by name."""

from collections.abc import Callable, Mapping
from pathlib import Path

from lcm_jax.data.sources import check_data
from lcm_jax.recipes import settings
from lcm_jax.recipes.autoencoder import autoencoder_task
from lcm_jax.recipes.diffusion import diffusion_task
from lcm_jax.recipes.lcd import lcd_task
from lcm_jax.training.loop import TrainTask, check_run

RECIPES: Mapping[str, Callable[..., TrainTask]] = {
    "autoencoder": autoencoder_task,
    "diffusion": diffusion_task,
    "lcd": lcd_task,
}


def check_config(config) -> None:
    """Raise ValueError for settings that are not supported; nothing is read."""
    settings.check(config)
    if config.objective.get("name") not in RECIPES:
        raise ValueError(
            f"objective.name {config.objective.get('name')!r} is not supported; use one of {', '.join(RECIPES)}"
        )
    settings.check_keys(config, settings.alike(config.objective.name))


def make_task(config, workdir: Path) -> TrainTask:
    """Build the task of a config. Nothing is written, and no weights are read.

    Raises ValueError for a setting that is not supported, and RunError for a workdir of another run or one in use.
    """
    check_config(config)
    check_data(config)
    check_run(workdir, config)
    return RECIPES[config.objective.name](config, workdir)
