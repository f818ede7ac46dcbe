"""A student of any latent diffusion model, by latent consistency distillation."""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax import pipeline
from lcm_jax.data.batches import make_batches
from lcm_jax.data.sources import load_dataset
from lcm_jax.diffusion.pixels import to_float
from lcm_jax.errors import RunError
from lcm_jax.evaluation import report, verifier
from lcm_jax.evaluation.evaluate import Resources, evaluate
from lcm_jax.evaluation.frechet import encoder_features
from lcm_jax.evaluation.metrics import make_metrics
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.objectives import lcd
from lcm_jax.recipes import inpainting
from lcm_jax.recipes.sources import batch_shapes, digest, make_encoder
from lcm_jax.sampling.generate import sampler_table
from lcm_jax.sampling.preview import PreviewSampler, save_grid
from lcm_jax.training.loop import Job
from lcm_jax.training.workdir import config_digest, differences, read_object
from lcm_jax.weights import diffusers_folder as folders
from lcm_jax.weights.scheduler import lcm_scheduler


def held_dtype(leaf, dtype):
    """What a network that computes in `dtype` holds of a frozen parameter: it casts matrices and kernels before each
    use anyway, so that these lose nothing; biases and scales stay float32."""
    return jnp.dtype(dtype if leaf.ndim >= 2 else jnp.float32)


def held(params, dtype):
    """Stored parameters -> those that a frozen network of that compute dtype holds, on the host."""
    return jax.tree.map(lambda p: np.asarray(p).astype(held_dtype(p, dtype)), params)


def encoding(draw: Callable, loss: Callable, model: StableDiffusion) -> tuple[Callable, Callable]:
    """draw and loss for batches that hold pictures, "image" uint8[B, H, W, 3], instead of their moments.

    The step encodes them by frozen["vae"]. Each micro-batch on its own, so that no picture waits in memory.
    """

    def draw_without_moments(rng, batch):
        b, height, width, _ = batch["image"].shape
        down, channels = model.downscale, model.vae.config["latent_channels"]
        shape = (b, height // down, width // down, 2 * channels)
        return draw(rng, {"moments": jax.ShapeDtypeStruct(shape, jnp.float32)})

    def loss_of_pictures(params, target, frozen, batch, draws):
        moments = model.encode(frozen["vae"], to_float(batch["image"]))
        return loss(params, target, frozen, batch | {"moments": moments}, draws)

    return draw_without_moments, loss_of_pictures


def encoder_alone(vae_params):
    """The autoencoder's parameters without those that only decoding takes."""
    return {name: tree for name, tree in vae_params.items() if name not in ("decoder", "post_quant_conv")}


def student_configs(config, teacher: Mapping[str, Mapping]) -> dict[str, Mapping]:
    """The teacher's configs with an input for the guidance weight and the scheduler that samples in a few steps.

    Raises ValueError for a teacher that is a student already, or one that inpaints where steps do not see pictures.
    """
    if teacher["unet"].get("time_cond_proj_dim") is not None:
        raise ValueError(
            f"teacher {config.teacher!r} is a latent consistency model already; give the model it came from"
        )
    given, made = teacher["unet"].get("in_channels", 4), teacher["unet"].get("out_channels", 4)
    if given != made and not encodes(config):
        raise ValueError(
            f"teacher {config.teacher!r} takes {given} channels and makes {made}: it inpaints, which "
            f"data.encode {config.data.encode!r} does not support; use data.encode=step"
        )
    return dict(teacher) | {
        "unet": teacher["unet"] | {"time_cond_proj_dim": config.objective.guidance_embedding_dim},
        "scheduler": lcm_scheduler(teacher["scheduler"], config.objective.num_ddim_steps),
    }


def check_samplers(config, teacher: StableDiffusion, model: StableDiffusion) -> None:
    """Raise ValueError for a sampler of previews or of the report that does not have the number of steps asked for."""
    plans = {
        "sample.teacher_steps": (teacher, "ddim", (config.sample.teacher_steps,)),
        "sample.student_steps": (model, "lcm", config.sample.student_steps),
    }
    for who, network in (("teacher", teacher), ("student", model)):
        for sampler, every in config.report[who].items():
            plans[f"report.{who}.{sampler}"] = (network, sampler, every)
    for key, (network, sampler, every) in plans.items():
        for steps in every:
            try:
                sampler_table(network, sampler, steps)
            except ValueError as error:
                raise ValueError(f"{key} {steps} is not supported: {error}") from None


def encodes(config) -> bool:
    """Return True if each step encodes its own images, False if it reads moments that were encoded before."""
    return config.data.encode == "step"


def lcd_batch(config, model: StableDiffusion, count: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes and dtypes of a batch of `count` examples of this config's data."""
    return batch_shapes(model, config.data.size, count, "image" if encodes(config) else "moments")


def lcd_functions(config, teacher: StableDiffusion, model: StableDiffusion) -> tuple[Callable, Callable]:
    """(draw, loss) of the distillation, for the batches of this config's data."""
    objective = config.objective
    draw = partial(
        lcd.draw,
        num_ddim_steps=objective.num_ddim_steps,
        w_min=objective.w_min,
        w_max=objective.w_max,
        empty_prompts=objective.empty_prompts,
    )
    networks = lcd.Networks(model.denoise, teacher.denoise, model.encode_prompt, model.to_latents)
    loss = partial(
        lcd.loss,
        schedule=model.schedule,
        num_ddim_steps=objective.num_ddim_steps,
        kind=objective.distance,
        huber_c=objective.huber_c,
        weighting=objective.weighting,
        own_share=objective.own_share,
        w_caps=objective.w_caps,
    )
    if model.inpaints:
        draw, loss = inpainting.masking(draw, loss, networks, model)
    else:
        loss = partial(loss, networks=networks)
    return encoding(draw, loss, model) if encodes(config) else (draw, loss)


def lcd_frozen(config, params: Mapping) -> dict:
    """What of the teacher's parameters, by network, a step takes."""
    kept = dict(params)
    vae = kept.pop("vae")
    return kept | ({"vae": encoder_alone(vae)} if encodes(config) else {})


def lcd_job(config, workdir: Path) -> Job:
    """Latent consistency distillation of the model `config.teacher`."""
    teacher = pipeline.Pipeline.from_pretrained(config.teacher, config.train.dtype)
    configs = student_configs(config, teacher.configs)
    model = StableDiffusion.from_configs(configs, jnp.dtype(config.train.dtype), remat=config.train.remat)
    lcd.check_w_caps(config.objective.w_caps, len(model.schedule.alphas_cumprod) - 1)  # before hours of encoding
    check_samplers(config, teacher.model, model)
    # On the host from here on: what the devices hold is what the loop puts there.
    teacher.params = jax.device_get(teacher.params)
    frozen = {name: held(tree, teacher.model.dtype_of(name)) for name, tree in teacher.params.items()}

    @cache
    def data():  # opened when it is first needed: indexing writes to the workdir
        return load_dataset(config, workdir)

    def batches(step):
        encoder, vae = make_encoder(model, frozen["vae"]), digest(frozen["vae"])
        return make_batches(
            config, workdir, data(), step, tokenize=teacher.tokenize, make_encoder=encoder, encoder_digest=vae
        )

    few = tuple(config.sample.student_steps)
    score = verifier.score if config.data.source == "shapes" else None

    @cache
    def previews():
        """Return the samplers of the preview's student and teacher."""
        shown = data().prompts(config.sample.prompts)
        to_paint = inpainting.to_paint(model, data().held_out, len(shown))
        size, batch_size = config.data.size, config.sample.batch_size
        return [
            PreviewSampler(each, teacher.tokenize, shown, size, batch_size, inpainting=to_paint)
            for each in (model, teacher.model)
        ]

    teacher_row: list[np.ndarray] = []

    def init():
        # The student is the teacher with one input more, whose weights are zero: at first they agree for every w.
        unet = jax.tree.map(lambda p: np.asarray(p, np.float32), teacher.params["unet"])
        width = configs["unet"]["block_out_channels"][0]
        projection = np.zeros((config.objective.guidance_embedding_dim, width), np.float32)
        return {"unet": unet | {"time_embedding": unet["time_embedding"] | {"cond_proj": {"kernel": projection}}}}

    def rows_of(student):
        preview_student, preview_teacher = previews()
        if not teacher_row:
            steps = config.sample.teacher_steps
            teacher_row.append(preview_teacher(frozen, "ddim", steps, config.sample.guidance_scale)[0])
        params = frozen | student
        return teacher_row + [preview_student(params, "lcm", n, config.sample.guidance_scale)[0] for n in few]

    labels = [f"teacher, {config.sample.teacher_steps} steps", *(f"student, {n} step{'s' * (n > 1)}" for n in few)]

    def preview(ema, path):
        rows = rows_of(ema)
        save_grid(rows, path, labels)
        shown = previews()[0].prompts
        path.with_suffix(".txt").write_text("\n".join(shown) + "\n")
        if score is None:
            return {}
        names = ["teacher", *(f"{n}_steps" for n in few)]
        return {f"verifier/{k}": score(r, shown)["overall"] for k, r in zip(names, rows, strict=True)}

    def finish(ema, seconds):
        path, exported = workdir / "report.json", (workdir / "export" / "model_index.json").exists()
        before = read_object(path, "delete it, and the same command makes it again") if path.exists() else None
        settings = {"metrics": config.metrics} | config.report.to_dict()
        wanted = json.loads(json.dumps(settings))
        # Reports of earlier versions did not record their settings.
        changed = differences(before.get("settings", wanted), wanted) if before and exported else []
        if before and exported and not changed:
            print(f"this run is complete: {workdir / 'export'}, {path}")
            report.show(before)
            return
        if not changed and not teacher.tokenizer_folder.is_dir():
            raise RunError(
                f"{teacher.tokenizer_folder} is gone, of which the export has a copy; put it back, and run the "
                f"same command: the checkpoints in {workdir / 'checkpoints'} are kept"
            )
        if changed:
            key, value, now = changed[0]
            name = key if key in config else f"report.{key}"
            print(f"{name} is {value} in {path} and {now} in the config: a new report is made")
        elif (workdir / "export").exists():  # left by a run that was stopped between its export and its report
            shutil.rmtree(workdir / "export")
        student = frozen | jax.device_get(ema)
        if not changed:
            stored = teacher.params | {"unet": jax.device_get(ema)["unet"]}
            with folders.new_folder(workdir / "export") as folder:
                folders.write_pipeline(folder, configs, stored, teacher.tokenizer_folder, configs["scheduler"])
        (workdir / "samples").mkdir(exist_ok=True)
        save_grid(rows_of(student), workdir / "samples" / "final.png", labels)

        began = time.monotonic()
        own = data()
        captions = own.prompts(config.report.prompts)
        # Fewer: they stand beside the others, and the teacher's 50 steps are most of a report's time.
        unseen_prompts = own.compositional_prompts(max(config.report.prompts // 4, 1))
        size = config.report.batch_size

        def real_images():
            for first in range(0, config.report.reference, size):
                last = min(first + size, config.report.reference)
                yield np.stack([own.held_out[i]["image"] for i in range(first, last)])

        metrics = make_metrics(config.metrics, Resources(encoder_features(model, frozen["vae"], size), real_images))
        rows, composition = [], {}
        for who, network, params, plan in [
            ("teacher", teacher.model, frozen, config.report.teacher.to_dict()),
            ("student", model, student, config.report.student.to_dict()),
        ]:
            print(f"{who}, {len(captions)} captions:")
            sampler = PreviewSampler(
                network,
                teacher.tokenize,
                captions,
                config.data.size,
                size,
                seed=2,
                inpainting=inpainting.to_paint(network, own.held_out, len(captions)),
            )
            draw = lambda name, steps, s=sampler, p=params: [s(p, name, steps, config.report.guidance_scale)]  # noqa: E731
            if unseen_prompts:
                name, steps = next((name, steps) for name, steps in plan.items() if steps)
                unseen = sampler.with_prompts(unseen_prompts)
                composition[who] = {name: {}}
                for n in steps if who == "student" else steps[-1:]:
                    images, _ = unseen(params, name, n, config.report.guidance_scale)
                    composition[who][name][str(n)] = round(verifier.score(images, unseen_prompts)["overall"], 4)
            for row in evaluate(draw, plan, captions, metrics):
                print(f"  {report.line(row)}")
                rows.append({"model": who} | row)
        result = (
            report.nest(rows)
            | ({"composition": {"captions": len(unseen_prompts)} | composition} if unseen_prompts else {})
            | report.environment()
            | {
                "captions": len(captions),
                "guidance_scale": config.report.guidance_scale,
                "settings": settings,
                "config_digest": config_digest(config.to_dict()),
                "seconds": {"training": round(seconds, 1), "report": round(time.monotonic() - began, 1)},
            }
        )
        report.write(result, workdir)
        report.show(result)
        print(f"student in {workdir / 'export'}; images in {workdir / 'samples' / 'final.png'}; figures in {path}")

    draw_of_step, loss = lcd_functions(config, teacher.model, model)
    return Job(
        title="lcd",
        init=init,
        frozen=lcd_frozen(config, frozen) | {"empty_ids": teacher.tokenize([""])[0]},
        draw=draw_of_step,
        loss=loss,
        example=lcd_batch(config, teacher.model, config.train.batch_size),
        batches=batches,
        preview=preview,
        finish=finish,
        origin={"teacher": digest(teacher.params)},
    )
