"""GenEval: objects, counts, colors and positions of 553 prompts: python -m lcm_jax.evaluate --config=eval/geneval.

    python -m lcm_jax.evaluate --config=eval/geneval --model=runs/sd15/export --model=my/sd15 --output=geneval \\
        --config.settings.metadata=geneval/prompts/evaluation_metadata.jsonl --weights_dir=weights
    python -m lcm_jax.evaluate --images=geneval_images --metrics=geneval --detections=detections.jsonl

GenEval's repository (djghosh13/geneval) has the prompts, which are not bundled. The images are in its own layout, one
folder for each model and number of steps, so that its evaluation can judge them too.

Published (arXiv 2310.11513): Stable Diffusion 1.5 has 0.43 (single object 0.97, two objects 0.38, counting 0.35, colors
0.76, position 0.04, color attribution 0.06), 2.1 has 0.50, XL 0.55. For LCM, papers have an overall 0.50, and 33.98 in
percent, and 55 for two objects: their teachers, steps and guidance differ. Published figures are by mmdet's weights of
Mask2Former, and the detector here has those of the network's authors: always publish the teacher's row beside it
(--model of both), or judge mmdet's detections of these images (--images with --detections).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.metrics = ("geneval",)
    config.settings = ConfigDict(
        {
            "metadata": "",  # GenEval's evaluation_metadata.jsonl
            "max_overlap": 1.0,  # of two objects of a class; 1 keeps all, as the published evaluation does
        }
    )
    config.autoencoder = "shapes"  # of the metric frechet alone
    config.data = ConfigDict(
        {
            "source": "geneval",
            "size": 512,  # pixels of the images that are made
            "images_per_prompt": 4,
        }
    )
    config.plan = ConfigDict({"lcm": (1, 2, 4, 8), "ddim": (50,), "dpmsolver++": (4, 8)})
    config.report = ConfigDict(
        {
            "prompts": 553,  # of the metadata, the first ones
            "batch_size": 16,
            "reference": 2,  # of other sources; there are no real images
            "guidance_scale": 0.0,  # of all models; 0 is that of each model's preset
            "seed": 0,  # of the noise
        }
    )
    return config
