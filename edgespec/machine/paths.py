"""The user's folders for Edgespec: those of the platform, or those that the environment names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal


def user_folder(kind: Literal["data", "config", "cache"], variable: str, below: str = "") -> Path:
    """Return the folder in the environment variable, absolute; else `below` in the platform's folder.

    May not exist yet.
    """
    if chosen := os.environ.get(variable):
        return expanded(chosen).absolute()
    import platformdirs  # not needed, and slow, where the environment names all folders

    folder = {
        "data": platformdirs.user_data_path,
        "config": platformdirs.user_config_path,
        "cache": platformdirs.user_cache_path,
    }[kind]
    return folder("edgespec", appauthor=False) / below


def expanded(text: str) -> Path:
    """Return `text` as a path, with `~` replaced by the home folder where there is such a user."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 - Path.expanduser raises for an unknown ~user
