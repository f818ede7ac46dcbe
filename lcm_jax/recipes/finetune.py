"""Fine-tuning of any latent diffusion model on captioned images with the loss that it was trained with."""

from pathlib import Path

from lcm_jax.objectives.diffusion import Diffusion
from lcm_jax.ranges import from_settings
from lcm_jax.recipes.distillation import make_task
from lcm_jax.recipes.models import OpenModel, open_complete, open_models
from lcm_jax.recipes.trained import make_trained
from lcm_jax.training.loop import TrainTask
from lcm_jax.weights.scheduler import is_consistency_model


def finetune_task(config, workdir: Path, open_model: OpenModel = open_complete) -> TrainTask:
    """Fine-tune the UNet of `config.teacher`, or train adapters of it if the config has a group `lora`.

    Raises ValueError, also for settings of the noise schedule, which is the model's own.
    """
    settings = config.objective.to_dict()
    for name in ("prediction_type", "zero_terminal_snr"):
        if name in settings:
            raise ValueError(
                f"objective.{name} is not supported for fine-tuning: the scheduler of {config.teacher!r} has it; "
                "remove it"
            )
    models = open_models(config, "teacher", lambda stored: stored.configs, open_model)
    if is_consistency_model(models.stored.configs):
        raise ValueError(f"teacher {config.teacher!r} is a latent consistency model; fine-tune it by --config=lcf")
    objective = from_settings(Diffusion, "objective", settings)
    return make_task(config, workdir, models, objective, make_trained(config, models))
