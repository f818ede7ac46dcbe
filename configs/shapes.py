"""Distill the bundled teacher into a latent consistency model on two CPU cores, offline.

    python -m lcm_jax.main --config=configs/shapes.py --workdir=runs/shapes

It takes less than ten minutes on two cores, four of them for the updates; `report.md` has the results of teacher
and student. The settings differ from the published ones (batch 72, AdamW at 8e-6, EMA 0.999943, w in [2, 14], 50 DDIM
steps) because this run has about a thousandth of their work. Two settings are not in the paper. `backward_simulation`:
most examples of a batch start from latents that the student generates, as all sampling steps but the first do.
`guidance_schedule`: in steps of 125, guidance at low noise hurts (arXiv 2404.07724), and at high noise it brightens
light backgrounds. The bundled student had 5,000 updates of 128 images; its model card has ablations of each setting.
"""

from ml_collections import ConfigDict

from lcm_jax import config_groups


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.teacher = "shapes"
    config.base = ""  # a model that supplies what a teacher in a single file lacks, such as the tokenizer
    config.objective = ConfigDict(
        {
            "name": "lcd",
            "solver": "ddim",  # of the teacher's step; dpm and dpm++ take two evaluations of the teacher
            "num_ddim_steps": 8,  # a skipping step of 1000 / 8 = 125, published: 20
            "w_min": 3.0,
            "w_max": 7.0,
            "distance": "huber",
            "huber_c": 0.1,  # published: 1e-3
            "weighting": "inverse_sigma",  # published: uniform
            "backward_simulation": 0.875,  # fraction of examples that the student generates; published: 0
            # (timestep, w_max) pairs: from that timestep up, w is clipped to w_max. Published: ().
            "guidance_schedule": ((0, 0.0), (300, 7.0), (700, 3.0)),
            "prompt_dropout": 0.0,
        }
    )
    # The projection of w's embedding begins at zero, as the paper's, or normal, with the spread of the public scripts'.
    config.student = ConfigDict({"guidance_embedding_dim": 256, "guidance_embedding_init": "zero"})
    config.data = config_groups.data(source="shapes", length=5000, size=64, held_out=1024, encode="cache")
    config.train = ConfigDict(
        {
            "steps": 600,
            "batch_size": 16,
            "accumulate": 1,
            "seed": 0,
            "ema_rate": 0.95,
            "dtype": "float32",
            "remat": "none",
        }
    )
    config.optimizer = ConfigDict(
        {
            "name": "muon",
            "learning_rate": 8e-4,
            "warmup_steps": 20,
            "schedule": "cosine",
            "b1": 0.9,
            "b2": 0.999,
            "weight_decay": 0.0,
            "clip_norm": 1.0,
        }
    )
    config.mesh = config_groups.mesh()
    config.checkpoint = config_groups.checkpoint(every_steps=120)
    config.log = config_groups.log(every_steps=20)
    config.sample = ConfigDict(
        {
            "every_steps": 300,
            "prompts": 12,
            "scored_prompts": 36,  # captions whose images the metrics measure at each preview; 0 is none
            "batch_size": 12,
            "guidance_scale": 8.0,
            "teacher_steps": 50,
            "student_steps": (1, 2, 4, 8),
        }
    )
    config.metrics = ("verifier", "frechet")
    config.report = ConfigDict(
        {
            "prompts": 144,
            "batch_size": 36,
            "reference": 1024,
            "guidance_scale": 8.0,
            "teacher": {  # numbers of steps
                "ddim": (1, 2, 4, 8, 50),
                "dpmsolver++": (1, 2, 4, 8, 50),
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
