"""Distilling a model that inpaints: its step against the PyTorch reference, its student in diffusers' own client."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import reference_families
import reference_lcd
from numbered_noise import draw_noise
from reference_inpainting import build, image, mask
from shards import write_shards
from small_lcd import UNET, B, C, H, L, W, example, tree_from_torch
from whole_runs import shrunk_published

from lcm_jax.diffusion.consistency import guidance_embedding
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.objectives.lcd import LCD
from lcm_jax.pipeline import Pipeline
from lcm_jax.recipes import RECIPES
from lcm_jax.recipes.distillation import bind_networks, make_prepare
from lcm_jax.recipes.trained import bind_unet
from lcm_jax.sampling.generate import masked_channels
from lcm_jax.sampling.inputs import Inpainting, draw_image_noise
from lcm_jax.training.loop import train
from lcm_jax.training.step import make_loss

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")


class Beside(torch.nn.Module):
    """diffusers' UNet with what is kept behind its latents, for the reference."""

    def __init__(self, unet, masked):
        super().__init__()
        self.unet, self.masked = unet, torch.from_numpy(np.array(masked, np.float64)).permute(0, 3, 1, 2)

    def forward(self, z, t, **more):
        return self.unet(torch.cat([z, self.masked], dim=1), t, **more)


def test_loss_and_every_gradient_equal_the_pytorch_reference():
    """Of one whole Stable Diffusion, so that the mask, the autoencoder and the text encoder are those of a run."""
    vae = {
        "block_out_channels": [4, 4],
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "latent_channels": C,
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    }
    text = {
        "vocab_size": 11,
        "hidden_size": 12,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": L,
        "eos_token_id": 1,
    }
    unet = UNET | {
        "in_channels": 2 * C + 1,
        "block_out_channels": [8],
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
    }
    configs = {"unet": unet, "vae": vae, "text_encoder": text, "scheduler": reference_families.SCHEDULE}
    model = StableDiffusion.from_configs(configs | {"unet": unet | {"time_cond_proj_dim": 256}})
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda p: rng.standard_normal(p.shape).astype(np.float32) * 0.3, model.abstract_params())

    unets = []
    for seed, config in enumerate([model.unet.config, model.unet.config, unet]):
        torch.manual_seed(seed)
        unets.append(diffusers.UNet2DConditionModel(**{k: v for k, v in config.items() if v is not None}).double())
    student, target, teacher = (tree_from_torch({k: v.numpy() for k, v in u.state_dict().items()}) for u in unets)
    frozen, batch, draws = example()
    frozen = tree | {"unet": teacher, "empty_ids": frozen["empty_ids"]}
    masks = rng.integers(0, 2, (B, 2 * H, 2 * W, 1), np.uint8) * np.uint8(255)
    image = rng.integers(0, 256, (B, 2 * H, 2 * W, 3)).astype(np.uint8)
    batch = {"token_ids": batch["token_ids"], "time_ids": batch["time_ids"], "image": image, "mask": masks}

    pixels = image / np.float32(127.5) - 1
    masked = masked_channels(model, tree, Inpainting(pixels, np.float32(masks > 0), draws.posterior))
    ids = np.where(draws.keep_prompt[:, None], batch["token_ids"], frozen["empty_ids"])
    encode = lambda ids: np.array(model.encode_prompt(tree, ids).context)  # noqa: E731
    embedding = guidance_embedding(draws.w)
    expected = reference_lcd.distil(
        *(Beside(u, masked) for u in unets),
        model.to_latents(model.encode(tree["vae"], pixels), draws.posterior),
        encode(ids),
        encode(frozen["empty_ids"][None]),
        draws.noise,
        draws.index,
        draws.w,
        embedding,
        abar=reference_lcd.alphas_cumprod(0.00085, 0.012),
        prediction_type="epsilon",
        distance="huber",
    )

    own = lambda params, _: bind_unet(model, params["unet"])  # noqa: E731
    bind = bind_networks(own, StableDiffusion.from_configs(configs), model.schedule)
    step = jax.jit(jax.value_and_grad(make_loss(LCD(), bind, make_prepare(model)), has_aux=True))
    (total, _), gradients = step({"unet": student}, {"unet": target}, frozen, batch, draws)
    assert total == pytest.approx(expected.loss, rel=1e-4)
    theirs = tree_from_torch({k.removeprefix("unet."): v for k, v in expected.gradients.items()})
    assert theirs["conv_in"]["kernel"].shape[2] == 2 * C + 1

    def close(ours, reference):
        assert np.abs(ours - reference).max() <= 1e-4 * np.abs(reference).max() and np.abs(reference).max() > 0

    jax.tree.map(close, gradients["unet"], theirs)


@pytest.fixture
def teacher(tmp_path, monkeypatch) -> Path:
    """With a tiny autoencoder, so that a run with one is seen as well."""
    monkeypatch.setitem(reference_families.FAMILIES, "sd15", (*reference_families.PUBLISHED["sd15"][:2], True))
    (tmp_path / "tokenizers").mkdir()
    build(tmp_path / "tokenizers", "sd15")
    return tmp_path / "tokenizers" / "model"


def test_from_shards_to_a_student_that_diffusers_paints_with(teacher, tmp_path, monkeypatch):
    config = shrunk_published("sd15", teacher, write_shards(tmp_path / "shards"))
    config.train.dtype, config.train.remat = "float32", "none"
    assert train(RECIPES["lcd"](config, tmp_path / "run"), config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == [1, 2] and all(np.isfinite(line["loss"]) for line in trained)
    assert [line["step"] for line in lines if "frechet@1" in line] == [0, 2]
    assert json.loads((tmp_path / "run" / "report.json").read_text())["student"]["lcm"]["1"]["frechet"] >= 0

    client = diffusers.StableDiffusionInpaintPipeline.from_pretrained(tmp_path / "run" / "export")
    client.set_progress_bar_config(disable=True)
    ours = Pipeline.from_pretrained(tmp_path / "run" / "export")
    latents, _ = draw_noise(3, 1, 1, (8, 8, 4))
    own = torch.from_numpy(np.array(draw_image_noise(3, (8, 8, 4)))).permute(0, 3, 1, 2)
    monkeypatch.setattr("diffusers.models.autoencoders.vae.randn_tensor", lambda *_, **__: own)
    arguments = {
        "num_inference_steps": 1,
        "guidance_scale": 4.0,
        "image": image(),
        "mask_image": mask(),
        "output_type": "np",
        "height": 16,
        "width": 16,
    }
    theirs = client(
        "a red circle", latents=torch.from_numpy(np.array(latents)).permute(0, 3, 1, 2), strength=1.0, **arguments
    ).images
    found = ours("a red circle", seed=3, **arguments).images
    assert np.abs(theirs - found).max() * 255 <= 2 and np.std(found) > 0.01


def test_a_run_that_does_not_see_its_pictures_is_refused(teacher, tmp_path):
    config = shrunk_published("sd15", teacher, write_shards(tmp_path / "shards"), **{"data.encode": "cache"})
    with pytest.raises(
        ValueError, match="inpainting model, of which each step masks images anew; use --config.data.encode=step"
    ):
        RECIPES["lcd"](config, tmp_path / "run")
