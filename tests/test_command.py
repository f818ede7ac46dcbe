"""The environment that all commands share: where compiled programs are kept."""

import os
import subprocess
import sys

import jax
import pytest
from whole_runs import ROOT

from lcm_jax import command

COMMANDS = ("main", "cache", "sample", "convert", "benchmarks/ours")  # the last computes for the command `benchmark`


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """A person's environment: none of the variables that the tests set for themselves."""
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE", "LCM_JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    names = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")
    before = {name: getattr(jax.config, name) for name in names}
    yield monkeypatch
    for name, value in before.items():
        jax.config.update(name, value)


def test_compiled_programs_are_kept_in_the_users_cache(environment, tmp_path):
    command.configure_jax()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / ".cache" / "lcm_jax" / "compiled")
    assert jax.config.jax_compilation_cache_max_size == command.CACHE_BYTES
    environment.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    command.configure_jax()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "elsewhere" / "lcm_jax" / "compiled")


def test_the_cache_is_turned_off_or_left_to_jax(environment, tmp_path):
    jax.config.update("jax_compilation_cache_dir", None)
    environment.setenv("LCM_JAX_CACHE", "0")
    command.configure_jax()
    assert jax.config.jax_compilation_cache_dir is None
    environment.delenv("LCM_JAX_CACHE")
    environment.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "jax"))
    command.configure_jax()
    assert jax.config.jax_compilation_cache_dir is None, "JAX reads its own variable when it is imported"
    assert not (tmp_path / ".cache").exists()
    environment.setenv("LCM_JAX_CACHE", "no")
    with pytest.raises(ValueError, match="LCM_JAX_CACHE 'no' is not supported; use 0"):
        command.configure_jax()


def test_a_folder_that_cannot_be_made_is_a_warning(environment, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    environment.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    command.configure_jax()
    line = capsys.readouterr().err
    assert line.startswith("warning: compiled programs are not cached") and line.count("\n") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_configures_jax(name):
    assert "command.configure_jax()" in (ROOT / "lcm_jax" / f"{name}.py").read_text()


def test_the_second_process_reads_what_the_first_compiled(tmp_path):
    """A program of the kind that commands run, compiled in one process and loaded in another."""
    program = (
        "from lcm_jax import command; command.configure_jax()\n"
        "import jax, jax.numpy as jnp\n"
        "print(jax.jit(lambda x: jnp.tanh(x @ x).sum())(jnp.ones((8, 8))))\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION_CACHE")} | {
        "XDG_CACHE_HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_LOGGING_LEVEL": "DEBUG",
    }
    first, second = (
        subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    )
    assert first.stdout == second.stdout and list((tmp_path / "lcm_jax" / "compiled").iterdir())
    assert "Persistent compilation cache hit" not in first.stderr
    assert "Persistent compilation cache hit for 'jit__lambda" in second.stderr
