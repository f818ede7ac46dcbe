"""Latent consistency distillation of any latent diffusion model."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lcm_jax.diffusion.guidance import check_guidance_schedule
from lcm_jax.objectives.backward_simulation import BackwardSimulation
from lcm_jax.objectives.lcd import LCD
from lcm_jax.ranges import from_settings
from lcm_jax.recipes.distillation import (
    OpenModel,
    add_guidance_input,
    bind_unets,
    lcm_configs,
    make_task,
    open_models,
    open_teacher,
)
from lcm_jax.training.loop import TrainTask
from lcm_jax.weights.model import read_params


def lcd_task(config, workdir: Path, open_model: OpenModel = open_teacher) -> TrainTask:
    """Distill `config.teacher` into a student that has the guidance weight as an input. Raises ValueError."""
    settings = config.objective.to_dict()
    fraction = settings.pop("backward_simulation", 0.0)
    lcd = from_settings(LCD, "objective", settings)
    models = open_models(config, partial(lcm_configs, config, lcd.num_ddim_steps), open_model)
    last = len(models.student.schedule.alphas_cumprod) - 1
    check_guidance_schedule("objective.guidance_schedule", lcd.guidance_schedule, last)

    def load_params() -> dict[str, Any]:
        abstract = models.teacher.abstract_params()["unet"]
        taught = read_params(models.stored, "unet", abstract, lambda leaf: np.dtype(np.float32))
        return {"unet": add_guidance_input(taught, models.student)}

    return make_task(
        config,
        workdir,
        models,
        BackwardSimulation(lcd, fraction) if fraction else lcd,
        bind=bind_unets(models.teacher, models.student),
        params={"unet": models.student.abstract_params()["unet"]},
        load_params=load_params,
    )
