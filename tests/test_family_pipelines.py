"""Each family's whole pipeline on tiny random weights: diffusers writes it, we read it, the pictures are the same."""

import numpy as np
import pytest
import reference_families
from numbered_noise import draw_noise
from reference_families import LATENTS, PROMPTS, SIZE, to_torch

import lcm_jax
from lcm_jax.data.prompts import encode_prompts

torch = pytest.importorskip("torch")

MORE = {  # diffusers' zeros for no negative prompt are not those of an empty one, and its empty prompt is none either
    "sd21-768": {"negative_prompt": ["a circle", ""], "clip_skip": 1},
    "sdxl-turbo": {"prompt": ["", "a photo of a square"]},
    "ssd1b": {"negative_prompt": ["a circle", ""], "clip_skip": 1},
    "lcm-sdxl": {"clip_skip": 1},
}


@pytest.mark.parametrize("family", reference_families.FAMILIES)
def test_reads_samples_and_writes_as_diffusers_does(family, tmp_path, monkeypatch):
    theirs = reference_families.build(tmp_path, family)
    theirs.save_pretrained(tmp_path / "theirs")
    theirs.text_encoder.__dict__["text_model"] = theirs.text_encoder  # where diffusers looks for the last norm
    ours = lcm_jax.Pipeline.from_pretrained(tmp_path / "theirs")
    latents, noise = draw_noise(3, 2, 4, LATENTS[1:])
    draws = iter(noise)
    for module in ("scheduling_lcm", "scheduling_euler_ancestral_discrete"):
        monkeypatch.setattr(
            f"diffusers.schedulers.{module}.randn_tensor", lambda *_, **__: to_torch(next(draws, noise[-1]))
        )
    arguments = {"num_inference_steps": 4, "guidance_scale": 3.0} | SIZE
    if "text_encoder_2" in theirs.components:  # the size told and the size drawn may differ
        arguments |= {"original_size": (40, 30), "crops_coords_top_left": (2, 5), "target_size": (16, 24)}
    arguments |= {"prompt": PROMPTS} | MORE.get(family, {})
    # diffusers multiplies the first latents by the schedule's first sigma, where it has one.
    expected = theirs(latents=to_torch(latents), output_type="latent", **arguments).images
    found = ours(seed=3, output_type="latent", **arguments).images
    expected = expected.numpy().transpose(0, 2, 3, 1)
    assert found.shape == LATENTS
    np.testing.assert_allclose(found, expected, atol=5e-4 * np.abs(expected).max())

    once = arguments | {"num_inference_steps": 1, "output_type": "np"}
    picture = ours(latents=np.asarray(latents), **once).images
    ours.save_pretrained(tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours")
    again.set_progress_bar_config(disable=True)
    again.text_encoder.__dict__["text_model"] = again.text_encoder
    expected = again(latents=to_torch(latents), **once).images
    assert np.abs(picture - expected).max() * 255 <= 2 and np.std(picture) > 0.01

    names = {"unet", "vae", "text_encoder", "text_encoder_2"} & set(theirs.components)
    for name in names:
        before, after = (getattr(pipe, name).state_dict() for pipe in (theirs, again))
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_half_precision_spares_an_autoencoder_that_overflows_in_it(tmp_path):
    """SDXL's own is computed in float32; the fp16-fix says that it needs none, as diffusers understands them."""
    theirs = reference_families.build(tmp_path, "sdxl")
    theirs.save_pretrained(tmp_path / "model")
    ours = lcm_jax.Pipeline.from_pretrained(tmp_path / "model", "float16")
    assert ours.model.dtype_of("vae") == np.float32
    assert all(ours.model.dtype_of(name) == np.float16 for name in ours.model.networks if name != "vae")
    latents = np.asarray(draw_noise(3, 2, 1, LATENTS[1:])[0])
    arguments = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"} | SIZE
    expected = theirs.to(torch.float16)(PROMPTS, latents=to_torch(latents).half(), **arguments).images
    found = ours(PROMPTS, latents=latents, **arguments).images
    assert np.std(found) > 0.01 and np.abs(found - expected).max() * 255 <= 2

    theirs.vae.register_to_config(force_upcast=False)
    theirs.save_pretrained(tmp_path / "fixed")
    fixed = lcm_jax.Pipeline.from_pretrained(tmp_path / "fixed", "float16")
    assert fixed.model.dtype_of("vae") == np.float16
    np.testing.assert_allclose(
        fixed.model.decode(fixed.params["vae"], latents), ours.model.decode(ours.params["vae"], latents), atol=0.02
    )
    large = latents * np.float32(1e4)  # what a layer of the autoencoder makes of it is beyond 65504
    for pipe, finite in [(ours, True), (fixed, False)]:
        assert np.isfinite(pipe.model.decode(pipe.params["vae"], large)).all() == finite


def test_the_second_tokenizer_pads_in_its_own_way(tmp_path):
    reference_families.build(tmp_path, "sdxl").save_pretrained(tmp_path / "model")
    ids = lcm_jax.Pipeline.from_pretrained(tmp_path / "model").tokenize(["a circle"])
    assert ids.shape == (1, 2, reference_families.LENGTH)
    np.testing.assert_array_equal(ids[0, 0, :4], ids[0, 1, :4])
    assert (ids[0, 0, 4:] != ids[0, 1, 4:]).all()


def test_long_and_weighted_prompts_of_two_encoders(tmp_path):
    """Each encoder restores the mean of its own chunks, as in A1111; the pooled prompt is the first chunk's."""
    theirs = reference_families.build(tmp_path, "sdxl")
    theirs.save_pretrained(tmp_path / "model")
    ours = lcm_jax.Pipeline.from_pretrained(tmp_path / "model")
    texts = ["a (photo:1.4) BREAK of a [square]", "a red circle", ""]
    ids, weights, chunks = encode_prompts(ours.tokenizers, texts, weighted=True)
    assert ids.shape[:3] == (3, 2, 2) and chunks.tolist() == [2, 1, 1]
    states, pooled = [], None
    for i, encoder in enumerate((theirs.text_encoder, theirs.text_encoder_2)):
        parts = []
        for j in range(2):
            output = encoder(torch.tensor(ids[:, i, j]).long(), output_hidden_states=True)
            z = output.hidden_states[-2]
            scaled = z * torch.tensor(weights[:, i, j])[..., None]
            parts.append(scaled * (z.mean((1, 2)) / scaled.mean((1, 2)))[:, None, None])
            pooled = output[0] if (i, j) == (1, 0) else pooled
        states.append(torch.cat(parts, 1))
    time_ids = np.zeros((3, 6), np.float32)
    for zero_empty in (True, False):
        found = ours.model.encode_prompt(ours.params, ids, time_ids, token_weights=weights, zero_empty=zero_empty)
        kept = np.array([1, 1, not zero_empty])[:, None]
        expected = torch.cat(states, -1).detach().numpy() * kept[..., None]
        np.testing.assert_allclose(found.context, expected, atol=2e-4, rtol=1e-3)
        np.testing.assert_allclose(found.pooled, pooled.detach().numpy() * kept, atol=1e-5)
