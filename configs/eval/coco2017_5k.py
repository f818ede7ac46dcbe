"""COCO 2017, 5,000 captions: the first of each validation image: python -m lcm_jax.evaluate --config=eval/coco2017_5k.

    python -m lcm_jax.evaluate --config=eval/coco2017_5k --model=runs/sd15/export --model=my/sd15 --output=coco5k \\
        --config.data.captions=coco/annotations/captions_val2017.json --config.data.images=coco/val2017

Published with this set: LCM has FID 36.52 at 4 steps. Its 5,000 images are too few for an unbiased FID, which the
report says, with FID-infinity beside it: compare with figures of 5,000 images alone, and always publish the teacher's
row.
"""

from ml_collections import ConfigDict

from lcm_jax import config_groups


def get_config() -> ConfigDict:
    return config_groups.full_size_evaluation(
        config_groups.coco(per_image="first"),
        ("fid", "clip_score"),
        prompts=5000,
        fid_flavour="clean-fid",
        clip_model="ViT-L/14",
    )
