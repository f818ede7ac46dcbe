"""The text encoder against transformers' CLIPTextModel on the same random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.models.clip import CLIPTextModel

BASE = {
    "model_type": "clip_text_model",
    "architectures": ["CLIPTextModel"],
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 2,
    "bos_token_id": 0,
    "pad_token_id": 1,
}

SMALL = {
    "as SD1": {},
    "as SD2": {"hidden_act": "gelu", "num_hidden_layers": 3, "hidden_size": 48, "num_attention_heads": 3},
    "eos named": {"eos_token_id": 99, "pad_token_id": 99, "num_attention_heads": 1, "intermediate_size": 40},
    "odd sizes": {"vocab_size": 113, "max_position_embeddings": 7, "hidden_size": 20, "layer_norm_eps": 1e-2},
    "as SDXL's second": {
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_act": "gelu",
        "projection_dim": 24,
        "eos_token_id": 99,
    },
    "eos inside": {"eos_token_id": 50, "num_hidden_layers": 1, "hidden_act": "gelu"},
}

# The text_encoder/config.json of Stable Diffusion 1.5, as published.
SD15 = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}


def reference_model(config, seed=0):
    """transformers' CLIPTextModel with every weight random, norms included, so that no term can hide."""
    torch = pytest.importorskip("torch")
    import transformers
    from transformers import CLIPTextConfig

    Reference = getattr(transformers, config["architectures"][0])
    torch.manual_seed(seed)
    options = {k: v for k, v in config.items() if k not in ("architectures", "model_type", "torch_dtype", "dropout")}
    model = Reference(CLIPTextConfig(**options, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            weight.copy_(1 + 0.2 * noise if "norm" in name and name.endswith("weight") else weight + 0.1 * noise)
    return model


def reference_params(model) -> dict:
    """Its tensors under the names of this project's parameter tree."""
    tree: dict = {}
    for key, tensor in model.state_dict().items():
        if key.endswith("position_ids"):
            continue
        *parents, leaf = (
            (key if key.startswith("text_projection") else "text_model." + key.removeprefix("text_model."))
            .replace("layers.", "layers_")
            .split(".")
        )
        array = tensor.numpy()
        if leaf == "weight":
            leaf = "embedding" if "embedding" in parents[-1] else "kernel" if array.ndim == 2 else "scale"
            array = array.T if leaf == "kernel" else array
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = array
    return tree


def token_ids(config, batch=3):
    length, eos = config["max_position_embeddings"], config["eos_token_id"]
    ids = np.random.default_rng(0).integers(3, config["vocab_size"] - 1, (batch, length)).astype(np.int32)
    if eos != 2:  # at several places, twice in a row, and nowhere
        ids[ids == eos] = 3
        ids[0, 4:6] = ids[1, -1] = eos
    return ids


def assert_parity(config, tolerance=1e-4):
    torch = pytest.importorskip("torch")

    model, ids = reference_model(config), token_ids(config)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids).long(), output_hidden_states=True)
    ours = jax.jit(CLIPTextModel.from_config(config).apply)({"params": reference_params(model)}, ids)

    def close(a, b):
        b = b.numpy()
        assert a.shape == b.shape
        assert np.abs(np.asarray(a) - b).max() <= tolerance * np.abs(b).max()

    close(ours.last_hidden_state, expected.last_hidden_state)
    close(ours.pooled, expected.pooler_output if "pooler_output" in expected else expected.text_embeds)
    assert len(ours.hidden_states) == len(expected.hidden_states) == config["num_hidden_layers"] + 1
    for a, b in zip(ours.hidden_states, expected.hidden_states, strict=True):
        close(a, b)


@pytest.mark.parametrize("name", SMALL)
def test_equals_transformers(name):
    assert_parity(BASE | SMALL[name])


@pytest.mark.slow
def test_full_size_equals_transformers():
    assert_parity(SD15)


@pytest.mark.parametrize("config", [BASE, BASE | SMALL["as SDXL's second"], SD15 | {"num_hidden_layers": 2}])
def test_parameters_have_the_names_and_shapes_of_the_files(config):
    ours = jax.eval_shape(CLIPTextModel.from_config(config).init, jax.random.key(0), jnp.zeros((1, 5), jnp.int32))
    theirs = reference_params(reference_model(config))
    paths = lambda tree: {jax.tree_util.keystr(p): (x.shape, str(x.dtype)) for p, x in jax.tree.leaves_with_path(tree)}  # noqa: E731
    assert paths(ours["params"]) == paths(theirs)


def test_attention_is_causal():
    model, ids = CLIPTextModel.from_config(BASE), token_ids(BASE)
    params = model.init(jax.random.key(0), ids)
    changed = ids.copy()
    changed[:, 9:] = 5
    before, after = (model.apply(params, x).last_hidden_state for x in (ids, changed))
    np.testing.assert_array_equal(before[:, :9], after[:, :9])
    assert not np.allclose(before[:, 9:], after[:, 9:])


def test_bfloat16_computes_near_float32_and_keeps_float32_parameters():
    ids = token_ids(BASE)
    full, half = CLIPTextModel.from_config(BASE), CLIPTextModel.from_config(BASE, dtype=jnp.bfloat16)
    params = half.init(jax.random.key(0), ids)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    a, b = full.apply(params, ids).last_hidden_state, half.apply(params, ids).last_hidden_state
    assert b.dtype == jnp.bfloat16
    assert np.abs(a - b.astype(jnp.float32)).max() < 0.05 * np.abs(a).max()


def test_initial_values_suit_training_from_scratch():
    config = BASE | {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 8, "vocab_size": 1000}
    params = CLIPTextModel.from_config(config).init(jax.random.key(0), token_ids(config))["params"]["text_model"]
    layer = params["encoder"]["layers_7"]

    def std(x):
        return float(np.std(x))

    assert std(params["embeddings"]["token_embedding"]["embedding"]) == pytest.approx(0.02, rel=0.05)
    assert std(params["embeddings"]["position_embedding"]["embedding"]) == pytest.approx(0.01, rel=0.1)
    assert std(layer["self_attn"]["q_proj"]["kernel"]) == pytest.approx(128**-0.5, rel=0.05)
    assert std(layer["self_attn"]["out_proj"]["kernel"]) == pytest.approx(128**-0.5 / 4, rel=0.05)
    assert std(layer["mlp"]["fc1"]["kernel"]) == pytest.approx(256**-0.5, rel=0.05)
    assert std(layer["mlp"]["fc2"]["kernel"]) == pytest.approx(128**-0.5 / 4, rel=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"num_hidden_layers": True, "vocab_size": 1e30}, "vocab_size=1e.30 .supported: an integer in 1.*layers=True"),
        ({"eos_token_id": [1, 2]}, r"eos_token_id=\[1, 2\]"),
        ({"num_attention_heads": 5}, "hidden_size=32 is not a multiple of num_attention_heads=5"),
        ({"model_type": "t5"}, "model_type='t5'"),
        ({"architectures": ["CLIPVisionModel"]}, "architectures=.*CLIPVisionModel"),
        ({"rotary": True}, r"rotary=True \(unknown option\)"),
    ],
)
def test_an_unsupported_option_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        CLIPTextModel.from_config(BASE | change)


def test_the_boilerplate_of_this_transformers_is_tolerated():
    from transformers import CLIPTextConfig

    CLIPTextModel.from_config(CLIPTextConfig(**{k: v for k, v in BASE.items() if k != "model_type"}).to_dict())


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match="17 tokens exceed max_position_embeddings 16"):
        CLIPTextModel.from_config(BASE).init(jax.random.key(0), jnp.zeros((1, 17), jnp.int32))
