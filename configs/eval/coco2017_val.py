"""COCO 2017's validation set, CLIP score, and FID to all images: python -m lcm_jax.evaluate --config=eval/coco2017_val.

    python -m lcm_jax.evaluate --config=eval/coco2017_val --model=runs/sd15/export --model=my/sd15 --output=val2017 \\
        --config.data.captions=coco/annotations/captions_val2017.json --config.data.images=coco/val2017

Published with captions of this set: LCM has a CLIP score of 0.2993 (the cosine; 29.93 in this report) at 4 steps. The
towers decide its scale: name them (--clip_model; here OpenCLIP's ViT-g/14), and always publish the teacher's row.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.metrics = ("clip_score", "fid", "kid")
    config.settings = ConfigDict({"fid_flavour": "clean-fid", "clip_model": "ViT-g/14"})
    config.autoencoder = "shapes"  # of the metric frechet alone
    config.data = ConfigDict(
        {
            "source": "coco",
            "captions": "",  # captions_val2017.json of COCO's annotations
            "images": "",  # the folder val2017
            "size": 512,  # pixels of the images that are made
            "per_image": "any",  # captions drawn from all; or first: the first caption of each image
            "compared": "all",  # with every image; or paired: with the images of the captions
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
