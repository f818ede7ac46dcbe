"""The bundled config files by name, with and without a clone of the repository."""

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

CODE_ERRORS = (SyntaxError, NameError, TypeError, ImportError, ArithmeticError)  # not of flags
PACKAGE = Path(__file__).resolve().parent


def folder() -> Path:
    """Return the folder of the bundled configs: in the package if installed from a wheel, otherwise beside it."""
    inside = PACKAGE / "configs"
    return inside if inside.is_dir() else PACKAGE.parent / "configs"


def bundled() -> Iterator[tuple[str, str]]:
    """Yield (name, summary) of each bundled config; the name has the form that --config accepts, such as lcd:sd15."""
    for path in sorted(folder().rglob("*.py"), key=lambda path: (len(path.parts), path)):
        name = path.relative_to(folder()).with_suffix("").as_posix()
        summary = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
        for argument in getattr(_import(path), "MODELS", [None]):
            yield name if argument is None else f"{name}:{argument}", " ".join(summary.split())


def load(name: str) -> Any:
    """Return a bundled config by a name of `bundled`, a ConfigDict. Raises what the config raises for its argument."""
    name, colon, argument = name.partition(":")
    return load_file(f"{folder() / name}.py{colon}{argument}")


def load_file(config: str) -> Any:
    """Return the config of a file, PATH or PATH:ARGUMENT. Raises what the file raises, which is code."""
    path, colon, argument = config.partition(":")
    return _import(Path(path)).get_config(*([argument] if colon else []))


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # a .py file has both
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def listing() -> str:
    """Return a table of the bundled configs, and the path of their folder, as lines."""
    rows = list(bundled())
    width = max(len(name) for name, _ in rows)
    return "\n".join([*(f"{name:{width}}  {summary}" for name, summary in rows), f"The files are in {folder()}."])


def locate(config: str) -> str:
    """Replace the name of a bundled config in the value of --config by its file; a path to a file is unchanged.

    Raises ValueError if the value is neither.
    """
    name, colon, argument = config.partition(":")
    if Path(name).is_file():
        return config
    names = [name for name, _ in bundled()]
    if (stem := name.removesuffix(".py")) in {name.partition(":")[0] for name in names}:
        return f"{folder() / stem}.py{colon}{argument}"
    raise ValueError(f"--config={config} is neither a file nor a bundled config; use one of {', '.join(names)}")


def by_file(argv: list[str]) -> list[str]:
    """Apply `locate` to the value of --config in a command line. Raises ValueError as `locate` does."""
    result = list(argv)
    for i, word in enumerate(argv):
        if word == "--":
            break
        if found := re.fullmatch(r"(--?config=)(.+)", word):
            result[i] = found[1] + locate(found[2])
        elif word in ("--config", "-config") and i + 1 < len(argv):
            result[i + 1] = locate(argv[i + 1])
    return result


def parse(values: Any, argv: list[str]) -> list[str]:
    """Parse a command line, whose --config is a name or a file, into absl's flags; return the remaining arguments.

    Raises ValueError of one line for wrong flags and keys, and for whatever the config file raises.
    """
    try:
        rest = values(by_file(argv))
        if values["config"].value is not None:
            values["config"].value.to_dict()  # raises the error of a config file that cannot be loaded
    except Exception as error:  # a config file is code
        raise ValueError(explain(error, argv)) from error
    return rest


def explain(error: Exception, argv: list[str]) -> str:
    """Describe an error in the flags in one line; for an unknown key, it suggests the nearest one."""
    text = str(error.args[0] if isinstance(error, KeyError) else error).replace("\\'", "'")
    named, hint = re.match(r"[\"']+(\w+)'", text), re.search(r"Did you mean [^?]+\?", text)
    for flag in (word.split("=")[0] for word in argv if word.lstrip("-").startswith("config.")):
        group, _, name = flag.rpartition(".")
        if re.fullmatch(r"\w*\++\w*", name):  # the key of a sampler such as dpmsolver++
            return f"{flag} cannot be parsed; use '{group}[\"{name}\"]=...', with both quotes"
        if named and named[1] in flag.split("."):
            return f"{flag} is not a config key; {hint[0] if hint else 'see the config file for valid keys'}"
    lines = text.replace("\\n", "\n").splitlines()
    if any("Traceback" in line for line in lines):  # raised by get_config; the last line is the reason
        lines = [lines[-1].removeprefix("ValueError: ")]
    kind = f"{type(error).__name__} in the config file: " if isinstance(error, CODE_ERRORS) else ""
    return kind + " ".join(" ".join(lines).split())
