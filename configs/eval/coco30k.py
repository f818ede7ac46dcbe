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


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.metrics = ("fid", "clip_score")
    config.settings = ConfigDict({"fid_flavour": "gigagan", "clip_model": "ViT-L/14"})
    config.autoencoder = "shapes"  # of the metric frechet alone
    config.data = ConfigDict(
        {
            "source": "coco",
            "captions": "",  # captions_val2014.json of COCO's annotations
            "images": "",  # the folder val2014
            "size": 512,  # pixels of the images that are made
            "per_image": "any",  # captions drawn from all; or first: the first caption of each image
            "compared": "paired",  # with the images of the captions; or all: with every image
            "real_size": 0,  # pixels that real images are cropped to; 0 leaves them to the FID's own resizing
        }
    )
    config.plan = ConfigDict({"lcm": (1, 2, 4, 8), "ddim": (4, 8, 50), "dpmsolver++": (4, 8)})
    config.report = ConfigDict(
        {
            "prompts": 30_000,
            "batch_size": 16,
            "reference": 30_000,  # of other sources; those of COCO are paired, or all
            "guidance_scale": 0.0,  # of all models; 0 is that of each model's preset
            "seed": 0,  # of the captions that are drawn, and of the noise
        }
    )
    return config
