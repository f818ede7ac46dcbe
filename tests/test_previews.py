"""Models that previews and reports compare: their samplers and scales, their figures, and the curve of these."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from whole_runs import load_config

from lcm_jax.diffusion.schedule import make_schedule
from lcm_jax.evaluation import report
from lcm_jax.evaluation.curve import draw_curve, group_figures
from lcm_jax.evaluation.metrics import METRICS
from lcm_jax.models.conditioning import Conditioning
from lcm_jax.recipes.curve import finish_previews
from lcm_jax.recipes.diffusion import SCHEDULE
from lcm_jax.recipes.previews import Candidate, check_samplers, preview_figures
from lcm_jax.sampling.preview import PreviewSampler


def candidate(scheduler: str, width: int | None, name: str = "student") -> Candidate:
    model = SimpleNamespace(scheduler={"_class_name": scheduler}, guidance_embedding_dim=width)
    return Candidate(name, model, lambda trained, frozen: trained)


@pytest.mark.parametrize(
    ("scheduler", "width", "sampler", "scale"),
    [
        ("DDIMScheduler", None, "ddim", 8.0),
        ("LCMScheduler", 256, "lcm", 8.0),
        ("LCMScheduler", None, "lcm", 1.0),  # its guidance was fixed in training
    ],
)
def test_a_candidate_has_its_sampler_and_its_scale(scheduler, width, sampler, scale):
    student = candidate(scheduler, width)
    assert student.sampler == sampler and student.guidance_scale(8.0) == scale
    config = load_config("shapes")
    assert candidate(scheduler, width, "teacher").preview_steps(config) == (50,)
    assert student.preview_steps(config) == (1, 2, 4, 8)


def test_a_candidate_without_a_plan_is_refused():
    config = load_config("shapes")
    config.sample.init_steps = (1, 2)
    with pytest.raises(ValueError, match=r"^the config has no report.init; add its steps by sampler, such as lcm="):
        check_samplers(config, [candidate("LCMScheduler", 256, "init"), candidate("LCMScheduler", 256)])


def test_figures_are_those_of_every_metric_at_every_number_of_steps():
    config, student = load_config("shapes"), candidate("LCMScheduler", 256)
    assert preview_figures(config, student) == {
        f"{name}@{n}": lower for name, lower in (("verifier", False), ("frechet", True)) for n in (1, 2, 4, 8)
    }
    config.sample.scored_prompts = 0
    assert preview_figures(config, student) == {}
    assert all(name in metric.columns for name, metric in METRICS.items()), "the number of a figure is in that column"


def tiny_world() -> SimpleNamespace:
    """A model of no weights, whose noise prediction is its prompt's number, and which records its batch sizes."""
    scheduler = {"_class_name": "DDIMScheduler", "prediction_type": "epsilon", "timestep_spacing": "trailing"}
    batches = []

    def denoise(params, z, t, conditioning):
        batches.append(len(z))
        assert conditioning.guidance is None and conditioning.masked is None
        return jnp.broadcast_to(conditioning.context[:, :, None, None], z.shape)

    return SimpleNamespace(
        batches=batches,
        scheduler=scheduler,
        schedule=make_schedule(SCHEDULE | scheduler),
        guidance_embedding_dim=None,
        text_encoder_2=None,
        networks=("unet", "vae"),
        downscale=1,
        vae=SimpleNamespace(config={"latent_channels": 3}),
        unet=SimpleNamespace(dtype=jnp.float32),
        encode_prompt=lambda params, ids, time_ids, **_: Conditioning(ids[:, :1] / 10.0),
        denoise=denoise,
        decode=lambda params, z, tile: z,
    )


def test_a_model_at_scale_1_is_one_pass_with_the_same_images():
    model, tokenize = tiny_world(), lambda prompts: np.array([[len(prompt)] for prompt in prompts], np.int32)
    sampler = PreviewSampler(model, tokenize, ["a", "bcd"], 4, 2)
    params = {"unet": jnp.zeros(1), "vae": jnp.zeros(1)}
    once, _ = sampler(params, "ddim", 2, 1.0)
    assert set(model.batches) == {2}
    guided, _ = sampler(params, "ddim", 2, float(np.nextafter(np.float32(1), 2)))
    assert set(model.batches) == {2, 4}, "the prompts, and the empty prompt"
    assert np.abs(once.astype(int) - guided).max() <= 1 and np.std(once) > 1


def test_a_report_names_its_models_their_scales_and_both_checkpoints():
    figures = {"frechet": 2.0, "images_per_s": 1.0}
    rows = [{"model": who, "sampler": "lcm", "steps": 4} | figures for who in ("init", "student")]
    compared = {
        "figure": "frechet@4",
        "folder": "runs/x/best",
        "best": {"step": 400, "value": 12.3},
        "last": {"step": 1000, "value": 14.0},
    }
    content = report.nest(rows) | {
        "captions": 2,
        "guidance_scale": 8.0,
        "guidance_scales": {"init": 8.0, "student": 1.0},
        "composition": {"captions": 3, "init": {"lcm": {"4": 0.5}}, "student": {"lcm": {"4": 0.75}}},
        "device": "cpu",
        "checkpoints": compared,
    }
    assert report.rows_of(content) == rows
    text = report.markdown(content)
    assert text.startswith("# Student and init\n") and "guidance scale 8.0 (init), 1.0 (student), the same" in text
    assert "3 captions: init lcm 4 50.0%, student lcm 4 75.0%." in text
    assert "Best frechet@4 of the previews: 12.3 at step 400 (runs/x/best); last: 14 at step 1000." in text


RECORDS = [
    {"step": step, "frechet@4": 90 / (step + 1), "frechet@1": 200 / (step + 1), "verifier@4": step / 10, "error": 0.5}
    | {"verifier/counting@4": 0.25}
    for step in (0, 2, 4)
]


def test_a_curve_has_a_panel_for_each_metric_and_a_line_for_each_number_of_steps(tmp_path):
    assert group_figures(RECORDS) == {
        "frechet": ["frechet@1", "frechet@4"],
        "verifier": ["verifier@4"],
        "error": ["error"],
    }
    draw_curve(RECORDS, tmp_path / "curve.png", "shapes", best=("frechet@4", 4))
    image = Image.open(tmp_path / "curve.png")
    assert image.width > 3 * image.height and np.std(np.asarray(image)) > 10


def test_a_run_without_figures_has_no_curve_and_a_best_that_was_asked_for_too_late_is_named(tmp_path, capsys):
    config = load_config("shapes")
    assert finish_previews(config, tmp_path) is None and not list(tmp_path.iterdir())
    lines = [record | {"preview_seconds": 1.0} for record in RECORDS] + [{"step": 4, "loss": 0.5}]
    damaged = ["{", '{"step": 3, "preview_seconds": 1.0, "frechet@4": "x"}', "[]"]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*map(json.dumps, lines), *damaged]) + "\n")
    config.checkpoint.best = "frechet@4"
    assert finish_previews(config, tmp_path) is None and (tmp_path / "curve.png").stat().st_size > 1000
    assert "there is no best checkpoint by frechet@4; set checkpoint.best before" in capsys.readouterr().out
