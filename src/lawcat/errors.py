"""The errors that lawcat raises for its users.

Each message says what was got, what is allowed and what to do. Every class is also a ``ValueError``, so that
code which does not know lawcat can catch it; the command line prints the message alone and exits with 2.
"""


class LawcatError(ValueError):
    """Base of everything lawcat raises on purpose."""


class ConfigurationError(LawcatError):
    """An option, recipe or model configuration that cannot be: unknown key, bad value, contradiction."""


class TeacherError(LawcatError):
    """A teacher that cannot be found, read or converted."""


class DataError(LawcatError):
    """Training or evaluation data that cannot be read or used."""


class CheckpointError(LawcatError):
    """A checkpoint, model directory or adapter that is missing, damaged or does not fit."""


class BusyError(LawcatError):
    """An output directory in which another process is at work."""


class TrainingError(LawcatError):
    """Training that cannot go on, such as a loss that is not finite."""


class BackendError(LawcatError):
    """An operator backend that does not exist, or cannot run these tensors."""


class MissingDependencyError(LawcatError):
    """An optional package is needed for this call and is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}. Install it with: pip install 'lawcat[{extra}]'"
        )


def did_you_mean(word: str, allowed: list[str] | tuple[str, ...]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest allowed word, or an empty string.

    >>> did_you_mean("lenght", ["length", "depth"])
    " Did you mean 'length'?"
    """
    import difflib

    close = difflib.get_close_matches(word, allowed, n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
