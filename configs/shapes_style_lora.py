"""Train a style as a LoRA of the bundled teacher: `shapes` drawn as outlines in other colors.

    python -m lcm_jax.main --config=configs/shapes_style_lora.py --workdir=runs/style

The loss is that of plain diffusion. The style can be used with an LCM-LoRA, without further training: see
docs/lcm_lora.md.
"""

from ml_collections import ConfigDict

from lcm_jax import config_files


def get_config() -> ConfigDict:
    config = config_files.load("finetune:shapes")  # what is not set here is as in that config
    config.lora = config_files.load("lcm_lora:shapes").lora
    config.lora.rank, config.lora.alpha = 16, 16.0
    config.train.ema_rate, config.optimizer.learning_rate = 0.0, 8e-4
    return config
