"""From a config to what the training loop runs: weights, networks, data, previews and what is left behind at the end.

A file for each objective builds its Job; `RECIPES` is the table of their names.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from lcm_jax.data.sources import check_data
from lcm_jax.recipes import settings
from lcm_jax.recipes.autoencoder import autoencoder_job
from lcm_jax.recipes.diffusion import diffusion_job
from lcm_jax.recipes.lcd import lcd_job
from lcm_jax.training.loop import Job, check_run

RECIPES: Mapping[str, Callable] = {"autoencoder": autoencoder_job, "diffusion": diffusion_job, "lcd": lcd_job}


def make_job(config, workdir: Path) -> Job:
    """Build the Job of a config. Before anything is read, what cannot be is refused.

    Raises ValueError for a setting out of its range and RunError for a workdir of another run or one that is in use.
    """
    settings.check(config)
    if config.objective.name not in RECIPES:
        raise ValueError(f"objective.name {config.objective.name!r} is not supported; use one of {', '.join(RECIPES)}")
    check_data(config)
    check_run(workdir, config)
    return RECIPES[config.objective.name](config, workdir)
