"""How the present command was called."""

from __future__ import annotations

import shlex
import sys


def command_line() -> str:
    """Return the call as one would type it, for the record beside results: spaces and globs quoted."""
    return shlex.join(["lawcat", *sys.argv[1:]])
