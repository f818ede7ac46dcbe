"""COCO 2017, 5,000 captions: the first of each validation image: python -m lcm_jax.evaluate --config=eval/coco2017_5k.

    python -m lcm_jax.evaluate --config=eval/coco2017_5k --model=runs/sd15/export --model=my/sd15 --output=coco5k \\
        --config.data.captions=coco/annotations/captions_val2017.json --config.data.images=coco/val2017

Published with this set: LCM has FID 36.52 at 4 steps. Its 5,000 images are too few for an unbiased FID, which the
report says, with FID-infinity beside it: compare with figures of 5,000 images alone, and always publish the teacher's
row.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.metrics = ("fid", "clip_score")
    config.settings = ConfigDict({"fid_flavour": "clean-fid", "clip_model": "ViT-L/14"})
    config.autoencoder = "shapes"  # of the metric frechet alone
    config.data = ConfigDict(
        {
            "source": "coco",
            "captions": "",  # captions_val2017.json of COCO's annotations
            "images": "",  # the folder val2017
            "size": 512,  # pixels of the images that are made
            "per_image": "first",  # the first caption of each image; or any: captions drawn from all
            "compared": "paired",  # with the images of the captions; or all: with every image
            "real_size": 0,  # pixels that real images are cropped to; 0 leaves them to the FID's own resizing
        }
    )
    config.plan = ConfigDict({"lcm": (1, 2, 4, 8), "ddim": (4, 8, 50), "dpmsolver++": (4, 8)})
    config.report = ConfigDict(
        {
            "prompts": 5000,
            "batch_size": 16,
            "reference": 5000,  # of other sources; those of COCO are paired, or all
            "guidance_scale": 0.0,  # of all models; 0 is that of each model's preset
            "seed": 0,  # of the captions that are drawn, and of the noise
        }
    )
    return config
