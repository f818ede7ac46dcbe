"""Latent consistency fine-tuning (arXiv 2310.04378, section 4.4): an LCM learns your images, without a teacher.

    python -m lcm_jax.main --config=configs/lcf.py --workdir=runs/lcf
    python -m lcm_jax.main --config=configs/lcf.py:sd15 --workdir=runs/mine \\
        --config.data.folder=path/to/images --config.data.caption="a photo of sks dog"

The argument is shapes (the default), sd15 or sdxl. shapes fine-tunes the bundled student on `shapes` drawn as outlines
in other colors, in two minutes on two CPU cores; see docs/lcf.md. sd15 and sdxl fine-tune published LCMs on a folder
of images with captions. `--config.init` takes any LCM: a folder, a hub id, a run, a single file (with
`--config.base=` for what it lacks). Watch `curve.png`: fine-tuning is at its best early, and a set of few images is
soon learnt by heart; `--config.checkpoint.best=frechet@4` keeps the best state.
"""

from ml_collections import ConfigDict

from lcm_jax import config_files

MODELS = {
    "shapes": {"init": "shapes-lcm", "base": "", "from": "shapes"},
    "sd15": {"init": "SimianLuo/LCM_Dreamshaper_v7", "base": "", "from": "lcd:sd15", "family": "lcm-dreamshaper"},
    "sdxl": {
        "init": "latent-consistency/lcm-sdxl",  # a UNet alone
        "base": "stabilityai/stable-diffusion-xl-base-1.0",
        "from": "lcd:sdxl",
        "family": "lcm-sdxl",
    },
}


def get_config(model: str = "shapes") -> ConfigDict:
    if model not in MODELS:
        raise ValueError(f"model {model!r} is not supported; use {', '.join(MODELS)}: --config=configs/lcf.py:sd15")
    own = MODELS[model]
    config = config_files.load(own["from"])  # what is not set here is as in that config of LCD
    del config.teacher, config.student
    config.init, config.base = own["init"], own["base"]
    if "family" in own:
        config.family = own["family"]
    small = model == "shapes"
    distilled = config.objective
    config.objective = ConfigDict(
        {
            "name": "lcf",
            # The smaller a skipping step, the less its two ends differ, and the sharper an image stays: the bundled
            # LCM, which was distilled in steps of 125, is fine-tuned in steps of 25.
            "num_ddim_steps": 40 if small else distilled.num_ddim_steps,
            "w_min": distilled.w_min,
            "w_max": distilled.w_max,
            "distance": distilled.distance,
            "huber_c": distilled.huber_c,
            "weighting": "sqrt_snr" if small else distilled.weighting,  # a choice: it keeps the composition
            "prompt_dropout": 0.0,
        }
    )
    if small:
        config.data.style = "outline"
        config.train.steps, config.optimizer.learning_rate = 150, 4e-4
        config.sample.student_steps, config.sample.every_steps, config.sample.scored_prompts = (1, 4), 25, 72
    else:
        config.data.source, config.data.crop = "folder", "center"
        config.data.held_out = 64  # a choice, for sets of a few hundred images or more
        config.train.steps, config.train.batch_size = 1000, 16  # a choice; published: 30,000 steps
        config.train.ema_rate = 0.95  # a choice, as for LCD; published: 0.999943
        config.optimizer.learning_rate = 8e-6  # published
        config.checkpoint.every_steps = config.sample.every_steps = 100
        config.report.prompts = config.report.reference = 64
    config.checkpoint.best = "frechet@4"
    del config.sample.teacher_steps
    config.sample.init_steps = (4,)
    del config.report.teacher
    config.report.init = ConfigDict({"lcm": (1, 2, 4, 8)})
    return config
