"""A few modules of a model and an update of each, for tests of LoRA files."""

import numpy as np

from lcm_jax.weights.lora import LoRA, Update

CROSS = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
TEXT = "text_model.encoder.layers.0"


def base(width: int = 12) -> dict:
    """A few modules of a UNet and a text encoder: a matrix, a convolution, one that reads a text of `width`."""
    rng = np.random.default_rng(0)
    shapes = {
        "unet": {
            f"{CROSS}.to_q.weight": (8, 8),
            f"{CROSS}.to_k.weight": (8, width),
            f"{CROSS}.to_out.0.weight": (8, 8),
            "down_blocks.0.resnets.0.conv1.weight": (8, 4, 3, 3),
            "mid_block.resnets.0.norm1.weight": (8,),
            "time_embedding.linear_1.weight": (16, 8),
        },
        "text_encoder": {f"{TEXT}.self_attn.q_proj.weight": (6, 6), f"{TEXT}.mlp.fc1.weight": (24, 6)},
    }
    return {
        component: {key: rng.normal(size=shape).astype(np.float32) for key, shape in tensors.items()}
        for component, tensors in shapes.items()
    }


def example(dtype=np.float16, alpha: float | None = 3.0) -> LoRA:
    """An update of rank 2 for each module, but for one of rank 4 with an alpha of its own."""
    rng = np.random.default_rng(1)
    updates: dict = {}
    for component, tensors in base().items():
        for key, weight in tensors.items():
            if weight.ndim == 1:
                continue
            rank, own = (4, 1.5) if key.endswith("to_k.weight") else (2, alpha)
            down = rng.normal(size=(rank, *weight.shape[1:])).astype(dtype)
            up = rng.normal(size=(weight.shape[0], rank, *(1,) * (weight.ndim - 2))).astype(dtype)
            value = None if alpha is None else np.asarray(own, dtype)
            updates.setdefault(component, {})[key.removesuffix(".weight")] = Update(down, up, value)
    return LoRA(updates, {"ss_network_module": "networks.lora"})


def assert_same(a: LoRA, b: LoRA):
    assert a.metadata == b.metadata and a.updates.keys() == b.updates.keys()
    for component in a.updates:
        assert a.updates[component].keys() == b.updates[component].keys()
        for module, update in a.updates[component].items():
            for mine, theirs in zip(update, b.updates[component][module], strict=True):
                assert (mine is None) == (theirs is None)
                if mine is not None:
                    assert (mine.dtype, mine.shape, mine.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes())
