"""The bundled configs by name, in a clone and in a wheel."""

import configparser
import shutil
import sys

import pytest
from absl import flags
from ml_collections import config_flags
from whole_runs import ROOT

from lcm_jax import config_files, main
from lcm_jax.diffusion.samplers import SAMPLERS
from lcm_jax.recipes import settings


def test_a_name_a_name_with_an_argument_and_a_file_are_found(tmp_path):
    shapes = str(ROOT / "configs" / "shapes.py")
    assert config_files.locate("shapes") == config_files.locate("shapes.py") == shapes
    assert config_files.locate("lcd:sdxl") == str(ROOT / "configs" / "lcd.py") + ":sdxl"
    assert config_files.locate("eval/shapes") == str(ROOT / "configs" / "eval" / "shapes.py")
    own = tmp_path / "shapes.py"
    own.write_text("")
    assert config_files.locate(f"{own}:x") == f"{own}:x", "a file is taken as it is"
    argv = ["main", "--config=lcd:sd15", "--config.train.steps=3", "--workdir=shapes", "--config", "shapes"]
    lcd = str(ROOT / "configs" / "lcd.py")
    assert config_files.by_file(argv) == ["main", f"--config={lcd}:sd15", *argv[2:5], shapes]


@pytest.mark.parametrize("name", ["shape", "configs/none.py", "none:sd15"])
def test_an_unknown_name_is_one_line_with_all_names(name):
    with pytest.raises(
        ValueError, match=r"is neither a file nor a bundled config; use one of .*lcd:sd15.*, shapes, "
    ) as stop:
        main.parse(["main", f"--config={name}", "--dry_run"])
    assert "\n" not in str(stop.value)


def test_every_config_is_listed_with_its_arguments(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["main", "--list_configs"])
    main.main()
    main.FLAGS["list_configs"].value = False
    main.FLAGS.unparse_flags()
    lines = capsys.readouterr().out.splitlines()
    for name in (
        "lcd:sd15",
        "lcd:sdxl",
        "lcf:sd15",
        "lcm_lora:sdxl",
        "finetune:shapes",
        "shapes",
        "shapes_teacher",
        "shapes_vae",
        "eval/shapes",
        "eval/geneval",
    ):
        assert [line for line in lines if line.startswith(f"{name} ") and len(line) > len(name) + 20], name


@pytest.fixture
def parsed(monkeypatch):
    """The config of a command line, as the commands read it: its keys and values."""

    def parse(*arguments: str) -> dict:
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=values)
        monkeypatch.setattr(sys, "argv", ["main", *arguments])
        values(config_files.by_file(sys.argv))
        return dict(settings.leaves(values["config"].value.to_dict()))

    return parse


def flag(key: str, value) -> str:
    """Return the flag of a key; a sampler with a sign in its name is quoted in brackets."""
    group, _, name = key.rpartition(".")
    return f"--config.{key}={value}" if name.isidentifier() else f'--config.{group}["{name}"]={value}'


@pytest.mark.parametrize("name", [name for name, _ in config_files.bundled()])
def test_every_key_can_be_set_by_its_flag(name, parsed):
    expected = parsed(f"--config={name}")
    assert parsed(f"--config={name}", *(flag(key, value) for key, value in expected.items())) == expected


@pytest.mark.parametrize("name", ["shapes", "lcd:sd15"])
def test_every_sampler_of_a_teacher_can_be_planned_by_its_flag(name, parsed):
    samplers = [name for name, sampler in SAMPLERS.items() if not sampler.consistency]
    config = parsed(f"--config={name}", *(flag(f"report.teacher.{sampler}", (4, 8)) for sampler in samplers))
    plan = {key: steps for key, steps in config.items() if key.startswith("report.teacher.")}
    assert plan == {f"report.teacher.{sampler}": (4, 8) for sampler in samplers}


def test_a_sampler_without_brackets_is_a_line_with_the_remedy(monkeypatch):
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    argv = ["main", "--config=shapes", "--config.report.teacher.dpmsolver++_karras=(4,)"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(ValueError) as caught:
        config_files.parse(values, argv)
    assert str(caught.value) == (
        "--config.report.teacher.dpmsolver++_karras cannot be parsed; use "
        "'--config.report.teacher[\"dpmsolver++_karras\"]=...', with both quotes"
    )


def test_a_wheel_has_every_package_and_the_configs(tmp_path, monkeypatch):
    """setup.cfg's list against the folders; and the place that it gives the configs is looked at first."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = setup["options"]["packages"].split()
    folders = {path.parent for path in (ROOT / "lcm_jax").rglob("*.py")}
    folders |= {ROOT / "lcm_jax" / path.parent.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.py")}
    assert sorted(listed) == sorted(".".join(path.relative_to(ROOT).parts) for path in folders)
    assert setup["options"]["package_dir"].split() == ["lcm_jax.configs", "=", "configs"]
    shutil.copytree(ROOT / "configs", tmp_path / "lcm_jax" / "configs")
    monkeypatch.setattr(config_files, "PACKAGE", tmp_path / "lcm_jax")
    assert config_files.locate("shapes") == str(tmp_path / "lcm_jax" / "configs" / "shapes.py")
