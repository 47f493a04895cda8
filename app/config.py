"""The user's settings: `config.toml` in the platform's configuration folder for Edgespec."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args

from edgespec.core import EdgespecError
from edgespec.governor import Mode
from edgespec.models.catalog import folder_in

_MOST = 100_000  # bytes


@dataclass(frozen=True, slots=True)
class Config:
    """All settings with their defaults. `mode`: what the machine may give, as for `--mode`."""

    mode: Mode = "auto"


def config_path() -> Path:
    """`config.toml` in EDGESPEC_CONFIG, or in the user's configuration folder. May not exist."""
    if chosen := folder_in("EDGESPEC_CONFIG"):
        return chosen / "config.toml"
    from platformdirs import user_config_path

    return user_config_path("edgespec", appauthor=False) / "config.toml"


def load() -> Config:
    """The user's settings, the defaults where there are none. Raises EdgespecError for a wrong one."""
    path = config_path()
    try:
        with path.open("rb") as file:
            data = tomllib.loads(file.read(_MOST).decode())
    except FileNotFoundError:
        return Config()
    except OSError as error:
        raise EdgespecError(f"Cannot read {path}: {error.strerror}.") from None
    except ValueError as error:
        raise EdgespecError(f"{path} is not TOML: {error}.") from None
    known = [field.name for field in fields(Config)]
    for name in data:
        if name not in known:
            raise EdgespecError(f"{path}: {name!r} is no setting; there are: {', '.join(known)}.")
    mode = data.get("mode", "auto")
    if mode not in get_args(Mode):
        raise EdgespecError(f"{path}: mode is one of {', '.join(get_args(Mode))}, not {mode!r}.")
    return Config(mode=mode)
