"""From a config to what the training loop runs: weights, networks, data, previews and what is left behind at the end.

Each function builds the Job of one objective; `RECIPES` is the table of their names.
"""

import copy
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from PIL import Image, ImageDraw

from lcm_jax import pipeline, report
from lcm_jax.data import latents, loader, shapes, tar_shards
from lcm_jax.data import tokenizer as tokenizers
from lcm_jax.diffusion.schedule import lcm_scheduler
from lcm_jax.evaluation import verifier
from lcm_jax.evaluation.frechet import moments
from lcm_jax.models.stable_diffusion import StableDiffusion
from lcm_jax.models.vae import AutoencoderKL
from lcm_jax.objectives import autoencoder, diffusion, lcd
from lcm_jax.training.loop import Job, config_digest
from lcm_jax.weights import diffusers_folder as folders

SCHEDULE = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False, "steps_offset": 0, "timestep_spacing": "trailing", "clip_sample": False,
}  # fmt: skip


def to_float(images: np.ndarray) -> jax.Array:
    """uint8[..., 3] -> float32 in -1..1."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1.0


def save_grid(rows: list[np.ndarray], path: Path, labels: list[str] | None = None) -> None:
    """Writes a PNG of rows of equally sized pictures, each uint8[n, H, W, 3], with a label left of each row."""
    picture = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    margin, height = (110 if labels else 0), rows[0].shape[1]
    page = Image.new("RGB", (picture.shape[1] + margin, picture.shape[0]), "white")
    page.paste(Image.fromarray(picture), (margin, 0))
    for i, label in enumerate(labels or []):
        ImageDraw.Draw(page).text((6, i * height + height // 2 - 5), label, fill="black")
    page.save(path)


def digest(params) -> str:
    """sha256 of a parameter tree's names and bytes, in hexadecimal."""
    total = hashlib.sha256()
    for path, leaf in sorted(flatten_dict(params).items()):
        total.update("/".join(path).encode())
        total.update(np.ascontiguousarray(leaf).tobytes())
    return total.hexdigest()


def master(params):
    """Stored parameters -> float32."""
    return jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)


def held_dtype(leaf, dtype):
    """What a network that computes in `dtype` holds of a frozen parameter: it casts matrices and kernels before each
    use anyway, so that these lose nothing; biases and scales stay float32."""
    return jnp.dtype(dtype if leaf.ndim >= 2 else jnp.float32)


def held(params, dtype):
    """Stored parameters -> those that a frozen network of that compute dtype holds, on the host."""
    return jax.tree.map(lambda p: np.asarray(p).astype(held_dtype(p, dtype)), params)


def pictures(config, split: str, length: int) -> shapes.Shapes:
    """The embedded set, for the objectives that train on nothing else."""
    if config.data.source != "shapes":
        raise ValueError(f"data.source is {config.data.source!r}; this objective takes shapes")
    tasks = config.data.get("tasks", shapes.TASKS) if split == "train" else shapes.TASKS
    return shapes.Shapes(split, length, config.data.size, tasks=tasks)


def prompts_of(split: str, per_task: int) -> list[str]:
    """The same few captions of every task each time, evenly spread over those of the split."""
    chosen = []
    for task in shapes.TASKS:
        if not (every := shapes.captions(split, task)):
            continue
        order = np.random.default_rng(0).permutation(len(every))
        chosen += [every[order[i % len(every)]] for i in range(per_task)]
    return chosen


# ---- the autoencoder ------------------------------------------------------------------------------------------------


class ImagesOnly:
    """A source's pictures without their captions."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        return {"image": self.source[i]["image"]}


def autoencoder_job(config, workdir: Path) -> Job:
    vae_config = config.vae.to_dict() | {"sample_size": config.data.size, "scaling_factor": 1.0}
    vae = AutoencoderKL.from_config(vae_config, jnp.dtype(config.train.dtype))
    downscale, channels = 2 ** (len(config.vae.block_out_channels) - 1), config.vae.latent_channels
    size = config.data.size
    held_out = pictures(config, "test", 512)
    shown = np.stack([held_out[i]["image"] for i in range(config.sample.pictures)])
    captions = [held_out[i]["caption"] for i in range(len(held_out))]
    apply = lambda method: lambda params, x: vae.apply({"params": params}, x, method=method)  # noqa: E731
    encode = jax.jit(apply("encode"))
    decode_mean = jax.jit(lambda params, moments: apply("decode")(params, jnp.split(moments, 2, axis=-1)[0]))

    @jax.jit
    def init():
        noise = jnp.zeros((1, size // downscale, size // downscale, channels))
        return vae.init(jax.random.key(config.train.seed), jnp.zeros((1, size, size, 3)), noise)["params"]

    def preview(ema, path):
        restored = decode_mean(ema, encode(ema, to_float(shown)))
        half = len(shown) // 2
        again = np.asarray(pipeline.to_uint8(restored))
        save_grid([shown[:half], again[:half], shown[half:], again[half:]], path)
        return {"held_out_absolute_error": float(jnp.mean(jnp.abs(restored - to_float(shown))))}

    def finish(ema, seconds):
        images = np.stack([held_out[i]["image"] for i in range(len(held_out))])
        moments = jnp.concatenate([encode(ema, to_float(part)) for part in np.split(images, 8)])
        restored = [np.asarray(pipeline.to_uint8(decode_mean(ema, part))) for part in jnp.split(moments, 8)]
        mean = jnp.split(moments, 2, axis=-1)[0]
        exported = vae_config | {
            "_class_name": "AutoencoderKL", "scaling_factor": round(1.0 / float(jnp.std(mean)), 5),
            "block_out_channels": list(config.vae.block_out_channels),
            "down_block_types": ["DownEncoderBlock2D"] * len(config.vae.block_out_channels),
            "up_block_types": ["UpDecoderBlock2D"] * len(config.vae.block_out_channels),
            "in_channels": 3, "out_channels": 3, "act_fn": "silu",
        }  # fmt: skip
        with folders.new_folder(workdir / "export", overwrite=True) as folder:
            folders.write_component(folder, "vae", exported, ema)
        figures = {
            "verifier": verifier.score(np.concatenate(restored), captions),
            "scaling_factor": exported["scaling_factor"],
            "seconds": seconds,
        }
        (workdir / "report.json").write_text(json.dumps(figures, indent=1) + "\n")
        print(
            f"autoencoder in {workdir / 'export' / 'vae'}; the verifier accepts {figures['verifier']['overall']:.1%} "
            f"of held-out pictures after encoding and decoding"
        )

    return Job(
        title="autoencoder",
        init=init,
        frozen={},
        draw=partial(autoencoder.draw, downscale=downscale, channels=channels),
        loss=partial(
            autoencoder.loss,
            networks=autoencoder.Networks(apply("encode"), apply("decode")),
            kl_weight=config.objective.kl_weight,
        ),
        batches=lambda step: loader.batches(
            ImagesOnly(pictures(config, "train", config.data.length)),
            config.train.batch_size, seed=config.train.seed, first=step,
        ),
        preview=preview,
        finish=finish,
    )  # fmt: skip


# ---- what the objectives in latent space share --------------------------------------------------------------------


def latent_source(
    config, workdir: Path, model: StableDiffusion, vae_params, tokenize, source=None, identity: str = ""
) -> latents.LatentCache:
    """The training pictures as moments and tokens, encoded once into `data.cache`, or workdir/latents by default.

    source, identity: the pictures and what tells them from others; by default the embedded set.
    """
    if not identity:
        identity = f"{config.data.source} {config.data.size} {config.data.length}"
        identity += "".join(f" {task}" for task in config.data.get("tasks", ()))
    encode = jax.jit(lambda params, images: model.encode(params, to_float(images)))
    on_device = jax.device_put(vae_params)
    return latents.cache_latents(
        pictures(config, "train", config.data.length) if source is None else source,
        lambda images: encode(on_device, images),
        tokenize,
        Path(config.data.cache or workdir / "latents"),
        {
            "data": identity,
            "vae": digest(vae_params),
            "empty_prompt": str(np.asarray(tokenize([""])).tolist()),  # tokenizers differ in what they pad with
        },
    )


@dataclass(frozen=True)
class Captioned:
    """Captioned pictures to distil on. train, held_out: random access to {"image", "caption"[, "time_ids"]}.

    captions(group) -> held-out captions, as many as the config's group `sample` or `report` asks for. unseen: captions
    of what no training picture has. score: the share of pictures that satisfy their captions, where something can tell.
    identity: what tells `train` from other data.
    """

    train: Sequence
    held_out: Sequence
    captions: Callable[..., list[str]]
    unseen: list[str]
    score: Callable | None
    identity: str


def captioned(config, workdir: Path) -> Captioned:
    """The data that `config.data.source` names: `shapes`, or the `tar` shards of data.shards. Raises ValueError."""
    if config.data.source == "shapes":
        return Captioned(
            train=shapes.Shapes("train", config.data.length, config.data.size),
            held_out=shapes.Shapes("test", config.report.reference, config.data.size),
            captions=lambda group: prompts_of("test", group.per_task),
            unseen=prompts_of("composition", config.report.per_task),
            score=verifier.score,
            identity="",
        )
    if config.data.source != "tar":
        raise ValueError(f"data.source is {config.data.source!r}; choose shapes or tar")
    most = max(config.sample.prompts, config.report.prompts, config.report.reference)
    if config.data.held_out < most:
        raise ValueError(
            f"data.held_out is {config.data.held_out}, fewer records than sample.prompts, report.prompts or "
            f"report.reference take: {most}; raise it, or lower these"
        )
    index = tar_shards.index_shards(tar_shards.expand(config.data.shards), workdir / "index")
    every = tar_shards.TarShards(index, config.data.size, config.train.seed, config.data.caption_field)
    first = len(every) - config.data.held_out
    train, held_out = every.part(0, first), every.part(max(first, 0), len(every))
    return Captioned(
        train=train,
        held_out=held_out,
        captions=lambda group: [held_out.caption(i) for i in range(group.prompts)],
        unseen=[],
        score=None,
        identity=train.identity,
    )


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


class Sampler:
    """Pictures for fixed prompts from fixed noise; each (sampler, steps) is compiled once."""

    def __init__(self, model: StableDiffusion, tokenize, prompts: list[str], size: int, batch: int, seed: int = 1):
        self.prompts, self._batch = prompts, min(batch, len(prompts))
        self._model, self._tokenize, self._seed = model, tokenize, seed
        side = size // model.downscale
        self._shape = (side, side, model.vae.config["latent_channels"])
        self._ids, self._empty = tokenize(prompts), tokenize([""])[0]
        self._time_ids = None if model.text_encoder_2 is None else pipeline.make_time_ids(self._batch, (size, size))
        self._compiled: dict = {}

    def of(self, prompts: list[str]) -> "Sampler":
        """Other prompts for the same programs."""
        other = copy.copy(self)
        other.prompts, other._ids = prompts, self._tokenize(prompts)
        return other

    def __call__(self, params, sampler: str, steps: int, guidance_scale: float) -> tuple[np.ndarray, float]:
        """(uint8[len(prompts), H, W, 3], seconds without compilation). params: by network."""
        params = jax.block_until_ready(jax.device_put({name: params[name] for name in self._model.networks}))
        inputs = [self._inputs(steps, first, guidance_scale) for first in range(0, len(self.prompts), self._batch)]
        if (sampler, steps) not in self._compiled:
            function = jax.jit(partial(pipeline.generate, self._model, sampler=sampler, steps=steps))
            self._compiled[sampler, steps] = function.lower(params, *inputs[0]).compile()
        began = time.monotonic()
        parts = [np.asarray(self._compiled[sampler, steps](params, *each)) for each in inputs]
        return np.concatenate(parts)[: len(self.prompts)], time.monotonic() - began

    def _inputs(self, steps: int, first: int, guidance_scale: float):
        ids = self._ids[first : first + self._batch]
        ids = np.concatenate([ids, np.repeat(ids[-1:], self._batch - len(ids), axis=0)])
        z, noise = pipeline.draw_noise(self._seed, self._batch, steps, self._shape, first)
        return ids, self._empty, z, noise, jnp.float32(guidance_scale), self._time_ids


# ---- the teacher ----------------------------------------------------------------------------------------------------


def diffusion_job(config, workdir: Path) -> Job:
    """Text encoder and UNet on the latents of a trained autoencoder, from scratch or from the model `config.init`."""
    shipped = config.autoencoder in folders.SHIPPED
    autoencoder_folder = folders.locate(config.autoencoder) if shipped else Path(config.autoencoder)
    vae_config, vae_tensors = folders.read_component(autoencoder_folder, "vae")
    tokenizers.build(
        shapes.words(), workdir / "tokenizer", model_max_length=config.text_encoder.max_position_embeddings
    )
    tokenizer = tokenizers.load(workdir / "tokenizer")
    tokenize = partial(tokenizers.encode, tokenizer)
    unet_config = config.unet.to_dict() | {
        "_class_name": "UNet2DConditionModel", "in_channels": vae_config["latent_channels"],
        "out_channels": vae_config["latent_channels"], "cross_attention_dim": config.text_encoder.hidden_size,
        "sample_size": config.data.size // 2 ** (len(vae_config["block_out_channels"]) - 1),
    }  # fmt: skip
    text_config = config.text_encoder.to_dict() | {
        "model_type": "clip_text_model", "architectures": ["CLIPTextModel"], "vocab_size": tokenizer.vocab_size,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    scheduler = SCHEDULE | {"_class_name": "DDIMScheduler", "prediction_type": config.objective.prediction_type}
    configs = {"unet": unet_config, "vae": vae_config, "text_encoder": text_config, "scheduler": scheduler}
    model = StableDiffusion.from_configs(configs, jnp.dtype(config.train.dtype))
    abstract = model.abstract_params()
    vae_params = master(folders.to_params("vae", vae_tensors, abstract["vae"], str(autoencoder_folder)))
    source = latent_source(config, workdir, model, vae_params, tokenize)
    sampler = Sampler(
        model, tokenize, prompts_of("val", config.sample.per_task), config.data.size, batch=config.sample.batch_size
    )
    # A model to go on from: its weights are checked against the networks of this config.
    start = {
        name: master(
            folders.to_params(name, folders.read_component(folders.locate(config.init), name)[1], abstract[name])
        )
        for name in (("unet", "text_encoder") if config.init else ())
    }

    @jax.jit
    def random():
        unet, text = jax.random.split(jax.random.key(config.train.seed))
        z = jnp.zeros((1, unet_config["sample_size"], unet_config["sample_size"], unet_config["in_channels"]))
        context = jnp.zeros((1, 1, unet_config["cross_attention_dim"]))
        return {
            "unet": model.unet.init(unet, z, jnp.zeros(1, jnp.int32), context)["params"],
            "text_encoder": model.text_encoder.init(text, jnp.zeros((1, 2), jnp.int32))["params"],
        }

    def preview(ema, path):
        images, _ = sampler(ema | {"vae": vae_params}, "ddim", config.sample.steps, config.sample.guidance_scale)
        shown = images.reshape(len(shapes.TASKS), -1, *images.shape[1:])[:, :10]
        save_grid(list(shown), path)
        path.with_suffix(".txt").write_text("\n".join(sampler.prompts) + "\n")
        figures = verifier.score(images, sampler.prompts)
        return {"verifier": figures["overall"]} | {f"verifier/{task}": v for task, v in figures["tasks"].items()}

    def finish(ema, seconds):
        params = ema | {"vae": vae_params}
        with folders.new_folder(workdir / "export", overwrite=True) as folder:
            folders.write_pipeline(folder, configs, params, workdir / "tokenizer", scheduler, dtype=config.export.dtype)
        print(f"teacher in {workdir / 'export'} after {seconds:.0f} s")

    networks = diffusion.Networks(model.denoise, model.encode_prompt, model.to_latents)
    return Job(
        title="diffusion",
        init=lambda: start or random(),
        frozen={"empty_ids": jnp.asarray(tokenize([""])[0])},
        draw=partial(
            diffusion.draw,
            num_train_timesteps=len(model.schedule.alphas_cumprod),
            empty_prompts=config.objective.empty_prompts,
            timestep_power=config.objective.timestep_power,
        ),
        loss=partial(diffusion.loss, networks=networks, schedule=model.schedule),
        batches=lambda step: loader.batches(source, config.train.batch_size, seed=config.train.seed, first=step),
        preview=preview,
        finish=finish,
    )


# ---- the student ----------------------------------------------------------------------------------------------------


def student_configs(config, teacher: Mapping[str, Mapping]) -> dict[str, Mapping]:
    """The teacher's configs with an input for the guidance weight and the scheduler that samples in a few steps.

    Raises ValueError for a teacher that is a student already.
    """
    if teacher["unet"].get("time_cond_proj_dim") is not None:
        raise ValueError(
            f"teacher {config.teacher!r} is a latent consistency model already; give the model it came from"
        )
    return dict(teacher) | {
        "unet": teacher["unet"] | {"time_cond_proj_dim": config.objective.guidance_embedding_dim},
        "scheduler": lcm_scheduler(teacher["scheduler"], config.objective.num_ddim_steps),
    }


def encodes(config) -> bool:
    """Whether steps encode their pictures themselves: shards are too many to wait for, unless data.cache is given."""
    return config.data.source == "tar" and not config.data.cache


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
    loss = partial(
        lcd.loss,
        networks=lcd.Networks(model.denoise, teacher.denoise, model.encode_prompt, model.to_latents),
        schedule=model.schedule,
        num_ddim_steps=objective.num_ddim_steps,
        kind=objective.distance,
        huber_c=objective.huber_c,
        weighting=objective.weighting,
        own_share=objective.own_share,
    )
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
    # On the host from here on: what the devices hold is what the loop puts there.
    teacher.params = jax.device_get(teacher.params)
    frozen = {name: held(tree, teacher.model.dtype_of(name)) for name, tree in teacher.params.items()}
    data = captioned(config, workdir)
    if encodes(config):
        source, threads = tar_shards.Tokenized(data.train, teacher.tokenize), min(8, os.cpu_count() or 2)
    else:
        encoded = (data.train, data.identity)
        source, threads = latent_source(config, workdir, model, frozen["vae"], teacher.tokenize, *encoded), 2

    shown = data.captions(config.sample)
    preview_student = Sampler(model, teacher.tokenize, shown, config.data.size, config.sample.batch_size)
    preview_teacher = Sampler(teacher.model, teacher.tokenize, shown, config.data.size, config.sample.batch_size)
    few = tuple(config.sample.student_steps)
    teacher_row: list[np.ndarray] = []

    def init():
        # The student is the teacher with one input more, whose weights are zero: at first they agree for every w.
        unet = jax.tree.map(lambda p: np.asarray(p, np.float32), teacher.params["unet"])
        width = configs["unet"]["block_out_channels"][0]
        projection = np.zeros((config.objective.guidance_embedding_dim, width), np.float32)
        return {"unet": unet | {"time_embedding": unet["time_embedding"] | {"cond_proj": {"kernel": projection}}}}

    def rows_of(student):
        if not teacher_row:
            steps = config.sample.teacher_steps
            teacher_row.append(preview_teacher(frozen, "ddim", steps, config.sample.guidance_scale)[0])
        params = frozen | student
        return teacher_row + [preview_student(params, "lcm", n, config.sample.guidance_scale)[0] for n in few]

    labels = [f"teacher, {config.sample.teacher_steps} steps", *(f"student, {n} step{'s' * (n > 1)}" for n in few)]

    def preview(ema, path):
        rows = rows_of(ema)
        save_grid(rows, path, labels)
        path.with_suffix(".txt").write_text("\n".join(shown) + "\n")
        if data.score is None:
            return {}
        names = ["teacher", *(f"{n}_steps" for n in few)]
        return {f"verifier/{k}": data.score(r, shown)["overall"] for k, r in zip(names, rows, strict=True)}

    def finish(ema, seconds):
        path = workdir / "report.json"
        if path.exists() and (workdir / "export" / "model_index.json").exists():
            print(f"this run is complete: {workdir / 'export'}, {path}")
            report.show(json.loads(path.read_text()))
            return
        if (workdir / "export").exists():  # left by a run that was stopped between its export and its report
            shutil.rmtree(workdir / "export")
        student = frozen | jax.device_get(ema)
        stored = teacher.params | {"unet": jax.device_get(ema)["unet"]}
        with folders.new_folder(workdir / "export") as folder:
            folders.write_pipeline(folder, configs, stored, teacher.folder / "tokenizer", configs["scheduler"])
        (workdir / "samples").mkdir(exist_ok=True)
        save_grid(rows_of(student), workdir / "samples" / "final.png", labels)

        began = time.monotonic()
        captions = data.captions(config.report)
        encoder = jax.jit(
            lambda params, x: model.vae.apply({"params": params}, to_float(x), method="features").mean((1, 2))
        )

        vae, most = jax.device_put(frozen["vae"]), config.report.batch_size

        def features(images):
            parts = [images[i : i + most] for i in range(0, len(images), most)]
            return np.concatenate([np.asarray(encoder(vae, np.stack(part))) for part in parts])

        reference = moments(features([data.held_out[i]["image"] for i in range(config.report.reference)]))
        figures, composition = {}, {}
        for who, network, params, plan in [
            ("teacher", teacher.model, frozen, config.report.teacher),
            ("student", model, student, config.report.student),
        ]:
            print(f"{who}, {len(captions)} captions:")
            sampler = Sampler(network, teacher.tokenize, captions, config.data.size, config.report.batch_size, seed=2)
            draw = lambda name, steps, s=sampler, p=params: s(p, name, steps, config.report.guidance_scale)  # noqa: E731
            plan = plan.to_dict()
            if data.unseen:
                name, steps = next(iter(plan.items()))
                unseen = sampler.of(data.unseen)
                composition[who] = {name: {}}
                for n in steps if who == "student" else steps[-1:]:
                    images, _ = unseen(params, name, n, config.report.guidance_scale)
                    composition[who][name][str(n)] = round(data.score(images, data.unseen)["overall"], 4)
            figures[who] = report.figures_of(draw, plan, captions, features, reference, data.score, print)
        result = (
            figures
            | ({"composition": {"captions": len(data.unseen)} | composition} if data.unseen else {})
            | report.environment()
            | {
                "captions": len(captions),
                "guidance_scale": config.report.guidance_scale,
                "config_digest": config_digest(config.to_dict()),
                "seconds": {"training": round(seconds, 1), "report": round(time.monotonic() - began, 1)},
            }
        )
        report.write(result, workdir)
        report.show(result)
        print(f"student in {workdir / 'export'}; pictures in {workdir / 'samples' / 'final.png'}; figures in {path}")

    draw_of_step, loss = lcd_functions(config, teacher.model, model)
    return Job(
        title="lcd",
        init=init,
        frozen=lcd_frozen(config, frozen) | {"empty_ids": teacher.tokenize([""])[0]},
        draw=draw_of_step,
        loss=loss,
        batches=lambda step: loader.batches(
            source, config.train.batch_size, seed=config.train.seed, first=step, threads=threads
        ),
        preview=preview,
        finish=finish,
    )


RECIPES: Mapping[str, Callable] = {"autoencoder": autoencoder_job, "diffusion": diffusion_job, "lcd": lcd_job}
