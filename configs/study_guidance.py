"""Study of the guidance weight (arXiv 2310.04378, section 5.2): one student, sampled at many guidance scales.

    python -m lcm_jax.study --config=study_guidance --workdir=runs/study_guidance

The student is distilled for every w of the range at once. Quality is the verifier's score and the Frechet distance;
diversity is the mean distance between images of one caption from several noises.
"""

from ml_collections import ConfigDict

from lcm_jax import config_files


def get_config() -> ConfigDict:
    config = config_files.load("study_solver")  # the same base and report
    config.overrides.train = ConfigDict({"steps": 300, "batch_size": 16})
    config.overrides.objective.num_ddim_steps = 50  # published: a skipping step of 20
    config.overrides.objective.w_min, config.overrides.objective.w_max = 1.0, 13.0
    config.grid = ConfigDict()  # a single run
    config.sampling = ConfigDict(
        {
            "guidance_scales": (2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0),  # w + 1
            "steps": (2, 4, 8),
            "captions": 36,
            "images_per_caption": 4,
            "batch_size": 36,
            "metrics": ("verifier", "frechet"),  # beside diversity
            "seed": 2,  # of the noise, the same for every guidance scale
        }
    )
    config.figure = ConfigDict(
        {"x": "guidance_scale", "lines": "steps", "metrics": ("verifier", "frechet", "diversity"), "steps": (2, 4, 8)}
    )
    return config
