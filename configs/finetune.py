"""Fine-tune a diffusion model on your images with the loss that it was trained with, such as a teacher for LCD.

    python -m lcm_jax.main --config=configs/finetune.py --workdir=runs/finetune
    python -m lcm_jax.main --config=configs/finetune.py:sd15 --workdir=runs/mine --config.data.folder=path/to/images

The argument is shapes (the default), sd15 or sdxl. All of the UNet is trained; text encoders and autoencoder are not.
For a fine-tuned LCM there is a shorter way, configs/lcf.py.
"""

from ml_collections import ConfigDict

from lcm_jax import config_files

MODELS = {"shapes": "shapes", "sd15": "lcd:sd15", "sdxl": "lcd:sdxl"}


def get_config(model: str = "shapes") -> ConfigDict:
    if model not in MODELS:
        raise ValueError(
            f"model {model!r} is not supported; use {', '.join(MODELS)}: --config=configs/finetune.py:sd15"
        )
    config = config_files.load(MODELS[model])  # what is not set here is as in that config of LCD
    del config.student
    config.objective = ConfigDict({"name": "diffusion", "prompt_dropout": 0.1, "timestep_power": 1.0})
    if model == "shapes":
        config.data.style = "outline"
        config.train.ema_rate, config.optimizer.learning_rate = 0.99, 3e-4
    else:
        config.data.source, config.data.crop = "folder", "center"
        config.data.held_out = 64  # a choice, for sets of a few hundred images or more
        config.train.batch_size = 16
        config.train.ema_rate = 0.999
        config.optimizer.learning_rate = 1e-5
        config.report.prompts = config.report.reference = 64
    steps = (8, 50) if model == "shapes" else (25,)
    config.sample.student_steps, config.sample.scored_prompts = steps[:1], 12
    config.report.teacher = ConfigDict({"ddim": steps})
    config.report.student = ConfigDict({"ddim": steps})
    return config
