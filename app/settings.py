"""The user's settings: `config.toml` in the platform's configuration folder for Edgespec."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from edgespec.app.option_table import OPTIONS, KvType, Theme
from edgespec.core import EdgespecError
from edgespec.files import write_whole
from edgespec.machine.governor import Mode
from edgespec.machine.paths import user_folder
from edgespec.sampling import Sampling

_MOST = 100_000  # bytes


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings with their defaults, described in `ABOUT`. Options of a command take precedence."""

    mode: Mode = "auto"
    model: str = ""
    system: str = ""
    persona: str = ""
    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 0
    context: int = 4096
    kv_type: KvType = "f16"
    lora: list[str] = field(default_factory=list)
    theme: Theme = "dark"
    personas: Mapping[str, str] = field(default_factory=dict)

    def prompt_of(self, persona: str) -> str:
        """The system prompt of a persona. Raises EdgespecError if there is no such persona."""
        if persona not in self.personas:
            valid = ", ".join(self.personas) or "none yet"
            raise EdgespecError(f"unknown persona {persona!r} in {config_path()} (valid: {valid})")
        return self.personas[persona]

    def sampling(self) -> Sampling:
        """Raises EdgespecError for a value out of range."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)


def _about(name: str) -> str:
    row = OPTIONS[name]
    return f"{row.help} Empty: {row.default}." if row.default and not getattr(Settings(), name) else row.help


ABOUT: Mapping[str, str] = {one.name: _about(one.name) for one in fields(Settings)}
"""Descriptions of the settings, by name."""
WORDS: Mapping[str, tuple[str, ...]] = {name: OPTIONS[name].words for name in ABOUT if OPTIONS[name].words}
"""The values of settings that have a fixed list of them."""


def config_path() -> Path:
    """`config.toml` in EDGESPEC_CONFIG, or in the user's configuration folder. May not exist."""
    return user_folder("config", "EDGESPEC_CONFIG") / "config.toml"


def load() -> Settings:
    """The user's settings, with defaults where there are none. Raises EdgespecError for a wrong one."""
    path = config_path()
    try:
        data = tomllib.loads(_read(path))
    except ValueError as error:
        raise EdgespecError(f"{path} is not TOML: {error}") from None
    return _checked(Settings(), data, f"{path}: ")


def changed(config: Settings, name: str, typed: str) -> Settings:
    """`config` with one setting as it was typed. Raises EdgespecError."""
    kind = type(getattr(config, name))
    value: Any = typed
    if kind is list:
        value = [part for one in typed.split(",") if (part := one.strip())]
    elif kind in (int, float):
        try:
            value = kind(typed)
        except ValueError:
            raise EdgespecError(f"{name} must be {_KINDS[kind]}, not {typed!r}") from None
    return _checked(config, {name: value})


def typed(config: Settings, name: str) -> str:
    """A setting as one types it, for `changed`."""
    value = getattr(config, name)
    return ", ".join(value) if isinstance(value, list) else str(value)


def with_options(config: Settings, given: Mapping[str, Any]) -> Settings:
    """`config` with other values for some settings. Raises EdgespecError for a wrong one."""
    return _checked(config, given)


def save(changes: Mapping[str, Any]) -> None:
    """Write settings into the file, which keeps its other lines and comments. Raises EdgespecError."""
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    path = config_path()
    try:
        document = tomlkit.parse(_read(path))
    except TOMLKitError as error:
        raise EdgespecError(f"{path} is not TOML: {error}") from None
    for name, value in changes.items():
        document[name] = dict(value) if isinstance(value, Mapping) else value
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, tomlkit.dumps(document).encode())
    except OSError as error:
        raise EdgespecError(f"cannot write {path}: {error.strerror}") from None


def described() -> str:
    """Every setting with its default, for `edgespec config --help`."""
    lines = []
    for name, about in ABOUT.items():
        valid = f" One of: {', '.join(WORDS[name])}." if name in WORDS else ""
        default = "" if name == "personas" else f" Default: {getattr(Settings(), name)!r}."
        lines.append(f"{name}: {about}{valid}{default}")
    return "\n\n".join(lines)


def command() -> None:
    """Print the path of the settings file, and the settings."""
    config, path = load(), config_path()
    print(f"# {path}" + ("" if path.exists() else " (does not exist yet: these are the defaults)"))
    import tomlkit

    values = {name: getattr(config, name) for name in ABOUT}
    print(tomlkit.dumps(values | {"personas": dict(config.personas)}), end="")


command.__doc__ = (
    f"{command.__doc__}\n\nThe settings, mode for all commands and the others for chat:\n\n{described()}"
)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MOST).decode()
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError as error:
        raise EdgespecError(f"{path} is not TOML: {error}") from None
    except OSError as error:
        raise EdgespecError(f"cannot read {path}: {error.strerror}") from None


def _checked(config: Settings, data: Mapping[str, Any], where: str = "") -> Settings:
    values = {}
    for name, value in data.items():
        if name not in ABOUT:
            raise EdgespecError(f"{where}unknown setting {name!r} (valid: {', '.join(ABOUT)})")
        values[name] = _value(name, value, where)
    config = replace(config, **values)
    try:
        config.sampling()
    except EdgespecError as error:
        raise EdgespecError(f"{where}{error}") from None
    return config


_KINDS = {str: "text", int: "a whole number", float: "a number", list: "a list of texts"}


def _value(name: str, value: Any, where: str) -> Any:
    default, lowest = getattr(Settings(), name), OPTIONS[name].lowest
    if name in WORDS and value not in WORDS[name]:
        raise EdgespecError(f"{where}unknown {name} {value!r} (valid: {', '.join(WORDS[name])})")
    if name == "personas":
        if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
            raise EdgespecError(f"{where}[personas] must be a table with a text for each name")
        return value
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(value) is not type(default) or (
        isinstance(value, list) and not all(isinstance(one, str) for one in value)
    ):
        raise EdgespecError(f"{where}{name} must be {_KINDS[type(default)]}, not {value!r}")
    if lowest is not None and value < lowest:
        raise EdgespecError(f"{where}{name} is {value}: it must be {lowest} or more")
    return value
