"""scheduler_config.json: of single files, which have none, of students, and of a model beside its base."""

from collections.abc import Mapping
from typing import Any

from lcm_jax.diffusion.samplers import CONSISTENCY_SCHEDULERS
from lcm_jax.diffusion.schedule import read_betas

# The noise schedule of all published Stable Diffusion models.
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
LCM = {"_class_name": "LCMScheduler", "original_inference_steps": 50, "timestep_scaling": 10.0}
INHERITED = ("trained_betas", "prediction_type", "rescale_betas_zero_snr", "steps_offset")  # by a student


def is_consistency_model(configs: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return True for a latent consistency model, by its input for the guidance weight or by its scheduler.

    configs: by component.
    """
    guided = configs["unet"].get("time_cond_proj_dim") is not None
    return guided or configs["scheduler"].get("_class_name") in CONSISTENCY_SCHEDULERS


def is_turbo(configs: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return True for a model of few steps without guidance, such as SDXL-Turbo, by its scheduler."""
    scheduler = configs["scheduler"]
    trailing = scheduler.get("_class_name", "").startswith("Euler") and scheduler.get("timestep_spacing") == "trailing"
    # Teachers with zero terminal SNR have this spacing too; the published models of few steps predict epsilon.
    return trailing and scheduler.get("prediction_type", "epsilon") == "epsilon"


def published_scheduler(
    family: str, guided: bool, prediction_type: str | None = None, zero_snr: bool = False
) -> dict[str, Any]:
    """Return the scheduler config that published models of `family` (sd1, sd2, sdxl) have.

    guided: the UNet has an input for the guidance weight, so that the model is an LCM. prediction_type: None if it is
    unknown; the config then has no such key.
    """
    if guided:
        own = LCM
    elif family == "sdxl":
        own = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
    else:
        own = {"_class_name": "DDIMScheduler"}
    known = {} if prediction_type is None else {"prediction_type": prediction_type}
    return SCHEDULE | own | ({"rescale_betas_zero_snr": True} if zero_snr else {}) | known


def lcm_scheduler(teacher: Mapping[str, Any], num_ddim_steps: int) -> dict[str, Any]:
    """Return the LCMScheduler config of a student, which samples on the grid of its training.

    teacher: the scheduler config of its teacher. num_ddim_steps: the number of timesteps of that grid. Raises
    ValueError for betas that are not supported.
    """
    # The betas are written in full, since LCMScheduler has other defaults than its teacher's class.
    return (
        read_betas(teacher)
        | {name: teacher[name] for name in INHERITED if name in teacher}
        | LCM
        | {"original_inference_steps": num_ddim_steps, "set_alpha_to_one": False, "clip_sample": False}
    )


def merge_scheduler(own: Mapping[str, Any], base: Mapping[str, Any], guided: bool) -> dict[str, Any]:
    """Combine the scheduler config `own`, which may be empty, with the scheduler config of the base.

    guided: the UNet has an input for the guidance weight, so that the model is an LCM; the base is then its teacher,
    or another LCM. Prediction type and zero SNR in `own` have precedence.
    """
    base_is_lcm = base["_class_name"] in CONSISTENCY_SCHEDULERS
    if guided and not base_is_lcm:
        scheduler = lcm_scheduler(base, LCM["original_inference_steps"])
    elif base_is_lcm and own and not guided:
        scheduler = dict(own) | {"prediction_type": base.get("prediction_type", "epsilon")}
    else:
        scheduler = base
    explicit = {option: own[option] for option in ("prediction_type", "rescale_betas_zero_snr") if option in own}
    return {"prediction_type": "epsilon"} | dict(scheduler) | explicit
