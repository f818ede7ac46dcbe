"""The bundled configs by name, in a clone and in a wheel."""

import configparser
import shutil

import pytest
from whole_runs import ROOT

from lcm_jax import config_files, main


def test_a_name_a_name_with_an_argument_and_a_file_are_found(tmp_path):
    shapes = str(ROOT / "configs" / "shapes.py")
    assert config_files.locate("shapes") == config_files.locate("shapes.py") == shapes
    assert config_files.locate("lcd:sdxl") == str(ROOT / "configs" / "lcd.py") + ":sdxl"
    own = tmp_path / "shapes.py"
    own.write_text("")
    assert config_files.locate(f"{own}:x") == f"{own}:x", "a file is taken as it is"
    argv = ["main", "--config=lcd:sd15", "--config.train.steps=3", "--workdir=shapes", "--config", "shapes"]
    lcd = str(ROOT / "configs" / "lcd.py")
    assert config_files.by_file(argv) == ["main", f"--config={lcd}:sd15", *argv[2:5], shapes]


@pytest.mark.parametrize("name", ["shape", "configs/none.py", "none:sd15"])
def test_an_unknown_name_is_one_line_with_all_names(name):
    with pytest.raises(
        SystemExit, match=r"is not a file, nor a bundled config; use one of lcd:sd15.*, shapes, "
    ) as stop:
        main.parse(["main", f"--config={name}", "--dry_run"])
    assert "\n" not in str(stop.value)


def test_every_config_is_listed_with_its_arguments(capsys):
    with pytest.raises(SystemExit) as stop:
        main.parse(["main", "--list_configs"])
    main.flags.FLAGS.unparse_flags()
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0
    for name in ("lcd:sd15", "lcd:sdxl", "shapes", "shapes_teacher", "shapes_vae"):
        assert [line for line in lines if line.startswith(f"{name} ") and len(line) > len(name) + 20], name


def test_a_wheel_has_every_package_and_the_configs(tmp_path, monkeypatch):
    """setup.cfg's list against the folders; and the place that it gives the configs is looked at first."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = setup["options"]["packages"].split()
    folders = {path.parent for path in (ROOT / "lcm_jax").rglob("*.py")}
    assert sorted(listed) == sorted(
        ["lcm_jax.configs", "lcm_jax.configs.eval", *(".".join(path.relative_to(ROOT).parts) for path in folders)]
    )
    assert setup["options"]["package_dir"].split() == ["lcm_jax.configs", "=", "configs"]
    shutil.copytree(ROOT / "configs", tmp_path / "lcm_jax" / "configs")
    monkeypatch.setattr(config_files, "PACKAGE", tmp_path / "lcm_jax")
    assert config_files.locate("shapes") == str(tmp_path / "lcm_jax" / "configs" / "shapes.py")
