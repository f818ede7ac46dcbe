"""Latent consistency distillation: equal to the PyTorch reference, and a test for what implementers get wrong."""

import math
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_lcd import (
    PREDICTION_TYPES,
    PREPARE,
    SCHEDULER,
    STUDENT,
    B,
    C,
    H,
    L,
    W,
    assert_gradients_equal,
    bind_to,
    encode_prompt,
    example,
    schedule,
    to_latents,
    torch_unets,
    tree_from_torch,
    unet_networks,
)

from lcm_jax.diffusion.consistency import boundary_scalings, consistency_function, guidance_embedding
from lcm_jax.diffusion.guidance import classifier_free, scheduled_guidance
from lcm_jax.diffusion.schedule import add_noise, alpha_sigma, predict_noise, predict_x0, skipping_steps
from lcm_jax.diffusion.solvers import ddim_step
from lcm_jax.models.conditioning import Conditioning
from lcm_jax.models.unet import UNet2DCondition
from lcm_jax.objectives import backward_simulation, consistency
from lcm_jax.objectives.backward_simulation import BackwardSimulation
from lcm_jax.objectives.lcd import LCD
from lcm_jax.ranges import from_settings
from lcm_jax.training.state import create_state, make_optimizer
from lcm_jax.training.step import make_loss, make_train_step

# --- parity ---


@pytest.mark.parametrize(
    "distance, weighting, fraction, guidance_schedule",
    [("l2", "uniform", 0.0, ()), ("huber", "inverse_sigma", 0.5, ((0, 0.0), (160, math.inf), (700, 4.5)))],
)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_loss_and_every_gradient_equal_the_pytorch_reference(
    prediction_type, distance, weighting, fraction, guidance_schedule
):
    pytest.importorskip("torch")
    import reference_lcd

    unets = torch_unets()
    student, target, teacher = (tree_from_torch({k: v.numpy() for k, v in unet.state_dict().items()}) for unet in unets)
    frozen, batch, draws = example()
    token_ids = np.where(draws.keep_prompt[:, None], batch["token_ids"], frozen["empty_ids"])
    table = frozen["text_encoder"]["table"]
    # The embedding's angles reach 13,250, where float32 is good to 1e-3 only: both sides start from the same one.
    embedding = guidance_embedding(draws.w)
    np.testing.assert_allclose(embedding, [reference_lcd.embed_guidance(float(w)) for w in draws.w], atol=1.5e-3)
    abar, z = reference_lcd.alphas_cumprod(0.00085, 0.012), np.array(to_latents(batch["moments"], draws.posterior))
    if fraction:
        z[::2] = reference_lcd.own_pictures(
            unets[1],
            draws.posterior[::2],
            table[token_ids][::2],
            embedding[::2],
            abar=abar,
            prediction_type=prediction_type,
        )
    expected = reference_lcd.distil(
        *unets,
        z,
        table[token_ids],
        table[frozen["empty_ids"]][None],
        draws.noise,
        draws.index,
        draws.w,
        embedding,
        abar=abar,
        prediction_type=prediction_type,
        distance=distance,
        weighting=weighting,
        w_caps=guidance_schedule,
    )

    objective = LCD(distance=distance, weighting=weighting, guidance_schedule=guidance_schedule)
    if fraction:
        objective = BackwardSimulation(objective, fraction)
        draws = backward_simulation.Draws(draws, np.array([True, False, True, False]))
    loss = make_loss(objective, bind_to(*unet_networks(), schedule(prediction_type)), PREPARE)
    step = jax.value_and_grad(loss, has_aux=True)
    (total, metrics), gradients = step({"unet": student}, {"unet": target}, frozen | {"unet": teacher}, batch, draws)

    assert total == pytest.approx(expected.loss, rel=1e-4)
    assert metrics["loss"] == total
    assert_gradients_equal(gradients["unet"], expected.gradients)


def test_the_reference_follows_the_published_tables():
    """The reference is no judge unless it agrees with what others ship: the schedule, the solver, w's embedding."""
    torch = pytest.importorskip("torch")
    import reference_lcd
    from diffusers import DDIMScheduler, LatentConsistencyModelPipeline

    abar = reference_lcd.alphas_cumprod(0.00085, 0.012)
    theirs = DDIMScheduler(**SCHEDULER).alphas_cumprod.numpy()
    np.testing.assert_allclose(abar, theirs, rtol=2e-5)
    embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    published = embed(None, torch.tensor([7.5], dtype=torch.float64), 256, torch.float64)[0]
    np.testing.assert_allclose(reference_lcd.embed_guidance(7.5), published, atol=1e-3)


def test_w_is_clipped_by_its_schedule():
    w, t = jnp.full(6, 6.0), jnp.int32([124, 299, 300, 699, 700, 999])
    assert scheduled_guidance(w, t, ((0, 0.0), (300, math.inf), (700, 4.5))).tolist() == [0.0, 0.0, 6.0, 6.0, 4.5, 4.5]
    assert scheduled_guidance(w, t, ()).tolist() == w.tolist()
    assert scheduled_guidance(w, t, ((700, 9.0),)).tolist() == w.tolist(), "a schedule never adds"


# --- golden values of the method ---


def test_golden_guidance_embedding():
    """Pitfall 2: float32 whatever comes in; in bfloat16 it would be off by about 2."""
    for w in (jnp.float32([7.5]), jnp.bfloat16([7.5])):
        embedding = guidance_embedding(w)
        assert embedding.shape == (1, 256) and embedding.dtype == jnp.float32
        np.testing.assert_allclose(embedding[0, :3], [-0.85124, 0.84213, 0.01188], atol=2e-4)
        np.testing.assert_allclose(embedding[0, 128], -0.52478, atol=2e-4)
    angle = 1000.0 * 3.7 * np.exp(-np.arange(128) * np.log(1e4) / 127)
    np.testing.assert_allclose(guidance_embedding(jnp.float32([3.7]))[0], [*np.sin(angle), *np.cos(angle)], atol=1e-3)


def test_golden_steps():
    s, t = skipping_steps(jnp.array([0, 1, 24, 49]), 50, 1000)
    assert s.tolist() == [19, 39, 499, 999]
    assert t.tolist() == [0, 19, 479, 979]
    s, t = skipping_steps(jnp.array([0, 99]), 100, 1000)
    assert (s.tolist(), t.tolist()) == ([9, 999], [0, 989])


def test_golden_boundary_scalings():
    c_skip, c_out = boundary_scalings(jnp.array([0, 19, 999]))
    np.testing.assert_allclose(c_skip, [1, 0.25 / (190**2 + 0.25), 0.25 / (9990**2 + 0.25)], rtol=1e-6)
    np.testing.assert_allclose(c_out, [0, 190 / (190**2 + 0.25) ** 0.5, 9990 / (9990**2 + 0.25) ** 0.5], rtol=1e-6)


def test_golden_distance():
    d = jnp.array([[0.0, 1.0], [-2.0, 1e-3]])
    assert consistency.distance(d, "l2", 1e-3) == pytest.approx(np.array([1 / 2, (4 + 1e-6) / 2]))
    huber = np.array([[0, (1 + 1e-6) ** 0.5 - 1e-3], [(4 + 1e-6) ** 0.5 - 1e-3, 1e-3 * (2**0.5 - 1)]])
    assert consistency.distance(d, "huber", 1e-3) == pytest.approx(huber.mean(1), rel=1e-5)


def test_weights_are_one_or_the_inverse_of_sigma():
    plan, s = schedule("v_prediction"), jnp.array([19, 499, 999])
    np.testing.assert_array_equal(consistency.weights(plan, s, "uniform"), 1)
    sigma = np.sqrt(1 - np.asarray(plan.alphas_cumprod, np.float64)[np.asarray(s)])
    np.testing.assert_allclose(consistency.weights(plan, s, "inverse_sigma"), 1 / sigma, rtol=1e-5)
    alpha = np.sqrt(np.asarray(plan.alphas_cumprod))[np.asarray(s)]
    np.testing.assert_allclose(consistency.weights(plan, s, "sqrt_snr"), alpha / sigma, rtol=1e-5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"distance": "l1"}, "objective.distance 'l1' is not supported; use l2 or huber"),
        ({"weighting": "snr"}, "objective.weighting 'snr' is not supported; use uniform or inverse_sigma"),
        ({"num_ddim_steps": 0}, "objective.num_ddim_steps 0 is not supported; use a whole number of at least 1"),
        ({"huber_c": 0.0}, "objective.huber_c 0.0 is not supported; use a number above 0"),
        ({"w_min": 9.0, "w_max": 3.0}, "objective.w_min 9.0 is above objective.w_max 3.0"),
        ({"prompt_dropout": 1.5}, "objective.prompt_dropout 1.5 is not supported"),
        ({"guidance_schedule": ((300, 1.0), (100, 2.0))}, "objective.guidance_schedule .* rising timesteps"),
        ({"guidance_schedule": (3, 4)}, "objective.guidance_schedule .* pairs"),
        ({"w": 3.0}, "objective.w is not a setting of LCD; use num_ddim_steps, w_min"),
    ],
)
def test_an_impossible_setting_is_refused_by_name(setting, message):
    with pytest.raises(ValueError, match=message):
        from_settings(LCD, "objective", {"name": "lcd"} | setting)


# --- analytic networks: a guess at x0 that depends on all inputs, said in each of the three languages ---


def guess(scale, z, t, context, w=None):
    angle = z + 0.01 * t[:, None, None, None] + context.mean((1, 2))[:, None, None, None]
    if w is not None:
        angle = angle + w[:, None, None, None]
    return jnp.broadcast_to(scale, angle.shape) * jnp.sin(angle)  # one number, or one a channel


def speak(schedule, x0, z, t):
    """The network output that says x0."""
    alpha, sigma = (a[:, None, None, None] for a in alpha_sigma(schedule, t))
    noise = (z - alpha * x0) / sigma
    return {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0}[schedule.prediction_type]


def analytic(schedule, seen=None, dtype=jnp.float32):
    """(student, teacher) whose outputs, in `dtype`, say `guess`; `seen` collects what they and the target are given."""

    def network(name):
        def denoise(params, z, t, conditioning):
            if seen is not None:
                seen.setdefault(name, []).append((z, t, conditioning.context, conditioning.guidance))
            return speak(schedule, guess(params, z, t, conditioning.context, conditioning.guidance), z, t).astype(dtype)

        return denoise

    return network("student"), network("teacher")


def analytic_loss(frozen, batch, draws, prediction_type="epsilon", *, target=0.8, dtype=jnp.float32, solver="ddim"):
    """loss, and what the networks saw."""
    seen: dict = {}
    plan = schedule(prediction_type)
    objective = LCD(distance="l2", solver=solver)
    loss = make_loss(objective, bind_to(*analytic(plan, seen, dtype), plan), PREPARE)
    target = {"unet": jnp.float32(target)}
    total, _ = loss({"unet": jnp.float32(0.9)}, target, frozen | {"unet": jnp.float32(0.7)}, batch, draws)
    return total, seen


def test_pitfall_1_guidance_weight_is_not_guidance_scale():
    cond, uncond, w = jnp.float32([3.0]), jnp.float32([1.0]), jnp.float32([7.0])
    assert classifier_free(uncond, cond, w) == 1 + (1 + 7) * (3 - 1)  # diffusers' guidance_scale would be 8

    frozen, batch, draws = example()
    _, seen = analytic_loss(frozen, batch, draws)
    (z_s, s, context, w), (z_t, t, _, w_t) = seen["student"]
    np.testing.assert_array_equal(w, draws.w)  # w itself, of student and target alike
    np.testing.assert_array_equal(w_t, draws.w)

    plan, scale = schedule(), jnp.float32(0.7)
    empty = jnp.broadcast_to(encode_prompt(frozen, frozen["empty_ids"]).context, context.shape)
    w = (1 + draws.w)[:, None, None, None]
    x0_c, x0_0 = guess(scale, z_s, s, context), guess(scale, z_s, s, empty)
    x0 = x0_0 + w * (x0_c - x0_0)
    alpha, sigma = (a[:, None, None, None] for a in alpha_sigma(plan, s))
    noise = (z_s - alpha * x0) / sigma
    alpha, sigma = (a[:, None, None, None] for a in alpha_sigma(plan, t))
    np.testing.assert_allclose(z_t, alpha * x0 + sigma * noise, rtol=1e-4, atol=1e-4 * float(jnp.abs(z_t).max()))


def test_pitfall_3_prediction_types_say_the_same():
    frozen, batch, draws = example()
    results = [analytic_loss(frozen, batch, draws, kind) for kind in PREDICTION_TYPES]
    losses, z_t = [total for total, _ in results], [seen["student"][1][0] for _, seen in results]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-4)
    for other in z_t[1:]:
        np.testing.assert_allclose(other, z_t[0], atol=1e-4 * float(jnp.abs(z_t[0]).max()))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_pitfall_4_every_step_equals_diffusers_ddim_both_ends_included(prediction_type):
    torch = pytest.importorskip("torch")
    from diffusers import DDIMScheduler

    options = {"clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "trailing"}
    theirs = DDIMScheduler(**SCHEDULER, **options, prediction_type=prediction_type)
    theirs.set_timesteps(50)
    s, t = skipping_steps(jnp.arange(50), 50, 1000)
    assert s.tolist() == theirs.timesteps.tolist()[::-1]

    plan, rng = schedule(prediction_type), np.random.default_rng(0)
    z, output = rng.standard_normal((2, 50, 3, 2, 1)).astype(np.float32)
    ours = ddim_step(predict_x0(plan, output, z, s), predict_noise(plan, output, z, s), *alpha_sigma(plan, t))
    for i in range(50):
        step = theirs.step(torch.from_numpy(output[i]), int(s[i]), torch.from_numpy(z[i])).prev_sample.numpy()
        np.testing.assert_allclose(ours[i], step, rtol=1e-4, atol=1e-5 * np.abs(step).max(), err_msg=f"s = {s[i]}")


def test_pitfall_5_only_the_networks_know_half_precision():
    frozen, batch, draws = example()
    total, seen = analytic_loss(frozen, batch, draws, dtype=jnp.bfloat16)
    assert total.dtype == jnp.float32
    for z, _, _, w in seen["student"]:
        assert z.dtype == w.dtype == jnp.float32
    assert seen["teacher"][0][0].dtype == jnp.float32

    # The same outputs, rounded to bfloat16 but carried as float32, must give the same number to the last bit.
    plan = schedule()
    as_float32 = lambda f: lambda *inputs: f(*inputs).astype(jnp.float32)  # noqa: E731
    networks = [as_float32(network) for network in analytic(plan, dtype=jnp.bfloat16)]
    loss = make_loss(LCD(distance="l2"), bind_to(*networks, plan), PREPARE)
    params, target, teacher = ({"unet": jnp.float32(value)} for value in (0.9, 0.8, 0.7))
    again, _ = loss(params, target, frozen | teacher, batch, draws)
    assert total == again


# --- the shape of the objective ---


def test_the_teachers_two_passes_are_one_batch():
    frozen, batch, draws = example()
    _, seen = analytic_loss(frozen, batch, draws)
    assert len(seen["teacher"]) == 1
    z, t, context, _ = seen["teacher"][0]
    assert z.shape == (2 * B, H, W, C) and t.shape == (2 * B,) and context.shape == (2 * B, L, 12)


@pytest.mark.parametrize("solver", ["dpm", "dpm++"])
def test_a_solver_of_second_order_asks_the_guided_teacher_again_midway(solver):
    frozen, batch, draws = example()
    results = [analytic_loss(frozen, batch, draws, kind, solver=solver) for kind in PREDICTION_TYPES]
    np.testing.assert_allclose([total for total, _ in results], results[0][0], rtol=1e-3)
    seen = results[0][1]
    (_, s, context, _), (z, middle, again, _) = seen["teacher"]
    t = jnp.repeat(seen["student"][1][1], 2)
    assert z.shape == (2 * B, H, W, C) and ((t < middle) & (middle < s)).all()
    np.testing.assert_array_equal(context, again)
    z_t, of_ddim = seen["student"][1][0], analytic_loss(frozen, batch, draws)[1]["student"][1][0]
    assert z_t.dtype == jnp.float32 and np.abs(z_t - of_ddim).max() > 1e-2


def test_the_start_lies_on_the_trajectory_of_the_latent_and_the_noise():
    frozen, batch, draws = example()
    _, seen = analytic_loss(frozen, batch, draws)
    z_s, s, *_ = seen["student"][0]
    assert s.tolist() == [19, 999, 159, 519] and seen["student"][1][1].tolist() == [0, 979, 139, 499]
    expected = add_noise(schedule(), to_latents(batch["moments"], draws.posterior), draws.noise, s)
    np.testing.assert_array_equal(z_s, expected)


@pytest.mark.parametrize("fraction, chosen", [(0.25, [0]), (0.5, [0, 2]), (0.75, [0, 1, 2]), (1.0, [0, 1, 2, 3])])
def test_backward_simulation_replaces_some_of_the_data_by_the_targets_images(fraction, chosen):
    frozen, batch, draws = example()
    plan, seen = schedule(), {}
    objective = BackwardSimulation(LCD(), fraction)
    simulated = objective.draw(jax.random.key(0), jax.ShapeDtypeStruct((B, H, W, C), jnp.float32)).simulated
    assert np.flatnonzero(simulated).tolist() == chosen

    bind = bind_to(*analytic(plan, seen), plan)
    networks = bind(*({"unet": jnp.float32(value)} for value in (0.9, 0.8, 0.7)))
    examples = PREPARE({}, frozen, batch, draws)
    objective.loss(networks, examples, backward_simulation.Draws(draws, simulated))
    z_last, last, context, w = seen["student"][0]
    np.testing.assert_array_equal(z_last, draws.posterior)
    assert (last == 999).all() and (w == draws.w).all() and (context == examples.prompt.context).all()
    output = networks.target(z_last, last, Conditioning(context, guidance=w))
    z = np.array(examples.z)
    z[chosen] = consistency_function(plan, output, z_last, last)[np.array(chosen)]
    z_s, s, *_ = seen["student"][1]
    np.testing.assert_array_equal(z_s, add_noise(plan, z, draws.noise, s))


def test_a_fraction_of_less_than_one_example_is_an_error():
    for wrong in (2.0, -1.0):
        with pytest.raises(ValueError, match=f"objective.backward_simulation {wrong} is not supported"):
            BackwardSimulation(LCD(), wrong)
    with pytest.raises(ValueError, match="backward_simulation 0.1 is less than one example of a batch of 4; use 0"):
        BackwardSimulation(LCD(), 0.1).draw(jax.random.key(0), jax.ShapeDtypeStruct((B, H, W, C), jnp.float32))


@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_no_gradient_reaches_the_teacher_or_the_target(fraction):
    frozen, batch, draws = example()
    plan, objective = schedule("v_prediction"), LCD()
    if fraction:
        objective = BackwardSimulation(objective, fraction)
        draws = backward_simulation.Draws(draws, np.array([True, False, True, False]))
    total = make_loss(objective, bind_to(*analytic(plan), plan), PREPARE)

    def loss(params, target, teacher, table):
        rest = {"unet": teacher, "text_encoder": {"table": table}, "empty_ids": frozen["empty_ids"]}
        return total({"unet": params}, {"unet": target}, rest, batch, draws)[0]

    arguments = jnp.float32(0.9), jnp.float32(0.8), jnp.float32(0.7)
    student, target, teacher = jax.grad(loss, (0, 1, 2))(*arguments, frozen["text_encoder"]["table"])
    assert student != 0
    assert target == teacher == 0
    moved = [[a + 0.1 * (i == j) for j, a in enumerate(arguments)] for i in range(3)]
    values = {float(loss(*arguments, frozen["text_encoder"]["table"])) for arguments in (arguments, *moved)}
    assert len(values) == 4  # all three do act on the value


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_boundary_condition(prediction_type):
    """At t = 0 the consistency function is the identity, whatever the network says; at t > 0 it is not."""
    z, output = np.random.default_rng(0).standard_normal((2, B, H, W, C)).astype(np.float32)
    plan = schedule(prediction_type)
    np.testing.assert_array_equal(consistency_function(plan, output, z, jnp.zeros(B, jnp.int32)), z)
    assert np.abs(consistency_function(plan, output, z, jnp.ones(B, jnp.int32)) - z).max() > 0.01


def test_the_first_skipping_step_asks_nothing_of_the_target_network():
    frozen, batch, draws = example()
    first = draws._replace(index=np.zeros(B, np.int32))
    assert analytic_loss(frozen, batch, first, target=0.8)[0] == analytic_loss(frozen, batch, first, target=-3.0)[0]
    assert analytic_loss(frozen, batch, draws, target=0.8)[0] != analytic_loss(frozen, batch, draws, target=-3.0)[0]


def test_student_equals_teacher_for_every_w_at_the_start():
    """cond_proj starts at zero, so that a student made of the teacher's weights and a new cond_proj is the teacher."""
    student, teacher = unet_networks()
    z = jnp.asarray(np.random.default_rng(0).standard_normal((B, H, W, C)), jnp.float32)
    t, context = jnp.array([0, 19, 499, 999]), jnp.ones((B, L, 12))
    init = UNet2DCondition.from_config(STUDENT).init
    inputs = z, t, context, guidance_embedding(jnp.ones(B))
    fresh = jax.jit(lambda key: init(key, *inputs)["params"]["time_embedding"]["cond_proj"])(jax.random.key(0))
    assert fresh["kernel"].shape == (256, 8) and not fresh["kernel"].any()

    weights = tree_from_torch({k: v.numpy() for k, v in torch_unets()[2].state_dict().items()})
    expected = teacher(weights, z, t, Conditioning(context))
    time = weights["time_embedding"] | {"cond_proj": fresh}
    run = lambda params, w: student(params, z, t, Conditioning(context, guidance=w))  # noqa: E731
    for w in (0.0, 2.0, 7.5, 14.0):
        output = run(weights | {"time_embedding": time}, jnp.full(B, w))
        np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)
    time = time | {"cond_proj": {"kernel": jnp.full((256, 8), 0.1)}}
    assert np.abs(run(weights | {"time_embedding": time}, jnp.full(B, 7.5)) - expected).max() > 1e-3


# --- random empty prompts ---


def test_an_empty_prompt_really_acts():
    frozen, batch, draws = example()
    kept, dropped = (draws._replace(keep_prompt=np.full(B, keep)) for keep in (True, False))
    total, _ = analytic_loss(frozen, batch, dropped)
    assert total != analytic_loss(frozen, batch, kept)[0]

    # Without its prompt an example is the one whose caption is empty: student, target and teacher all see that.
    emptied = batch | {"token_ids": np.tile(frozen["empty_ids"], (B, 1))}
    assert total == analytic_loss(frozen, emptied, kept)[0]
    _, seen = analytic_loss(frozen, batch, draws)
    empty = encode_prompt(frozen, frozen["empty_ids"]).context
    for _, _, context, _ in seen["student"]:
        np.testing.assert_array_equal(context[3], empty)
        assert (context[:3] != empty).any()
    np.testing.assert_array_equal(seen["teacher"][0][2][3], empty)


def test_the_draws_cover_what_they_should_and_differ():
    latents = jax.ShapeDtypeStruct((20_000, 1, 1, 1), jnp.float32)
    draw = partial(LCD(w_min=2.0, w_max=14.0, prompt_dropout=0.1).draw, latents=latents)
    a, b = draw(jax.random.key(0)), draw(jax.random.key(1))
    assert a.noise.shape == a.posterior.shape == (20_000, 1, 1, 1)
    assert set(a.index.tolist()) == set(range(50)) and a.index.dtype == jnp.int32
    assert 2.0 <= a.w.min() < 2.01 and 13.99 < a.w.max() <= 14.0 and a.w.mean() == pytest.approx(8.0, abs=0.1)
    assert 0.09 < 1 - a.keep_prompt.mean() < 0.11
    assert len(np.unique(a.noise)) > 19_900 and (a.noise != a.posterior).any()
    assert all((x != y).any() for x, y in zip(a, b, strict=True))
    assert LCD(w_min=2.0, w_max=2.0).draw(jax.random.key(0), latents).keep_prompt.all()


# --- pitfall 8: accumulation, clipping and the moving average ---


def make_step(accumulate, optimizer, ema_rate=0.9, fraction=0.0):
    """The real step on a student that has a weight for each channel, 8 examples, a large gradient."""
    plan, objective = schedule(), LCD(w_min=2.0, w_max=14.0, distance="l2", prompt_dropout=0.3)
    step = make_train_step(
        BackwardSimulation(objective, fraction) if fraction else objective,
        bind_to(*analytic(plan), plan),
        PREPARE,
        optimizer,
        latents=lambda batch: jax.ShapeDtypeStruct((8, H, W, C), jnp.float32),
        seed=3,
        ema_rate=ema_rate,
        accumulate=accumulate,
    )
    return jax.jit(step)


def run_steps(accumulate, optimizer, count=3, fraction=0.0):
    frozen, batch, _ = example(batch=8)
    frozen = frozen | {"unet": jnp.float32(0.7)}
    state = create_state({"unet": jnp.array([0.9, 0.5, -0.4])}, optimizer)
    step, history = make_step(accumulate, optimizer, fraction=fraction), []
    for _ in range(count):
        state, metrics = step(state, frozen, batch)
        history.append((state, metrics))
    return history


@pytest.mark.parametrize(("clip", "fraction"), [(1e9, 0.0), (1e-3, 0.0), (1e9, 0.625)])
def test_pitfall_8_micro_batches_equal_one_batch(clip, fraction):
    """Backward simulation included: of 5 simulated examples in 8, micro-batches of 2 have 2, 1, 1 and 1."""
    # Plain gradient descent after clipping: unlike Adam it shows any change of the gradient's length.
    optimizer = optax.chain(optax.clip_by_global_norm(clip), optax.sgd(0.1 if clip > 1 else 10.0))
    whole = run_steps(1, optimizer, fraction=fraction)
    assert np.abs(whole[0][0].params["unet"] - jnp.array([0.9, 0.5, -0.4])).max() > 1e-3
    for accumulate in (2, 4):
        for (state, metrics), (other, other_metrics) in zip(
            whole, run_steps(accumulate, optimizer, fraction=fraction), strict=True
        ):
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), state, other)
            np.testing.assert_allclose(metrics["loss"], other_metrics["loss"], rtol=1e-5)
            np.testing.assert_allclose(metrics["gradient_norm"], other_metrics["gradient_norm"], rtol=1e-4)


def test_pitfall_8_the_moving_average_and_the_clip_act_once_per_update():
    config = SimpleNamespace(
        name="adamw",
        learning_rate=1e-2,
        warmup_steps=0,
        schedule="constant",
        b1=0.9,
        b2=0.999,
        weight_decay=0.0,
        clip_norm=1.0,
    )
    average = np.array([0.9, 0.5, -0.4], np.float32)
    for i, (state, _) in enumerate(run_steps(4, make_optimizer(config, steps=10)), start=1):
        assert state.step == i
        average = 0.9 * average + 0.1 * np.asarray(state.params["unet"])
        np.testing.assert_allclose(state.ema["unet"], average, rtol=1e-6)
    assert {int(x) for x in jax.tree.leaves(state.opt_state) if x.shape == ()} == {
        3
    }  # Adam and its schedule count updates


def test_every_step_draws_anew_and_a_step_repeats_itself():
    still = optax.sgd(0.0)  # the same parameters all along: only the draws can change the loss
    losses = [float(metrics["loss"]) for _, metrics in run_steps(1, still)]
    assert len(set(losses)) == 3
    assert losses == [float(metrics["loss"]) for _, metrics in run_steps(1, still)]
