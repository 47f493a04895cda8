"""The user's settings: `config.toml` in the platform's configuration folder for Edgespec."""

from __future__ import annotations

import os
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from edgespec.core import EdgespecError
from edgespec.machine.governor import Mode
from edgespec.models.hub.store import folder_in
from edgespec.sampling import Sampling

_MOST = 100_000  # bytes

Theme = Literal["dark", "light", "contrast"]


WORDS: Mapping[str, tuple[str, ...]] = {"mode": get_args(Mode), "theme": get_args(Theme)}
ABOUT = {
    "mode": "What the machine may give, as for --mode.",
    "model": "The model `chat` opens: a catalogue name or a .gguf file; empty: the largest here.",
    "system": "The system prompt of new conversations.",
    "persona": "The persona of new conversations, a name in the table personas.",
    "temperature": "chat: 0 takes the likeliest token every time.",
    "top_k": "chat: draw from the k likeliest tokens only; 0: off.",
    "top_p": "chat: draw from the likeliest tokens that sum to p only; 1: off.",
    "min_p": "chat: drop tokens less likely than this share of the likeliest; 0: off.",
    "repetition_penalty": "chat: above 1 avoids words of prompt and answer.",
    "max_tokens": "chat: most tokens of an answer; 0: until the context is full.",
    "context": "chat: context size in tokens; 0: as large as the model's own.",
    "theme": "Colours of the chat.",
    "personas": 'A table of system prompts by name: reviewer = "You review code."',
}


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings with their defaults, as ABOUT says. Options of a command come before them."""

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
    theme: Theme = "dark"
    personas: Mapping[str, str] = field(default_factory=dict)

    def prompt_of(self, persona: str) -> str:
        """The system prompt of a persona. Raises EdgespecError if there is no such."""
        if persona not in self.personas:
            there = ", ".join(self.personas) or "none yet"
            raise EdgespecError(f"There is no persona {persona!r} in {config_path()}; there are: {there}.")
        return self.personas[persona]

    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)


def config_path() -> Path:
    """`config.toml` in EDGESPEC_CONFIG, or in the user's configuration folder. May not exist."""
    if chosen := folder_in("EDGESPEC_CONFIG"):
        return chosen / "config.toml"
    from platformdirs import user_config_path

    return user_config_path("edgespec", appauthor=False) / "config.toml"


def load() -> Settings:
    """The user's settings, the defaults where there are none. Raises EdgespecError for a wrong one."""
    path = config_path()
    try:
        data = tomllib.loads(_read(path))
    except ValueError as error:
        raise EdgespecError(f"{path} is not TOML: {error}.") from None
    return _checked(Settings(), data, f"{path}: ")


def changed(config: Settings, name: str, typed: str) -> Settings:
    """`config` with one setting as it was typed. Raises EdgespecError."""
    kind = type(getattr(config, name))
    value: Any = typed
    if kind in (int, float):
        try:
            value = kind(typed)
        except ValueError:
            word = "a whole number" if kind is int else "a number"
            raise EdgespecError(f"{name} is {word}, not {typed!r}.") from None
    return _checked(config, {name: value})


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
        raise EdgespecError(f"{path} is not TOML: {error}.") from None
    for name, value in changes.items():
        document[name] = dict(value) if isinstance(value, Mapping) else value
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".config.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(tomlkit.dumps(document))
        Path(temporary).replace(path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise EdgespecError(f"Cannot write {path}: {error.strerror}.") from None


def described() -> str:
    """Every setting with its default, for `edgespec config --help`."""
    lines = []
    for name, about in ABOUT.items():
        allowed = f" One of: {', '.join(WORDS[name])}." if name in WORDS else ""
        default = "" if name == "personas" else f" Default: {getattr(Settings(), name)!r}."
        lines.append(f"{name}: {about}{allowed}{default}")
    return "\n\n".join(lines)


def command() -> None:
    """Print where the settings are and what they are."""
    config, path = load(), config_path()
    print(f"# {path}" + ("" if path.exists() else " (not there yet: these are the defaults)"))
    import tomlkit

    values = {name: getattr(config, name) for name in ABOUT}
    print(tomlkit.dumps(values | {"personas": dict(config.personas)}), end="")


command.__doc__ = f"{command.__doc__}\n\nThe settings:\n\n{described()}"


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MOST).decode()
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError as error:
        raise EdgespecError(f"{path} is not TOML: {error}.") from None
    except OSError as error:
        raise EdgespecError(f"Cannot read {path}: {error.strerror}.") from None


def _checked(config: Settings, data: Mapping[str, Any], where: str = "") -> Settings:
    values = {}
    for name, value in data.items():
        if name not in ABOUT:
            raise EdgespecError(f"{where}{name!r} is no setting; there are: {', '.join(ABOUT)}.")
        values[name] = _value(name, value, where)
    config = replace(config, **values)
    try:
        config.sampling()
    except EdgespecError as error:
        raise EdgespecError(f"{where}{error}") from None
    for name in ("max_tokens", "context"):
        if getattr(config, name) < 0:
            raise EdgespecError(f"{where}{name} is {getattr(config, name)}: it must be 0 or more.")
    return config


def _value(name: str, value: Any, where: str) -> Any:
    default = getattr(Settings(), name)
    if name in WORDS and value not in WORDS[name]:
        raise EdgespecError(f"{where}{name} is one of {', '.join(WORDS[name])}, not {value!r}.")
    if name == "personas":
        if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
            raise EdgespecError(f"{where}[personas] holds a text for each name.")
        return value
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        kinds = {str: "a text", int: "a whole number", float: "a number"}
        raise EdgespecError(f"{where}{name} is {kinds[type(default)]}, not {value!r}.")
    return value
