"""LCM-LoRA (arXiv 2311.05556): distill a model into adapters, which also speed up other models of its family.

    python -m lcm_jax.main --config=configs/lcm_lora.py --workdir=runs/lcm_lora
    python -m lcm_jax.main --config=configs/lcm_lora.py:sd15 --dry_run
    python -m lcm_jax.main --config=configs/lcm_lora.py:sd15 --workdir=runs/sd15_lora --config.data.shards="data/*.tar"

The argument is shapes (the default), sd15 or sdxl. The UNet stays as it is, as the teacher and under the adapters; the
optimizer holds state for the adapters alone, and there is no moving average: the target is the student itself, without
gradient. `export/` has the adapters as diffusers and as kohya's programs read them. Sample at guidance scale 1: the
student has no input for the guidance weight. See docs/lcm_lora.md.
"""

from ml_collections import ConfigDict

from lcm_jax import config_files

TARGETS = (  # published: of the UNet, by diffusers' names of modules
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
MODELS = {"shapes": "shapes", "sd15": "lcd:sd15", "sdxl": "lcd:sdxl"}


def get_config(model: str = "shapes") -> ConfigDict:
    if model not in MODELS:
        raise ValueError(
            f"model {model!r} is not supported; use {', '.join(MODELS)}: --config=configs/lcm_lora.py:sd15"
        )
    config = config_files.load(MODELS[model])  # what is not set here is as in that config of LCD
    del config.student  # adapters add no input for the guidance weight
    config.lora = ConfigDict(
        {
            "rank": 64,  # published
            "alpha": 64.0,  # published by the scripts; alpha / rank scales the updates
            "targets": TARGETS,
            "dropout": 0.0,
            "init": "",  # a LoRA to begin from, of this rank and these targets
        }
    )
    config.train.ema_rate = 0.0  # published: no moving average
    if model == "shapes":
        config.lora.rank, config.lora.alpha = 24, 24.0  # its layers are 48 to 96 wide
        config.objective.w_min = config.objective.w_max = 7.0  # fixed, as the paper's 7.5
    else:
        config.optimizer.learning_rate = 1e-4  # published by the scripts, which sample w
    return config
