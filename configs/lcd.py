"""Latent consistency distillation of published models (arXiv 2310.04378), on captioned images in tar shards.

    python -m lcm_jax.main --config=configs/lcd.py:sd15 --dry_run
    python -m lcm_jax.main --config=configs/lcd.py:sd15 --workdir=runs/sd15 --config.data.shards="data/*.tar"

The argument is sd15, sd21, sd21-768, sdxl or ssd1b. sd21 and sd21-768 use the paper's settings; sd15 and sdxl use the
settings of the public scripts, which train for 1,000 instead of 100,000 steps; ssd1b, for which no settings were
published, uses sdxl's. Comments mark each setting as published or as a choice. The dry run estimates memory and time:
`--config.mesh.fsdp=8` shards one copy of the state over eight devices, `--config.train.accumulate=4` splits a batch in
four. `report.md` contains the Frechet distances of teacher and student; `export/` loads in diffusers.
"""

from ml_collections import ConfigDict

from lcm_jax import config_groups

PAPER = {"steps": 100_000, "learning_rate": 8e-6, "ema_rate": 0.999943, "w": (2.0, 14.0), "distance": "l2"}
SCRIPTS = {"steps": 1000, "learning_rate": 1e-6, "ema_rate": 0.95, "w": (5.0, 15.0), "distance": "huber"}
# The scripts use 12 images per device; eight devices are a choice (raise train.accumulate if there are fewer).
SCRIPTS_BATCH = 96
MODELS = {
    "sd15": SCRIPTS | {"teacher": "stable-diffusion-v1-5/stable-diffusion-v1-5", "size": 512, "batch": SCRIPTS_BATCH},
    "sd21": PAPER | {"teacher": "stabilityai/stable-diffusion-2-1-base", "size": 512, "batch": 72},
    "sd21-768": PAPER | {"teacher": "stabilityai/stable-diffusion-2-1", "size": 768, "batch": 16},
    "sdxl": SCRIPTS
    | {"teacher": "stabilityai/stable-diffusion-xl-base-1.0", "size": 1024, "batch": SCRIPTS_BATCH, "w": (3.0, 15.0)},
    "ssd1b": SCRIPTS | {"teacher": "segmind/SSD-1B", "size": 1024, "batch": SCRIPTS_BATCH, "w": (3.0, 15.0)},
}


def get_config(model: str = "sd15") -> ConfigDict:
    if model not in MODELS:
        raise ValueError(f"the model is {model!r}; choose one of {', '.join(MODELS)}: --config=configs/lcd.py:sd15")
    published = MODELS[model]
    config = ConfigDict()
    config.teacher = published["teacher"]  # a hub id or a diffusers folder
    config.base = ""  # a model that supplies what a teacher in a single file lacks, such as the tokenizer
    config.family = model  # the published configs, which a dry run uses if the teacher is not available
    config.objective = ConfigDict(
        {
            "name": "lcd",
            "solver": "ddim",  # published; as well dpm and dpm++, which take two evaluations of the teacher
            "num_ddim_steps": 50,  # published: a skipping step of 20
            "w_min": published["w"][0],
            "w_max": published["w"][1],
            "distance": published["distance"],
            "huber_c": 1e-3,  # published
            "weighting": "uniform",  # published
            "backward_simulation": 0.0,  # published
            "guidance_schedule": (),  # published: the teacher is guided by all of w at every t
            "prompt_dropout": 0.0,  # published by the scripts; the paper does not say
        }
    )
    config.student = ConfigDict(
        {
            "guidance_embedding_dim": 256,  # published
            "guidance_embedding_init": "zero",  # published in the paper; "normal" has the spread of the scripts'
        }
    )
    config.data = config_groups.data(
        source="tar",
        length=100_000,
        shards="data/{00000..00015}.tar",
        size=published["size"],
        crop="random",  # published by the scripts
        held_out=1024,  # a choice: the last records are not trained on, the report compares with them
        encode="step",
    )
    config.train = ConfigDict(
        {
            "steps": published["steps"],
            "batch_size": published["batch"],
            "accumulate": 1,
            "seed": 0,
            "ema_rate": published["ema_rate"],
            "dtype": "bfloat16",  # a choice: the scripts use float16, which needs loss scaling
            # A choice: a batch of 64 of SD 1.5 fits 80 GB. block takes less memory and more time, none the opposite.
            "remat": "save_convs_and_attention",
        }
    )
    config.optimizer = ConfigDict(
        {
            "name": "adamw",
            "learning_rate": published["learning_rate"],
            "warmup_steps": 0,  # published by the scripts; not specified in the paper
            "schedule": "constant",
            "b1": 0.9,  # a choice: Adam's defaults
            "b2": 0.999,
            "weight_decay": 1e-2,  # a choice: AdamW's default
            "clip_norm": 1.0,  # a choice
        }
    )
    config.mesh = config_groups.mesh()
    config.checkpoint = config_groups.checkpoint(every_steps=max(published["steps"] // 20, 100))
    config.log = config_groups.log(every_steps=10)
    config.sample = ConfigDict(
        {
            "every_steps": max(published["steps"] // 10, 100),
            "prompts": 6,
            "scored_prompts": 60,  # captions whose images the metrics measure at each preview; 0 is none
            "batch_size": 6,
            "guidance_scale": 8.0,
            "teacher_steps": 50,
            "student_steps": (1, 2, 4, 8),
        }
    )
    config.metrics = ("frechet",)
    config.report = ConfigDict(
        {
            "prompts": 256,
            "batch_size": 8,
            "reference": 1024,
            "guidance_scale": 8.0,  # as in the paper's table 1
            "teacher": {  # numbers of steps
                "ddim": (4, 8, 50),
                "dpmsolver++": (4, 8),  # as a flag: '--config.report.teacher["dpmsolver++"]=(4,8)'
                "dpmsolver++_karras": (),
                "euler": (),
                "euler_ancestral": (),
                "euler_karras": (),
                "pndm": (),
            },
            "student": {"lcm": (1, 2, 4, 8)},
        }
    )
    return config
