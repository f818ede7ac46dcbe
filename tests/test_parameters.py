"""Parameters are cast once, when they are read; what is added to them and what is written does not lose a bit."""

import pickle
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from safetensors.numpy import save_file

from lcm_jax.pipeline import Pipeline
from lcm_jax.sampling.finite import Finite, check_finite
from lcm_jax.weights import lora as loras
from lcm_jax.weights.errors import ModelError
from lcm_jax.weights.model import open_model

DTYPES = [("float16", "float32"), ("float16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float16")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By dtype, a model that is stored in it; and as "lora" the file of a LoRA of its attention."""
    place = tmp_path_factory.mktemp("models")
    pipe = Pipeline.from_pretrained(tiny_model.write(place / "float32", unet=tiny_model.SHALLOW))
    for dtype in ("float16", "bfloat16"):
        pipe.save_pretrained(place / dtype, dtype=dtype)
    rng, updates = np.random.default_rng(0), {}
    for key, tensor in open_model(place / "float32").tensors["unet"].items():
        if re.search(r"attn\d\.to_[qkv]\.weight$", key):
            up, down = (
                rng.standard_normal(shape).astype(np.float32) for shape in ((len(tensor), 2), (2, tensor.shape[1]))
            )
            updates[key.removesuffix(".weight")] = loras.Update(down, up, np.asarray(0.2, np.float32))
    written, metadata = loras.to_kohya(loras.LoRA({"unet": updates}, {}))
    save_file(written, place / "lora.safetensors", metadata)
    return place


def tensors_of(folder):
    """Return (dtype, bytes) of every tensor of a model, by network and key."""
    tensors = open_model(folder).tensors
    return {(name, key): (t.dtype, t.tobytes()) for name, each in tensors.items() for key, t in each.items()}


def bits(params):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]


@pytest.mark.parametrize("stored, computed", DTYPES)
def test_what_is_written_is_exact_with_loras_and_without(folders, tmp_path, stored, computed):
    pipe = Pipeline.from_pretrained(folders / stored, computed)
    before = bits(pipe.params)
    assert {(leaf.ndim >= 2, str(leaf.dtype)) for leaf in jax.tree.leaves(pipe.params)} == {
        (True, computed),
        (False, "float32"),
    }
    plain = Pipeline.from_pretrained(folders / stored, "float32")
    plain.load_lora(folders / "lora.safetensors", 0.5)
    plain.save_pretrained(tmp_path / "expected")
    pipe.load_lora(folders / "lora.safetensors", 2.0)
    pipe.set_lora_weight("lora", 0.5)
    pipe.save_pretrained(tmp_path / "merged")
    assert tensors_of(tmp_path / "merged") == tensors_of(tmp_path / "expected") != tensors_of(folders / stored)
    assert bits(pipe.params) == bits(Pipeline.from_pretrained(tmp_path / "merged", computed).params) != before
    pipe.unload_lora()
    assert bits(pipe.params) == before
    pipe.save_pretrained(tmp_path / "again")
    assert tensors_of(tmp_path / "again") == tensors_of(folders / stored)


def test_a_program_casts_no_matrix(folders):
    """All parameters of two axes or more are used as they are held."""
    pipe = Pipeline.from_pretrained(folders / "float16", "bfloat16")
    z, t = jnp.zeros((1, 8, 8, 4)), jnp.zeros(1, jnp.int32)

    def run(params):
        prompt = pipe.model.encode_prompt(params, jnp.zeros((1, 20), jnp.int32))
        return pipe.model.denoise(params["unet"], z, t, prompt), pipe.model.decode(params["vae"], z)

    jaxpr = jax.make_jaxpr(run)(pipe.params).jaxpr
    matrices = {v for v in jaxpr.invars if v.aval.ndim >= 2}
    casts = [each for each in jaxpr.eqns if each.primitive.name == "convert_element_type"]
    assert not [each for each in casts if each.invars[0] in matrices]


def test_a_narrowed_model_is_pickled_with_what_its_files_hold(folders, tmp_path):
    folder = shutil.copytree(folders / "float32", tmp_path / "model")
    again = pickle.loads(pickle.dumps(Pipeline.from_pretrained(folder, "bfloat16")))
    shutil.rmtree(folder / "unet")
    again.save_pretrained(tmp_path / "again")
    assert tensors_of(tmp_path / "again") == tensors_of(folders / "float32")


def test_files_that_are_gone_or_have_changed_are_an_error(folders, tmp_path):
    folder = shutil.copytree(folders / "float32", tmp_path / "model")
    narrow, same = (Pipeline.from_pretrained(folder, dtype) for dtype in ("bfloat16", "float32"))
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-4096:] = bytes(4096)
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"\S+weight of .*model has changed since it was read; open the model again"):
        narrow.save_pretrained(tmp_path / "other")
    file.unlink()
    with pytest.raises(ModelError, match=r"\S+ of .*model cannot be read again \(.*\); open the model again"):
        narrow.load_lora(folders / "lora.safetensors")
    assert not (tmp_path / "other").exists() and narrow.lora_weights == {}
    same.load_lora(folders / "lora.safetensors")
    same.save_pretrained(tmp_path / "merged")  # it holds every bit


def test_weights_that_overflow_in_the_compute_dtype_are_named(folders, tmp_path):
    pipe = Pipeline.from_pretrained(folders / "float32")
    kernel = pipe.params["unet"]["conv_in"]["kernel"]
    pipe.params["unet"]["conv_in"]["kernel"] = kernel.at[0].set(1e6)
    pipe.save_pretrained(tmp_path / "large")
    half = Pipeline.from_pretrained(tmp_path / "large", "float16")
    bad = Finite(np.True_, None, np.False_, None)  # pyright: ignore[reportArgumentType]
    message = "conv_in.weight of the unet contains NaN or infinity; use dtype float32 or bfloat16, fetch the weights"
    with pytest.raises(ModelError, match=message):
        check_finite(bad, half.params, half.model.unet.dtype, half.name)
