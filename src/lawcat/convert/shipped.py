"""The adapters that come with lawcat, each a folder of the package that every command knows by its name."""

from __future__ import annotations

import os
from pathlib import Path

ADAPTERS_FOLDER = Path(__file__).parents[1] / "adapters"
"""One folder an adapter, as `lawcat pack` writes it."""


def shipped_adapters() -> dict[str, Path]:
    """Return the folders of the adapters that come with lawcat, by name, in order of the names.

    Example:
        >>> all(folder.name == name for name, folder in shipped_adapters().items())
        True
    """
    try:
        folders = [entry for entry in ADAPTERS_FOLDER.iterdir() if entry.is_dir()]
    except OSError:  # a package of somebody else's making may leave them out
        return {}
    return {folder.name: folder for folder in sorted(folders) if folder.name[0] not in "._"}


def adapter_folder(name: str | os.PathLike[str]) -> Path | None:
    """Return the folder of the adapter that a name stands for, or None if it stands for none.

    Args:
        name: An adapter's folder, or the name of one that comes with lawcat, upper and lower case alike. A
            folder of that name which holds a model goes before it: what a user has made himself is what he
            means.

    Example:
        >>> adapter_folder("no-such-adapter") is None
        True
    """
    from lawcat.convert.adapter import is_adapter

    path = Path(name)
    if is_adapter(path):
        return path
    if isinstance(name, os.PathLike) or (path / "config.json").is_file():
        return None
    return shipped_adapters().get(name.lower())


__all__ = ["ADAPTERS_FOLDER", "adapter_folder", "shipped_adapters"]
