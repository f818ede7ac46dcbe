"""COCO-30k: images of 30,000 captions of COCO 2014's validation set: python -m lcm_jax.evaluate --config=eval/coco30k.

    python -m lcm_jax.evaluate --config=eval/coco30k --model=runs/sd15/export --model=my/sd15 --output=coco30k \\
        --config.data.captions=coco/annotations/captions_val2014.json --config.data.images=coco/val2014

Published with this set: 4 steps of LCM have FID 23.62 in one paper and 25.44 in another, which shows what the reference
(30,000 paired images, or all 40,504), the resizing and the captions that were drawn are worth: about a point each. A
figure is only comparable with one that was measured by the same command: always publish the teacher's row beside it
(--model of both). FID here is the GigaGAN and DMD2 protocol's (center crop, Lanczos to 256, then clean-fid) unless
--fid_flavour says otherwise, and CLIP score is 100 cos of ViT-L/14.
"""

from ml_collections import ConfigDict

from lcm_jax import config_groups


def get_config() -> ConfigDict:
    return config_groups.full_size_evaluation(
        config_groups.coco(), ("fid", "clip_score"), prompts=30_000, fid_flavour="gigagan", clip_model="ViT-L/14"
    )
