"""The environment that all commands share: where compiled programs are kept."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from whole_runs import ROOT

from lcm_jax import command, compiler

CODE = ROOT / "lcm_jax"
HEAVY = set(
    """PIL array_record diffusers flax grain gradio jax jaxlib matplotlib ml_dtypes numpy optax orbax pyarrow rich
    safetensors scipy tensorboardX tokenizers torch transformers""".split()
)
COMMANDS = ("main", "cache", "sample", "convert", "benchmarks/ours")  # the last computes for the command `benchmark`


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """A person's environment: none of the variables that the tests set for themselves."""
    jax_names = ("COMPILATION_CACHE_DIR", "COMPILATION_CACHE_MAX_SIZE", "PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    for name in (*(f"JAX_{name}" for name in jax_names), "LCM_JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    names = (
        "jax_compilation_cache_dir",
        "jax_compilation_cache_max_size",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield monkeypatch
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_compiled_programs_are_kept_in_the_users_cache(environment, tmp_path):
    command.configure_jax()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / ".cache" / "lcm_jax" / "compiled")
    assert jax.config.jax_compilation_cache_max_size == compiler.CACHE_BYTES
    jax.config.update("jax_compilation_cache_dir", None)
    environment.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    command.configure_jax()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "elsewhere" / "lcm_jax" / "compiled")


def test_the_cache_is_turned_off_or_left_to_jax(environment, tmp_path):
    environment.setenv("LCM_JAX_CACHE", "0")
    command.configure_jax()
    assert jax.config.jax_compilation_cache_dir is None
    environment.delenv("LCM_JAX_CACHE")
    environment.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "jax"))
    command.configure_jax()
    assert jax.config.jax_compilation_cache_dir is None, "JAX reads its own variable when it is imported"
    environment.delenv("JAX_COMPILATION_CACHE_DIR")
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    command.configure_jax()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine"), "a program's own choice"
    assert not (tmp_path / ".cache").exists()
    environment.setenv("LCM_JAX_CACHE", "no")
    with pytest.raises(ValueError, match="LCM_JAX_CACHE 'no' is not supported; use 0"):
        command.configure_jax()


def test_programs_are_kept_even_if_others_were_compiled_before(environment, tmp_path):
    compilation_cache.reset_cache()
    double = lambda x: jnp.tanh(x @ x) * 2.0  # noqa: E731
    jax.jit(lambda x: x + 1)(jnp.ones(3))  # JAX decides here that there is no cache
    environment.setattr(compiler, "MIN_COMPILE_S", 0.0)
    command.configure_jax()
    for loaded in (0, 1):
        x = jnp.ones((8, 8))
        jax.clear_caches()
        with compiler.watch_cache() as cache:
            jax.jit(double)(x)
        assert (cache.programs, cache.loaded) == (1, loaded)
    assert str(compiler.CacheUse(2, 2, 14.2)) == "loaded 2 of 2 programs from the cache, which saved 14 s"
    assert str(compiler.CacheUse(1, 0)) == "loaded 0 of 1 program from the cache, which saved 0 s"


def test_options_are_those_that_the_compiler_has(monkeypatch):
    """Unknown ones are errors of the compiler: this compiles with them, whatever the version."""
    options = compiler.compiler_options()
    assert jax.jit(lambda x: x @ x, compiler_options=options)(jnp.ones((2, 2))).sum() == 8
    assert compiler.compiler_options("gpu") == compiler.compiler_options("tpu") == {}
    for number, expected in (("0.10.2", 1), ("0.11.0", 0), ("0.12.0.1", 0)):
        monkeypatch.setattr(compiler, "version", lambda _, number=number: number)
        assert len(compiler.compiler_options("cpu")) == expected


def test_a_folder_that_cannot_be_made_is_a_warning(environment, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    environment.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    command.configure_jax()
    line = capsys.readouterr().err
    assert line.startswith("warning: compiled programs are not cached") and line.count("\n") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_configures_jax(name):
    assert "command.configure_jax()" in (ROOT / "lcm_jax" / f"{name}.py").read_text()


@pytest.mark.parametrize(
    "name", ["", *sorted(path.stem for path in CODE.glob("*.py") if '__name__ == "__main__"' in path.read_text())]
)
def test_help_and_the_import_of_the_package_load_nothing_heavy(name):
    """Half a second is what Python and the flags take; any of these libraries takes as long again."""
    run = "import lcm_jax"
    if name:
        run = f"import runpy; sys.argv = ['x', '--help']; runpy.run_module('lcm_jax.{name}', run_name='__main__')"
    code = f"import sys, atexit; atexit.register(lambda: print('LOADED', *sys.modules)); {run}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = {module.split(".")[0] for module in done.stdout.split("LOADED")[1].split()}
    assert "lcm_jax" in loaded and (not name or "--" in done.stdout)
    assert not loaded & HEAVY


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
