"""LAION-Aesthetics, held-out images of a set to train on: python -m lcm_jax.evaluate --config=eval/laion_aesthetics.

    python -m lcm_jax.evaluate --config=eval/laion_aesthetics --model=runs/sd15/export --model=my/sd15 --output=laion \\
        --config.data.shards='laion/{00000..00099}.tar'

The set of Table 1 of the LCM paper (arXiv 2310.04378; LAION-Aesthetics 6+, 512 pixels, guidance scale 8). At 1, 2, 4
and 8 steps LCM has FID 35.36, 13.31, 11.10 and 11.84 and CLIP score 24.14, 27.83, 28.69 and 28.84; its teacher by
DPM-Solver++ has FID 185.78, 72.81, 18.43 and 12.20. Which images and captions were drawn was not published, so that
rows of one report compare, and figures of two do not: always publish the teacher's row.
"""

from ml_collections import ConfigDict

from lcm_jax import config_groups


def get_config() -> ConfigDict:
    data = config_groups.data(
        source="tar",  # or any other of images and captions (docs/data.md)
        size=512,
        held_out=10_000,  # of the set, those that no run with the same setting trains on
        filters=("aesthetic>=6",),
    )
    return config_groups.full_size_evaluation(
        data, ("fid", "clip_score"), prompts=10_000, fid_flavour="clean-fid", clip_model="ViT-g/14"
    )
