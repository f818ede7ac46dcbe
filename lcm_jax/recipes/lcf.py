"""Latent consistency fine-tuning of any latent consistency model on other images, without a teacher."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcm_jax.objectives.lcf import LCF
from lcm_jax.ranges import from_settings
from lcm_jax.recipes.distillation import make_task
from lcm_jax.recipes.models import OpenModel, open_complete, open_models
from lcm_jax.recipes.trained import make_trained
from lcm_jax.training.loop import TrainTask
from lcm_jax.weights.model import StoredModel
from lcm_jax.weights.scheduler import is_consistency_model, is_turbo, lcm_scheduler


def lcf_task(config, workdir: Path, open_model: OpenModel = open_complete) -> TrainTask:
    """Fine-tune `config.init`, a latent consistency model. Raises ValueError."""
    lcf = from_settings(LCF, "objective", config.objective.to_dict())

    def make_configs(stored: StoredModel) -> dict[str, Mapping[str, Any]]:
        scheduler = stored.configs["scheduler"]
        if not (is_consistency_model(stored.configs) or is_turbo(stored.configs)):
            raise ValueError(
                f"init {config.init!r} is not a latent consistency model: its UNet has no input for the guidance "
                f"weight, and its scheduler is {scheduler.get('_class_name')}; distill it first (--config=lcd), or "
                "if it has an LCM-LoRA merged in, give its folder (of a single file: made by lcm_jax.convert) a "
                "scheduler_config.json with LCMScheduler"
            )
        if stored.configs["unet"].get("time_cond_proj_dim") is None:
            print(
                f"init {config.init!r} has no input for the guidance weight: it is trained at the one weight that it "
                "was distilled for, whatever objective.w_min and w_max are, and sampled at guidance scale 1"
            )
        return dict(stored.configs) | {"scheduler": lcm_scheduler(scheduler, lcf.num_ddim_steps)}

    models = open_models(config, "init", make_configs, open_model)
    return make_task(config, workdir, models, lcf, make_trained(config, models))
