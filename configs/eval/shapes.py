"""Evaluation of text-to-image models on held-out captions of `shapes`: python -m lcm_jax.evaluate --config=eval/shapes.

The verifier judges images of simple shapes alone; a model that was not trained on them scores near 0.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.metrics = ("verifier", "frechet")
    config.autoencoder = "shapes"  # its features are compared; the same for all models, so that distances compare
    config.data = ConfigDict({"source": "shapes", "size": 64, "style": "fill"})  # or outline
    config.report = ConfigDict(
        {
            "prompts": 216,  # captions, as many of each of the six tasks
            "batch_size": 36,
            "reference": 1024,  # real images of held-out captions
            "guidance_scale": 0.0,  # of all models; 0 is that of each model's preset: 3 for shapes, 4 for shapes-lcm
            "seed": 2,  # of the noise, the same for every row
        }
    )
    return config
