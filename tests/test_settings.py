"""Every number of every config has its range, and what cannot be is one line before anything is read."""

import math

import pytest
from whole_runs import load_config

from lcm_jax import config_files, evaluate
from lcm_jax.recipes import make_task, settings

ALL = [name for name, _ in config_files.bundled() if not name.startswith("study_")]  # whose runs have their own test


def numbers(value) -> list[float]:
    """The numbers of a setting, in tuples of any depth."""
    if isinstance(value, tuple | list):
        return [number for each in value for number in numbers(each)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def load(name: str):
    name, _, argument = name.partition(":")
    return load_config(name, *([argument] if argument else []))


def test_every_number_of_every_config_has_a_range_and_is_in_it():
    seen = set()
    for name in ALL:
        config = load(name)
        (evaluate.check_config if name.startswith("eval/") else settings.check)(config)
        for key, value in settings.leaves(config.to_dict()):
            if key.startswith(("objective.", "lora.")) and key not in settings.RANGES:
                continue  # checked by the dataclass of the objective or of the adapters
            if numbers(value) or (value == () and key != "data.filters"):  # which are text
                assert settings.range_of(key), f"{name}: {key} has no range in lcm_jax/recipes/settings.py"
            if isinstance(value, bool) or key.endswith("dtype"):
                assert key in settings.CHOICES, f"{name}: {key} has no choices in lcm_jax/recipes/settings.py"
            seen |= {pattern for pattern in settings.RANGES if settings.RANGES[pattern] is settings.range_of(key)}
            seen |= {key}
    unused = [key for key in settings.RANGES if not key.endswith("*") and key not in seen]
    assert not unused, "no config has these keys"


@pytest.mark.parametrize("key", settings.RANGES)
def test_no_range_has_what_is_no_finite_number(key):
    allowed = settings.RANGES[key]
    for wrong in (None, True, False, "1", math.nan, -math.inf, {}, *([] if allowed.infinite else [math.inf])):
        assert not allowed.has(wrong) and not (allowed.many and allowed.has((wrong,))), (key, wrong)
    if not allowed.real:
        assert not allowed.has(1.5)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"train.steps": 0}, "^train.steps 0 is not supported; use a whole number of at least 1$"),
        ({"train.batch_size": 0}, "^train.batch_size 0 is not supported"),
        ({"train.accumulate": 0}, "^train.accumulate 0 is not supported"),
        ({"train.ema_rate": 1.0}, "^train.ema_rate 1.0 is not supported; use a number of at least 0 and below 1$"),
        ({"train.dtype": "float17"}, "^train.dtype 'float17' is not supported; use float32 or bfloat16 or float16$"),
        ({"log.every_steps": -1}, "^log.every_steps -1 is not supported; use a whole number of at least 0$"),
        ({"report.batch_size": 0}, "^report.batch_size 0 is not supported"),
        ({"optimizer.learning_rate": math.nan}, "^optimizer.learning_rate nan is not supported; use a number of at"),
        ({"optimizer.clip_norm": 0.0}, "^optimizer.clip_norm 0.0 is not supported; use a number above 0$"),
        ({"student.guidance_embedding_dim": 5}, "5 is not supported; use a multiple of 2 of at least 4$"),
        (
            {"student.guidance_embedding_init": "ones"},
            "^student.guidance_embedding_init 'ones' .*; use zero or normal$",
        ),
        ({"objective.solver": "euler"}, "^objective.solver 'euler' is not supported; use ddim or dpm or dpm"),
        ({"mesh.data": 0}, "^mesh.data 0 is not supported; use a whole number of at least 1, or -1$"),
        ({"objective.w_min": 9.0}, "^objective.w_min 9.0 is above objective.w_max 7.0; lower it$"),
        ({"objective.num_ddim_steps": 1}, "^sample.student_steps has 8, and .* at most objective.num_ddim_steps = 1"),
        ({"sample.student_steps": (1, "a")}, r"^sample.student_steps \(1, 'a'\) is not supported; use whole numbers"),
        ({"report.teacher": {"foo": (1,)}}, "^report.teacher.foo is not supported: .* no sampler 'foo'; use one of"),
        ({"report.student": {"lcm": (9,)}}, "^report.student.lcm has 9, and a student samples in at most"),
        ({"report.student": {"lcm": ()}}, "^report.student has no steps"),
        ({"report.teacher": {}}, "^report.teacher has no steps; use numbers for a sampler"),
        ({"report.student": {"lcm": ((1, 2), 4)}}, "^report.student.lcm .* is not supported; use whole numbers"),
        ({"sample.guidance_scale": 0.0}, "^sample.guidance_scale 0.0 is not supported; use a number of at least 1 "),
        ({"metrics": ("foo",)}, "^metrics 'foo' is not supported; use verifier or frechet or classifier or"),
        ({"metrics": ()}, r"^metrics \(\) is not supported; use a tuple of verifier, frechet, classifier,"),
        ({"metrics": ("frechet", "frechet")}, "^metrics .* has 'frechet' twice; use it once$"),
        ({"data.source": "tar"}, "^metrics 'verifier' is not supported for data.source 'tar', .* of shapes alone"),
        (
            {"objective.name": "lcx"},
            "^objective.name 'lcx' is not supported; use one of autoencoder, diffusion, lcd, lcf$",
        ),
    ],
)
def test_a_setting_that_cannot_be_is_one_line_before_anything_is_read(mistake, message, tmp_path):
    config = load_config("shapes")
    config.teacher = "a teacher that is never read"
    for group in ("report.teacher", "report.student"):
        if group in mistake:
            config.report[group.split(".")[1]] = mistake[group]
    config.update_from_flattened_dict({k: v for k, v in mistake.items() if not isinstance(v, dict)})
    with pytest.raises(ValueError, match=message) as caught:
        make_task(config, tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def change(name: str, *without: str, **groups: str):
    """A config without some of its keys, and with groups of other bundled configs."""
    config = load(name)
    with config.unlocked():
        for key in without:
            del config[key]
        for key, other in groups.items():
            config[key] = load(other)[key]
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (("shapes", "teacher"), "^the config has no teacher; copy it from a bundled config"),
        (("lcf:sd15", "init"), "^the config has no init; copy it"),
        (("shapes", "student"), "^the config has no student.guidance_embedding_dim; copy it"),
        (("lcf:shapes", "log", {"lora": "lcm_lora:shapes"}), "^the config has no log; copy it"),
        (
            ("shapes", {"lora": "lcm_lora:shapes"}),
            "^student has no effect in this config, whose objective is lcd; remove it$",
        ),
        (
            ("lcf:shapes", {"student": "shapes"}),
            "^student has no effect in this config, whose objective is lcf; remove it$",
        ),
        (
            ("lcf:shapes", {"teacher": "shapes"}),
            "^teacher has no effect in this config, whose objective is lcf; remove it$",
        ),
        (("finetune:sd15", {"student": "shapes"}), "^student has no effect in this config, whose objective is dif"),
        (("shapes", {"init": "lcf:shapes"}), "^init has no effect in this config, whose objective is lcd; remove it$"),
        (
            ("finetune:shapes", {"init": "lcf:shapes"}),
            "^init has no effect in this config, whose objective is diffusion",
        ),
        (("shapes_vae", {"base": "shapes"}), "^base has no effect in this config, whose objective is autoencoder"),
        (("shapes_teacher", {"lora": "shapes_style_lora"}), "^lora is not supported for a model that is trained from"),
        (("shapes_vae", {"lora": "shapes_style_lora"}), "^lora is not supported for a model that is trained from sc"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(map(str, value)),
)
def test_a_model_that_a_config_lacks_or_has_no_use_for_is_named(config, message, tmp_path):
    groups = config[-1] if isinstance(config[-1], dict) else {}
    names = [name for name in config if isinstance(name, str)]
    with pytest.raises(ValueError, match=message):
        make_task(change(*names, **groups), tmp_path / "run")


@pytest.mark.parametrize("name", ["shapes", "shapes_teacher", "shapes_vae"])
def test_a_key_that_a_config_lacks_is_named(name, tmp_path):
    for key in ("log", "metrics", "log.every_steps", "train.dtype", "sample.every_steps", "optimizer.b2"):
        config = load_config(name)
        if key == "metrics" and key not in config:
            continue
        group, _, leaf = key.partition(".")
        del (config[group] if leaf else config)[leaf or group]
        with pytest.raises(ValueError, match=f"^the config has no {key}; copy it from a bundled config"):
            make_task(config, tmp_path / "run")
