"""Latent consistency distillation: equal to the PyTorch reference, and a test for what implementers get wrong."""

import math
import re
from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lcm_jax.diffusion.consistency import boundary_scalings, consistency_function, guidance_embedding
from lcm_jax.diffusion.guidance import capped, classifier_free
from lcm_jax.diffusion.schedule import add_noise, alpha_sigma, make_schedule, predict_noise, predict_x0, skipping_steps
from lcm_jax.diffusion.solvers import ddim_step
from lcm_jax.models.conditioning import Conditioning
from lcm_jax.models.unet import UNet2DCondition
from lcm_jax.objectives import lcd
from lcm_jax.training.state import create_state, make_optimizer
from lcm_jax.training.step import make_train_step

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
SCHEDULER = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
UNET = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
STUDENT = UNET | {"time_cond_proj_dim": 256}
B, H, W, C, L, VOCABULARY = 4, 8, 4, 3, 5, 11


def schedule(prediction_type="epsilon"):
    return make_schedule(SCHEDULER | {"prediction_type": prediction_type})


# --- a world small enough to write down: the text encoder is a table, the autoencoder only scales ---


def encode_prompt(frozen, token_ids, time_ids=None):
    return Conditioning(frozen["text_encoder"]["table"][token_ids])


def to_latents(moments, noise):
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return 0.5 * (mean + jnp.exp(0.5 * logvar) * noise)


def example(seed=0, batch=B):
    """(frozen without a teacher, batch, draws): both ends of the table, and one empty prompt."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    frozen = {"text_encoder": {"table": normal(VOCABULARY, 12)}, "empty_ids": np.array([0, 1, 1, 1, 1], np.int32)}
    data = {
        "moments": np.concatenate([normal(batch, H, W, C), 0.1 * normal(batch, H, W, C) - 4], axis=-1),
        "token_ids": rng.integers(2, VOCABULARY, (batch, L)).astype(np.int32),
    }
    draws = lcd.Draws(
        posterior=normal(batch, H, W, C),
        noise=normal(batch, H, W, C),
        index=np.resize(np.array([0, 49, 7, 25], np.int32), batch),
        w=np.resize(np.array([7.5, 2.0, 13.25, 4.0], np.float32), batch),
        keep_prompt=np.resize(np.array([True, True, True, False]), batch),
    )
    return frozen, data, draws


def tree_from_torch(tensors) -> dict:
    """diffusers' names and layouts -> this project's: `.N` is `_N`, kernels HWIO or (in, out), norms have a scale."""
    tree: dict = {}
    for key, array in tensors.items():
        *parents, leaf = re.sub(r"\.(\d+)", r"_\1", key).split(".")
        if leaf == "weight":
            leaf = "scale" if array.ndim == 1 else "kernel"
            array = array.transpose({1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}[array.ndim])
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = array.astype(np.float32)
    return tree


@cache
def torch_unets():
    """student, target, teacher in float64, each with every weight random and its own."""
    torch = pytest.importorskip("torch")
    from diffusers import UNet2DConditionModel

    torch.set_num_threads(1)  # its threads wait for each other for seconds over networks as small as these
    unets = []
    for seed, config in enumerate([STUDENT, STUDENT, UNET]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(**config)
        with torch.no_grad():
            for weight in unet.parameters():
                weight.add_(0.05 * torch.randn_like(weight))
        unets.append(unet.double())  # float32 values, computed in float64
    return unets


@cache
def unet_networks():
    """The networks are compiled, the objective around them is not: six variants of it share their compilations."""
    student, teacher = UNet2DCondition.from_config(STUDENT), UNet2DCondition.from_config(UNET)

    def apply(network):
        def denoise(params, z, t, conditioning):
            w = conditioning.guidance
            embedding = None if w is None else guidance_embedding(w)
            return network.apply({"params": params}, z, t, conditioning.context, embedding)

        return jax.jit(denoise)

    return lcd.Networks(apply(student), apply(teacher), encode_prompt, to_latents)


# --- parity ---


@pytest.mark.parametrize(
    "distance, weighting, own_share, w_caps",
    [("l2", "uniform", 0.0, ()), ("huber", "inverse_sigma", 0.5, ((0, 0.0), (160, math.inf), (700, 4.5)))],
)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_loss_and_every_gradient_equal_the_pytorch_reference(prediction_type, distance, weighting, own_share, w_caps):
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
    if own_share:
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
        w_caps=w_caps,
    )

    loss = partial(
        lcd.loss,
        networks=unet_networks(),
        schedule=schedule(prediction_type),
        num_ddim_steps=50,
        kind=distance,
        weighting=weighting,
        own_share=own_share,
        w_caps=w_caps,
    )
    step = jax.value_and_grad(loss, has_aux=True)
    (total, metrics), gradients = step({"unet": student}, {"unet": target}, frozen | {"unet": teacher}, batch, draws)

    assert total == pytest.approx(expected.loss, rel=1e-4)
    assert metrics["loss"] == total
    theirs = tree_from_torch(expected.gradients)
    assert jax.tree.structure(gradients["unet"]) == jax.tree.structure(theirs)
    for path, ours in jax.tree.leaves_with_path(gradients["unet"]):
        reference = theirs
        for key in path:
            reference = reference[key.key]
        assert np.abs(reference).max() > 0
        error = np.abs(ours - reference).max() / np.abs(reference).max()
        assert error < 1e-4, (jax.tree_util.keystr(path), error)


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


def test_w_counts_as_much_as_its_cap_allows():
    w, t = jnp.full(6, 6.0), jnp.int32([124, 299, 300, 699, 700, 999])
    assert capped(w, t, ((0, 0.0), (300, math.inf), (700, 4.5))).tolist() == [0.0, 0.0, 6.0, 6.0, 4.5, 4.5]
    assert capped(w, t, ()).tolist() == w.tolist()
    assert capped(w, t, ((700, 9.0),)).tolist() == w.tolist(), "a cap never adds"


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
    assert lcd.distance(d, "l2", 1e-3) == pytest.approx(np.array([1 / 2, (4 + 1e-6) / 2]))
    huber = np.array([[0, (1 + 1e-6) ** 0.5 - 1e-3], [(4 + 1e-6) ** 0.5 - 1e-3, 1e-3 * (2**0.5 - 1)]])
    assert lcd.distance(d, "huber", 1e-3) == pytest.approx(huber.mean(1), rel=1e-5)
    with pytest.raises(ValueError, match="objective.distance is 'l1'; choose l2 or huber"):
        lcd.distance(d, "l1", 1e-3)


def test_weights_are_one_or_the_inverse_of_sigma():
    plan, s = schedule("v_prediction"), jnp.array([19, 499, 999])
    np.testing.assert_array_equal(lcd.weights(plan, s, "uniform"), 1)
    sigma = np.sqrt(1 - np.asarray(plan.alphas_cumprod, np.float64)[np.asarray(s)])
    np.testing.assert_allclose(lcd.weights(plan, s, "inverse_sigma"), 1 / sigma, rtol=1e-5)
    with pytest.raises(ValueError, match="objective.weighting is 'snr'; choose uniform or inverse_sigma"):
        lcd.weights(plan, s, "snr")


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
    """Networks whose outputs, in `dtype`, say `guess`; `seen` collects what student, target and teacher are given."""

    def network(name):
        def denoise(params, z, t, conditioning):
            if seen is not None:
                seen.setdefault(name, []).append((z, t, conditioning.context, conditioning.guidance))
            return speak(schedule, guess(params, z, t, conditioning.context, conditioning.guidance), z, t).astype(dtype)

        return denoise

    return lcd.Networks(network("student"), network("teacher"), encode_prompt, to_latents)


def analytic_loss(frozen, batch, draws, prediction_type="epsilon", *, target=0.8, dtype=jnp.float32):
    """loss, and what the networks saw."""
    seen: dict = {}
    plan = schedule(prediction_type)
    total, _ = lcd.loss(
        {"unet": jnp.float32(0.9)},
        {"unet": jnp.float32(target)},
        frozen | {"unet": jnp.float32(0.7)},
        batch,
        draws,
        networks=analytic(plan, seen, dtype),
        schedule=plan,
        num_ddim_steps=50,
        kind="l2",
    )
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
    rounded = analytic(plan, dtype=jnp.bfloat16)
    as_float32 = lambda f: lambda *inputs: f(*inputs).astype(jnp.float32)  # noqa: E731
    again, _ = lcd.loss(
        {"unet": jnp.float32(0.9)},
        {"unet": jnp.float32(0.8)},
        frozen | {"unet": jnp.float32(0.7)},
        batch,
        draws,
        networks=rounded._replace(student=as_float32(rounded.student), teacher=as_float32(rounded.teacher)),
        schedule=plan,
        num_ddim_steps=50,
        kind="l2",
    )
    assert total == again


# --- the shape of the objective ---


def test_the_teachers_two_passes_are_one_batch():
    frozen, batch, draws = example()
    _, seen = analytic_loss(frozen, batch, draws)
    assert len(seen["teacher"]) == 1
    z, t, context, _ = seen["teacher"][0]
    assert z.shape == (2 * B, H, W, C) and t.shape == (2 * B,) and context.shape == (2 * B, L, 12)


def test_the_start_lies_on_the_trajectory_of_the_latent_and_the_noise():
    frozen, batch, draws = example()
    _, seen = analytic_loss(frozen, batch, draws)
    z_s, s, *_ = seen["student"][0]
    assert s.tolist() == [19, 999, 159, 519] and seen["student"][1][1].tolist() == [0, 979, 139, 499]
    expected = add_noise(schedule(), to_latents(batch["moments"], draws.posterior), draws.noise, s)
    np.testing.assert_array_equal(z_s, expected)


@pytest.mark.parametrize("share, chosen", [(0.25, [0]), (0.5, [0, 2]), (0.75, [0, 1, 2]), (1.0, [0, 1, 2, 3])])
def test_the_networks_own_pictures_take_the_place_of_some_of_the_data(share, chosen):
    frozen, batch, draws = example()
    plan, seen = schedule(), {}
    guided = encode_prompt(frozen, batch["token_ids"])._replace(guidance=jnp.asarray(draws.w))
    z, networks = jnp.full((B, H, W, C), 5.0), analytic(plan, seen)
    own = lcd.own_pictures({"unet": jnp.float32(0.8)}, z, draws.posterior, guided, share, networks, plan)
    (jump,) = seen["student"]
    of_noise = [(jnp.asarray(draws.posterior)[i], 999, guided.context[i], guided.guidance[i]) for i in chosen]
    for i, mine, expected in zip(chosen, zip(*jump, strict=True), of_noise, strict=True):
        for a, b in zip(mine, expected, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=f"the jump of example {i}")
    drawn = consistency_function(
        plan, networks.student(jnp.float32(0.8), *jump[:2], Conditioning(jump[2], guidance=jump[3])), *jump[:2]
    )
    np.testing.assert_array_equal(own[np.array(chosen)], drawn)
    assert [i for i in range(B) if not (own[i] == 5.0).all()] == chosen


@pytest.mark.parametrize("share", [0.1, 2.0, -1.0])
def test_a_share_that_is_no_part_of_the_batch_is_an_error(share):
    with pytest.raises(ValueError, match=f"own_share is {share}: not 1 to {B} examples"):
        lcd.own_pictures(None, jnp.zeros((B, H, W, C)), None, None, share, None, schedule())


@pytest.mark.parametrize("own_share", [0.0, 0.5])
def test_no_gradient_reaches_the_teacher_or_the_target(own_share):
    frozen, batch, draws = example()
    plan = schedule("v_prediction")

    def loss(params, target, teacher, table):
        frozen_ = {"unet": teacher, "text_encoder": {"table": table}, "empty_ids": frozen["empty_ids"]}
        networks = analytic(plan)
        return lcd.loss(
            {"unet": params},
            {"unet": target},
            frozen_,
            batch,
            draws,
            networks=networks,
            schedule=plan,
            num_ddim_steps=50,
            kind="huber",
            own_share=own_share,
        )[0]

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
    networks = unet_networks()
    z = jnp.asarray(np.random.default_rng(0).standard_normal((B, H, W, C)), jnp.float32)
    t, context = jnp.array([0, 19, 499, 999]), jnp.ones((B, L, 12))
    init = UNet2DCondition.from_config(STUDENT).init
    inputs = z, t, context, guidance_embedding(jnp.ones(B))
    fresh = jax.jit(lambda key: init(key, *inputs)["params"]["time_embedding"]["cond_proj"])(jax.random.key(0))
    assert fresh["kernel"].shape == (256, 8) and not fresh["kernel"].any()

    weights = tree_from_torch({k: v.numpy() for k, v in torch_unets()[2].state_dict().items()})
    expected = networks.teacher(weights, z, t, Conditioning(context))
    time = weights["time_embedding"] | {"cond_proj": fresh}
    run = lambda params, w: networks.student(params, z, t, Conditioning(context, guidance=w))  # noqa: E731
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
    batch = {"moments": jnp.zeros((20_000, 1, 1, 2)), "token_ids": jnp.zeros((20_000, L), jnp.int32)}
    draw = partial(lcd.draw, batch=batch, num_ddim_steps=50, w_min=2.0, w_max=14.0, empty_prompts=0.1)
    a, b = draw(jax.random.key(0)), draw(jax.random.key(1))
    assert a.noise.shape == a.posterior.shape == (20_000, 1, 1, 1)
    assert set(a.index.tolist()) == set(range(50)) and a.index.dtype == jnp.int32
    assert 2.0 <= a.w.min() < 2.01 and 13.99 < a.w.max() <= 14.0 and a.w.mean() == pytest.approx(8.0, abs=0.1)
    assert 0.09 < 1 - a.keep_prompt.mean() < 0.11
    assert len(np.unique(a.noise)) > 19_900 and (a.noise != a.posterior).any()
    assert all((x != y).any() for x, y in zip(a, b, strict=True))
    assert lcd.draw(
        jax.random.key(0), batch, num_ddim_steps=50, w_min=2.0, w_max=2.0, empty_prompts=0.0
    ).keep_prompt.all()


# --- pitfall 8: accumulation, clipping and the moving average ---


def make_step(accumulate, optimizer, ema_rate=0.9):
    """The real step on a student that has a weight for each channel, 8 examples, a large gradient."""
    plan = schedule()
    networks = analytic(plan)
    draw = partial(lcd.draw, num_ddim_steps=50, w_min=2.0, w_max=14.0, empty_prompts=0.3)
    loss = partial(lcd.loss, networks=networks, schedule=plan, num_ddim_steps=50, kind="l2")
    return jax.jit(make_train_step(draw, loss, optimizer, seed=3, ema_rate=ema_rate, accumulate=accumulate))


def run_steps(accumulate, optimizer, count=3):
    frozen, batch, _ = example(batch=8)
    frozen = frozen | {"unet": jnp.float32(0.7)}
    state = create_state({"unet": jnp.array([0.9, 0.5, -0.4])}, optimizer)
    step, history = make_step(accumulate, optimizer), []
    for _ in range(count):
        state, metrics = step(state, frozen, batch)
        history.append((state, metrics))
    return history


@pytest.mark.parametrize("clip", [1e9, 1e-3], ids=["unclipped", "clipped"])
def test_pitfall_8_micro_batches_equal_one_batch(clip):
    # Plain gradient descent after clipping: unlike Adam it shows any change of the gradient's length.
    optimizer = optax.chain(optax.clip_by_global_norm(clip), optax.sgd(0.1 if clip > 1 else 10.0))
    whole = run_steps(1, optimizer)
    assert np.abs(whole[0][0].params["unet"] - jnp.array([0.9, 0.5, -0.4])).max() > 1e-3
    for accumulate in (2, 4):
        for (state, metrics), (other, other_metrics) in zip(whole, run_steps(accumulate, optimizer), strict=True):
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
