"""Study of the target network: EMA rate, distance and the start of w's projection, one of them changed at a time.

    python -m lcm_jax.study --config=study_ema --workdir=runs/study_ema

The first value of each key is the default. An EMA rate of 0 is no target network but the student itself without
gradient, as in arXiv 2310.14189; 0.95 is that of the public scripts, 0.999943 that of arXiv 2310.04378.
"""

from ml_collections import ConfigDict

from lcm_jax import config_files


def get_config() -> ConfigDict:
    config = config_files.load("study_solver")  # the same base, updates and report
    config.overrides.objective.num_ddim_steps = 50  # published: a skipping step of 20
    config.grid = ConfigDict(
        {
            "train": {"ema_rate": (0.95, 0.0, 0.999943)},
            "objective": {"distance": ("huber", "l2"), "huber_c": (0.1, 1e-3)},
            "student": {"guidance_embedding_init": ("zero", "normal")},
        }
    )
    config.design = "one_at_a_time"
    config.figure = ConfigDict({"x": "run", "lines": "steps", "metrics": ("verifier", "frechet"), "steps": (1, 2, 4)})
    return config
