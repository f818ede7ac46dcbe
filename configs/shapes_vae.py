"""Train the bundled autoencoder: a small KL autoencoder, 64x64 images <-> 16x16x4 latents.

    python -m lcm_jax.main --config=configs/shapes_vae.py --workdir=runs/shapes_vae

It takes about 20 minutes on two CPU cores and reaches a mean absolute error of about 0.02 (images in [-1, 1]).
`configs/shapes_teacher.py` uses its `export/vae`. More updates help: the bundled autoencoder had 5,000 more, one minute
on a GPU, and has an error of 0.011:

    python -m lcm_jax.main --config=configs/shapes_vae.py --workdir=runs/more --config.init=runs/shapes_vae/export \\
        --config.train.steps=5000 --config.train.batch_size=64 --config.train.ema_rate=0.998 \\
        --config.optimizer.learning_rate=1e-3
"""

from ml_collections import ConfigDict

from lcm_jax import config_groups


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.init = ""  # initial model, such as `shapes` (bundled); if empty, train from scratch
    config.objective = ConfigDict({"name": "autoencoder", "kl_weight": 1e-5})
    config.data = config_groups.data(
        source="shapes",
        length=200_000,
        caption="an image",  # an autoencoder reads none
        crop="random",
        size=64,
        held_out=512,
        encode="step",
    )
    config.vae = ConfigDict(
        {
            "block_out_channels": (16, 32, 64),
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 8,
            "mid_block_add_attention": False,
        }
    )
    config.train = ConfigDict(
        {"steps": 2400, "batch_size": 24, "accumulate": 1, "seed": 0, "ema_rate": 0.995, "dtype": "float32"}
    )
    config.optimizer = ConfigDict(
        {
            "name": "adamw",
            "learning_rate": 2e-3,
            "warmup_steps": 100,
            "schedule": "cosine",
            "b1": 0.9,
            "b2": 0.99,
            "weight_decay": 1e-4,
            "clip_norm": 1.0,
        }
    )
    config.mesh = config_groups.mesh()
    config.checkpoint = config_groups.checkpoint(every_steps=250)  # best: or held_out_absolute_error
    config.log = config_groups.log(every_steps=20)
    config.sample = ConfigDict({"every_steps": 250, "images": 16})
    return config
