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

from lcm_jax import config_groups


def get_config() -> ConfigDict:
    data = ConfigDict({"source": "geneval", "size": 512, "images_per_prompt": 4})
    return config_groups.full_size_evaluation(
        data,
        ("geneval",),
        prompts=553,  # of the metadata, the first ones
        metadata="",  # GenEval's evaluation_metadata.jsonl
        max_overlap=1.0,  # of two objects of a class; 1 keeps all, as the published evaluation does
    )
