"""Latent consistency fine-tuning: equal to the PyTorch reference, and a step without a teacher."""

import jax
import numpy as np
import pytest
from small_lcd import (
    PREDICTION_TYPES,
    PREPARE,
    assert_gradients_equal,
    bind_to,
    example,
    schedule,
    to_latents,
    torch_unets,
    tree_from_torch,
    unet_networks,
)

from lcm_jax.diffusion.consistency import guidance_embedding
from lcm_jax.objectives.lcf import LCF
from lcm_jax.objectives.networks import Networks
from lcm_jax.training.step import make_loss


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("distance, weighting", [("l2", "uniform"), ("huber", "inverse_sigma")])
def test_loss_and_every_gradient_equal_the_pytorch_reference(prediction_type, distance, weighting):
    pytest.importorskip("torch")
    import reference_lcd
    import reference_lcf

    student, target, _ = torch_unets()
    params = [tree_from_torch({k: v.numpy() for k, v in unet.state_dict().items()}) for unet in (student, target)]
    frozen, batch, draws = example()
    token_ids = np.where(draws.keep_prompt[:, None], batch["token_ids"], frozen["empty_ids"])
    total, gradients = reference_lcf.fine_tune(
        student,
        target,
        np.array(to_latents(batch["moments"], draws.posterior)),
        frozen["text_encoder"]["table"][token_ids],
        draws.noise,
        draws.index,
        guidance_embedding(draws.w),
        abar=reference_lcd.alphas_cumprod(0.00085, 0.012),
        prediction_type=prediction_type,
        distance=distance,
        weighting=weighting,
    )

    objective = LCF(distance=distance, weighting=weighting)
    loss = make_loss(objective, bind_to(*unet_networks(), schedule(prediction_type)), PREPARE)
    step = jax.value_and_grad(loss, has_aux=True)
    # There is no teacher: whatever is bound to its place is never called.
    (ours, _), ours_gradients = step({"unet": params[0]}, {"unet": params[1]}, frozen | {"unet": None}, batch, draws)
    assert ours == pytest.approx(total, rel=1e-4)
    assert_gradients_equal(ours_gradients["unet"], gradients)


def test_the_target_receives_no_gradient_and_at_the_boundary_it_is_the_data():
    frozen, batch, draws = example()
    plan, seen = schedule("sample"), {}

    def network(name):
        def denoise(scale, z, t, conditioning):
            seen[name] = (z, t, conditioning.guidance)
            return scale["unet"] * z

        return denoise

    def bind(params, target, frozen):
        bound = (lambda *a, n=name, p=p: network(n)(p, *a) for name, p in (("student", params), ("target", target)))
        return Networks(*bound, None, plan)

    loss = make_loss(LCF(distance="l2"), bind, PREPARE)
    one = {"unet": np.float32(1.0)}
    gradients = jax.grad(loss, argnums=(0, 1), has_aux=True)(one, one, frozen, batch, draws)[0]
    assert gradients[0]["unet"] != 0 and gradients[1]["unet"] == 0

    loss(one, one, frozen, batch, draws)
    (z_s, s, w_s), (z_t, t, w_t) = seen["student"], seen["target"]
    np.testing.assert_array_equal(s, [19, 999, 159, 519])
    np.testing.assert_array_equal(t, [0, 979, 139, 499])
    np.testing.assert_array_equal(w_s, draws.w)
    np.testing.assert_array_equal(w_t, draws.w)
    # Both points have the same noise: what is left of each without its share of the data is proportional.
    z = np.asarray(to_latents(batch["moments"], draws.posterior))
    for point, time in ((z_s, s), (z_t, t)):
        abar = np.asarray(plan.alphas_cumprod)[np.asarray(time)][:, None, None, None]
        np.testing.assert_allclose((point - np.sqrt(abar) * z) / np.sqrt(1 - abar), draws.noise, atol=2e-4)
