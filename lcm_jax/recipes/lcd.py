"""Latent consistency distillation of any latent diffusion model, into a student or into adapters (LCM-LoRA)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcm_jax.diffusion.guidance import check_guidance_schedule
from lcm_jax.objectives.backward_simulation import BackwardSimulation
from lcm_jax.objectives.lcd import LCD
from lcm_jax.ranges import from_settings
from lcm_jax.recipes.distillation import make_task
from lcm_jax.recipes.models import OpenModel, open_complete, open_models
from lcm_jax.recipes.trained import make_trained
from lcm_jax.training.loop import TrainTask
from lcm_jax.weights.model import StoredModel
from lcm_jax.weights.scheduler import LCM, is_consistency_model, lcm_scheduler


def lcd_task(config, workdir: Path, open_model: OpenModel = open_complete) -> TrainTask:
    """Distill `config.teacher`. Raises ValueError.

    The student has the guidance weight as an input, unless the config has a group `lora`: adapters change no input, and
    learn what is common to the guidance weights that they are trained with.
    """
    settings = config.objective.to_dict()
    fraction = settings.pop("backward_simulation", 0.0)
    lcd = from_settings(LCD, "objective", settings)

    def make_configs(stored: StoredModel) -> dict[str, Mapping[str, Any]]:
        if is_consistency_model(stored.configs):
            raise ValueError(f"teacher {config.teacher!r} is already a latent consistency model; use its own teacher")
        guided = {} if "lora" in config else {"time_cond_proj_dim": config.student.guidance_embedding_dim}
        # Adapters are exported without a scheduler, and users sample them on the grid that LCMScheduler has by default.
        grid = LCM["original_inference_steps"] if "lora" in config else lcd.num_ddim_steps
        return dict(stored.configs) | {
            "unet": dict(stored.configs["unet"]) | guided,
            "scheduler": lcm_scheduler(stored.configs["scheduler"], grid),
        }

    models = open_models(config, "teacher", make_configs, open_model)
    last = len(models.student.schedule.alphas_cumprod) - 1
    check_guidance_schedule("objective.guidance_schedule", lcd.guidance_schedule, last)
    objective = BackwardSimulation(lcd, fraction) if fraction else lcd
    return make_task(config, workdir, models, objective, make_trained(config, models), teaches=True)
