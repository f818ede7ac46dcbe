"""Train the bundled teacher: a CLIP text encoder and a UNet, trained together on the latents of `shapes`.

    python -m lcm_jax.main --config=configs/shapes_teacher.py --workdir=runs/shapes_teacher

It uses the autoencoder that `configs/shapes_vae.py` exports, or another one (`--config.autoencoder=shapes`). It takes
75 minutes on two CPU cores and a few minutes on a GPU; samples and the verifier's score are logged, and `export/` is a
diffusers folder. The model predicts v, which is well defined at t = 999, where few-step sampling starts. The schedule
has zero terminal SNR (arXiv 2305.08891), so that sampling starts from pure noise and only the caption determines the
layout.

Which object is on the left depends on word order and relation together. Training on all four relations did not learn
this in 34,000 updates; 600 updates on two of them did, and then on all four:

    python -m lcm_jax.main --config=configs/shapes_teacher.py --workdir=runs/two_relations \\
        --config.autoencoder=shapes --config.init=path/to/a/model --config.train.steps=600 \\
        --config.objective.timestep_power=0.1 \\
        --config.data.relations="('left','above')" --config.data.tasks="('position','position','color_attribution')"

The bundled weights are the result of several such runs, each from the previous one (`--config.init`), the last ones on
a GPU with batches of 256; see their model card.
"""

from ml_collections import ConfigDict

from lcm_jax import config_groups


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.autoencoder = "runs/shapes_vae/export"
    config.init = ""  # initial model, such as `shapes` (bundled); if empty, train from scratch
    config.objective = ConfigDict(
        {
            "name": "diffusion",
            "prediction_type": "v_prediction",
            "zero_terminal_snr": True,
            "prompt_dropout": 0.1,
            "timestep_power": 0.5,
        }
    )
    config.data = ConfigDict(
        {
            "source": "shapes",
            "size": 64,
            "length": 60_000,
            "style": "fill",  # or outline
            "held_out": 512,
            "encode": "cache",
            "cache": "",
            # Used in turn: positions and counts are harder to learn than shapes and colors.
            "tasks": (
                "single_object",
                "position",
                "two_object",
                "counting",
                "position",
                "colors",
                "two_object",
                "position",
                "counting",
                "color_attribution",
            ),
            "relations": ("left", "right", "above", "below"),  # start with two of them, see above
        }
    )
    config.unet = ConfigDict(
        {
            "block_out_channels": (48, 96),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "attention_head_dim": 4,
            "norm_num_groups": 16,
        }
    )
    config.text_encoder = ConfigDict(
        {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 20,
            "hidden_act": "quick_gelu",
        }
    )
    config.train = ConfigDict(
        {"steps": 15_000, "batch_size": 32, "accumulate": 1, "seed": 0, "ema_rate": 0.9995, "dtype": "float32"}
    )
    config.optimizer = ConfigDict(
        {
            "name": "muon",
            "learning_rate": 1.5e-3,
            "warmup_steps": 300,
            "schedule": "cosine",
            "b1": 0.95,
            "b2": 0.99,
            "weight_decay": 1e-2,
            "clip_norm": 1.0,
        }
    )
    config.export = ConfigDict({"dtype": "float16"})
    config.mesh = config_groups.mesh()
    config.checkpoint = config_groups.checkpoint(every_steps=500)  # best: or verifier@25
    config.log = config_groups.log(every_steps=50)
    config.sample = ConfigDict(
        {"every_steps": 1500, "prompts": 72, "steps": 25, "guidance_scale": 2.5, "batch_size": 36}
    )
    return config
