"""configs/lcf.py, lcm_lora.py, finetune.py: their settings, and a step of each of their models in small."""

from pathlib import Path

import pytest
import reference_families
import tiny_model
from folders import write_folder
from reference_families import PUBLISHED, SMALL, SMALL_XL, scheduler
from running import trace_loss
from shards import write_shards
from whole_runs import SHRUNK_PUBLISHED, load_config, shrunk

from lcm_jax.models.families import FAMILIES
from lcm_jax.models.lora import DEFAULT_TARGETS, LoRASettings
from lcm_jax.recipes import check_config, make_task
from lcm_jax.weights.model import open_model

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folders of a base of each family, an LCM, and an LCM's UNet alone, as lcm-sdxl is published."""
    folder = tmp_path_factory.mktemp("models")
    guided = {"time_cond_proj_dim": 32}
    families = {name: PUBLISHED[name] for name in ("sd15", "sdxl")}
    families["lcm"] = (
        SMALL | guided | {"use_linear_projection": False},
        scheduler("LCMScheduler", steps_offset=1),
        False,
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, family in families.items():
            patch.setitem(reference_families.FAMILIES, name, family)
            (folder / f"{name}-tokenizers").mkdir()
            reference_families.build(folder / f"{name}-tokenizers", name).save_pretrained(folder / name)
    diffusers.UNet2DConditionModel(**SMALL_XL, **guided).save_pretrained(folder / "lcm-unet")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    return {"folder": write_folder(folder / "images"), "tar": write_shards(folder / "shards")}


def test_the_settings_are_the_published_ones_or_say_so():
    for name, size in (("sd15", 512), ("sdxl", 1024)):
        lcf, adapters, fine = (load_config(each, name) for each in ("lcf", "lcm_lora", "finetune"))
        assert {config.data.size for config in (lcf, adapters, fine)} == {size}
        assert {lcf.family, adapters.family, fine.family} <= FAMILIES.keys()
        assert lcf.optimizer.learning_rate == 8e-6 and lcf.objective.num_ddim_steps == 50
        assert (adapters.lora.rank, adapters.lora.alpha, adapters.train.ema_rate) == (64, 64.0, 0.0)
        assert adapters.optimizer.learning_rate == 1e-4 and adapters.objective.distance == "huber"
        assert adapters.lora.targets == LoRASettings().targets == DEFAULT_TARGETS
        assert lcf.data.source == fine.data.source == "folder" and adapters.data.source == "tar"
    for name in ("lcf", "lcm_lora", "finetune"):
        with pytest.raises(ValueError, match=rf"'sd3' is not supported; use shapes, sd15, sdxl: .*configs/{name}.py:"):
            load_config(name, "sd3")


def test_fine_tuning_the_bundled_teacher_makes_a_step_in_small(tmp_path):
    teacher = tiny_model.write(tmp_path / "teacher", unet=tiny_model.SHALLOW)
    task = make_task(shrunk("finetune:shapes", teacher), tmp_path / "run")
    trace_loss(task)
    assert task.params.keys() == {"unet"} and "unet" not in task.frozen


@pytest.mark.parametrize(
    ("name", "begun"),
    [
        ("lcf:sd15", {"init": "lcm"}),
        ("lcf:sdxl", {"init": "lcm-unet", "base": "sdxl"}),
        ("lcm_lora:sd15", {"teacher": "sd15"}),
        ("lcm_lora:sdxl", {"teacher": "sdxl"}),
        ("finetune:sd15", {"teacher": "sd15"}),
        ("finetune:sdxl", {"teacher": "sdxl"}),
    ],
)
def test_a_step_of_each_model_in_small(name, begun, models, data, tmp_path):
    config = load_config(*name.split(":"))
    check_config(config)
    paths = {key: str(models / folder) for key, folder in begun.items()}
    where = {"data.shards": data["tar"], "data.folder": data["folder"]}
    small = {key: value for key, value in SHRUNK_PUBLISHED.items() if key != "sample.teacher_steps"}
    config.update_from_flattened_dict(small | paths | where | {"checkpoint.best": ""})
    if "lora" in config:
        config.lora.rank = 4
        config.lora.targets = tuple(each for each in config.lora.targets if "samplers" not in each)  # of one level
    task = make_task(config, tmp_path / "run")

    trace_loss(task)
    assert task.params.keys() == {"lora" if "lora" in config else "unet"}
    assert ("unet" in task.frozen) == ("lora" in config), "a UNet is held once"
    batch = next(task.make_batches(0))
    assert {key: (x.shape, x.dtype) for key, x in batch.items()} == {
        key: (x.shape, x.dtype) for key, x in task.batch.items()
    }
    if name == "lcf:sdxl":  # whose text encoders are the base's, and whose UNet is an LCM's
        stored = open_model(paths["init"], base=paths["base"])
        assert stored.configs["scheduler"]["_class_name"] == "LCMScheduler"
        assert task.params["unet"]["time_embedding"]["cond_proj"]["kernel"].shape[0] == 32
