"""Calls of the command lcm_jax.evaluate in the process of the tests."""

import sys
from collections.abc import Callable, Iterator

from lcm_jax import evaluate as command


def calling(monkeypatch) -> Iterator[Callable[..., None]]:
    """Yield a function that runs the command with arguments, without its exit code; its flags are reset afterwards."""

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
        monkeypatch.setattr(command.command, "configure_jax", lambda: None)
        reset()
        command.parse(sys.argv)
        command.evaluate()

    yield run
    reset()


def reset() -> None:
    command.FLAGS.unparse_flags()
    for name in list(command.FLAGS):
        command.FLAGS[name].unparse()
        if name.startswith("config."):  # a key's flag belongs to the config that was loaded
            delattr(command.FLAGS, name)
