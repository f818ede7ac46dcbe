"""The error of everything that reads or writes models. Alone in its file, so that no reader of a file loads jax."""


class ModelError(ValueError):
    """A model that cannot be read or written; the text names what, which value, and what to do."""
