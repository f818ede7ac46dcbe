"""Study of the teacher's solver and skipping step (arXiv 2310.04378, section 5.2): a grid of runs side by side.

    python -m lcm_jax.study --config=study_solver --workdir=runs/study_solver
    python -m lcm_jax.study --config=study_solver --workdir=runs/study_solver --config.overrides.train.steps=2000

DDIM, DPM-Solver-2 and DPM-Solver++(2S), with skipping steps of k = 1, 5, 10, 20 and 50 timesteps. The runs have the
paper's algorithm alone, without what configs/shapes.py adds. On two CPU cores a run takes two to three minutes.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.base = "shapes"  # a bundled config or a file, such as lcd:sd15
    config.overrides = ConfigDict(  # of the base, in all runs
        {
            "train": {"steps": 150, "batch_size": 8},
            "objective": {
                "num_ddim_steps": 50,
                "w_min": 3.0,
                "w_max": 7.0,
                "weighting": "uniform",
                "backward_simulation": 0.0,
                "guidance_schedule": (),
            },
            "data": {"length": 2000, "held_out": 512},
            "log": {"every_steps": 50},
            "checkpoint": {"every_steps": 50},
            "sample": {"every_steps": 0, "prompts": 6, "teacher_steps": 4, "student_steps": (4,)},
            "report": {
                "prompts": 144,
                "reference": 512,
                "teacher": {"ddim": (4,), "dpmsolver++": ()},
                "student": {"lcm": (1, 2, 4)},
            },
        }
    )
    config.grid = ConfigDict(  # the values of each key
        {"objective": {"solver": ("ddim", "dpm", "dpm++"), "num_ddim_steps": (1000, 200, 100, 50, 20)}}
    )
    config.design = "product"  # every combination; or one_at_a_time: the first value of all keys but one
    config.figure = ConfigDict(
        {
            "x": "skipping_step",  # a key of the grid, or run, steps, guidance_scale, skipping_step
            "lines": "objective.solver",
            "metrics": ("verifier", "frechet"),
            "steps": (2, 4),  # of the sampler
        }
    )
    return config
