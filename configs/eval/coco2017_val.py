"""COCO 2017's validation set, CLIP score, and FID to all images: python -m lcm_jax.evaluate --config=eval/coco2017_val.

    python -m lcm_jax.evaluate --config=eval/coco2017_val --model=runs/sd15/export --model=my/sd15 --output=val2017 \\
        --config.data.captions=coco/annotations/captions_val2017.json --config.data.images=coco/val2017

Published with captions of this set: LCM has a CLIP score of 0.2993 (the cosine; 29.93 in this report) at 4 steps. The
towers decide its scale: name them (--clip_model; here OpenCLIP's ViT-g/14), and always publish the teacher's row.
"""

from ml_collections import ConfigDict

from lcm_jax import config_groups


def get_config() -> ConfigDict:
    return config_groups.full_size_evaluation(
        config_groups.coco(per_image="first", compared="all"),
        ("clip_score", "fid", "kid"),
        prompts=5000,
        fid_flavour="clean-fid",
        clip_model="ViT-g/14",
    )
