"""The shipped configs in small, for tests of whole runs."""

from pathlib import Path

from lcm_jax import config_files

ROOT = Path(__file__).resolve().parent.parent


def load_config(name: str, *argument: str):
    """Return the config of configs/NAME.py, as --config=configs/NAME.py:ARGUMENT has it."""
    return config_files.load(":".join([name, *argument]))


SHRUNK = {
    "mesh.data": 1,
    "data.length": 32,
    "train.batch_size": 8,
    "train.steps": 2,
    "checkpoint.every_steps": 1,
    "log.every_steps": 1,
}
SHRUNK_LCD = SHRUNK | {
    "optimizer.warmup_steps": 0,
    "sample.every_steps": 0,
    "sample.prompts": 6,
    "sample.scored_prompts": 6,
    "sample.batch_size": 6,
    "sample.teacher_steps": 2,
    "sample.student_steps": (1, 2),
    "report.prompts": 6,
    "report.reference": 32,
    "report.batch_size": 6,
}
QUICK = {"optimizer.name": "adamw"}  # half the time to compile, where the optimizer is beside the point


def shrunk_lcd(teacher: Path, **more):
    config = load_config("shapes")
    cache = str(Path(teacher).parent / "latents")  # encoded once for all these runs
    config.update_from_flattened_dict(SHRUNK_LCD | {"teacher": str(teacher), "data.cache": cache} | more)
    config.report.teacher = {"ddim": (1, 2), "dpmsolver++": (2,)}
    config.report.student = {"lcm": (1, 2)}
    return config


def shrunk(name: str, model: Path | str, **more):
    """A config of LCF, adapters or fine-tuning, for a model of `tiny_model`."""
    config = load_config(*name.split(":"))
    role = "init" if "init" in config else "teacher"
    sampler = "lcm" if role == "init" else "ddim"
    small = SHRUNK_LCD | QUICK | {"sample.scored_prompts": 0, "checkpoint.best": "", "sample.student_steps": (1,)}
    small |= {role: str(model), f"sample.{role}_steps": (1,) if role == "init" else 1}
    if "lora" in config:
        small |= {"lora.rank": 4, "lora.alpha": 8.0, "lora.targets": ("to_q", "to_out.0", "conv1")}
    config.update_from_flattened_dict(small | more)
    config.report[role] = {sampler: (1,)}
    config.report.student = {"ddim" if config.objective.name == "diffusion" else "lcm": (1,)}
    return config


def shrunk_for_processes(teacher: Path):
    """For runs in processes of their own, which import it without torch: few pictures are drawn."""
    few = {"train.batch_size": 2, "checkpoint.every_steps": 4, "sample.teacher_steps": 1, "sample.student_steps": (1,)}
    config = shrunk_lcd(teacher, **QUICK | few)
    config.report.teacher, config.report.student = {"ddim": (1,)}, {"lcm": (1,)}
    return config


# configs/lcd.py, for a teacher of a few thousand parameters and images of 16 pixels.
SHRUNK_PUBLISHED = {
    "data.size": 16,
    "data.held_out": 6,
    "mesh.data": 1,
    "train.steps": 2,
    "train.batch_size": 4,
    "checkpoint.every_steps": 2,
    "log.every_steps": 1,
    "sample.every_steps": 2,
    "sample.prompts": 2,
    "sample.scored_prompts": 2,
    "sample.batch_size": 2,
    "sample.teacher_steps": 2,
    "sample.student_steps": (1,),
    "report.prompts": 2,
    "report.batch_size": 2,
    "report.reference": 6,
}


def shrunk_published(name: str, teacher: Path, shards: str, **more):
    config = load_config("lcd", name)
    config.update_from_flattened_dict({"teacher": str(teacher), "data.shards": shards} | SHRUNK_PUBLISHED | more)
    config.report.teacher = {"ddim": (2,)}
    config.report.student = {"lcm": (1,)}
    config.train.remat = (
        "block" if name == "sd15" else "none"
    )  # this and bfloat16 take longer to compile; once each is enough
    if name != "ssd1b":
        config.train.dtype = "float32"
    return config


def checkpoints_of(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit())
