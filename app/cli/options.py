"""Flags of the command line, made from the table of options (`app.option_table`)."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from inspect import Parameter
from typing import Annotated, Any, get_type_hints

import typer

from edgespec.app import settings as settings_file
from edgespec.app.cli.fetching import fetch_missing
from edgespec.app.engine.loading import EngineSpec
from edgespec.app.option_table import OPTIONS
from edgespec.app.settings import Settings
from edgespec.core import EdgespecError
from edgespec.sampling import Sampling

GROUPS: Mapping[type, tuple[str, ...]] = {
    EngineSpec: (
        "model", "draft", "max_draft", "exact", "context", "kv_type", "threads", "engine", "lora", "mode",
    ),
    Sampling: (
        "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty",
        "presence_penalty", "seed",
    ),
    Settings: ("max_tokens",),
}  # fmt: skip
"""The options that replace a parameter of such a type in the signature of a command."""

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_SET = "the setting"


def option(name: str, *, default: object = None, setting: bool = False) -> Any:
    """The flag of that name, for `Annotated`. With `setting`, its default is that of the settings file.

    `default` is that of the parameter, needed where help should show it instead of the table's text.
    """
    about = OPTIONS[name]
    flag = f"--{name.replace('_', '-')}"
    return typer.Option(
        *([about.short] if about.short else []),
        flag,
        help=about.help,
        min=about.lowest,
        max=about.highest,
        envvar=about.variable or None,
        show_default=_SET if setting else about.default if about.default and not default else True,
    )


def grouped(function: Callable[..., None]) -> Callable[..., None]:
    """Turn a function of `EngineSpec` and `Sampling` into a command with an option for each of their fields.

    A default of such a parameter gives the defaults of its options.

    A function that takes `Settings` too gets the settings file, changed by the options that were given: then
    the defaults of all that is also a setting are those of the file. Only `model` stays apart, since with
    --server the setting does not apply.
    """
    signature = inspect.signature(function, eval_str=True)
    groups = {one.name: one.annotation for one in signature.parameters.values() if one.annotation in GROUPS}
    with_settings = Settings in groups.values()
    parameters: list[Parameter] = []
    for one in signature.parameters.values():
        parameters += _options(one, with_settings) if one.name in groups else [one]

    @wraps(function)
    def command(**given: Any) -> None:
        names = {name for kind in groups.values() for name in GROUPS[kind]}
        values = {name: given.pop(name) for name in names}
        if with_settings:
            config = _settings(values)
            values |= {
                name: getattr(config, name)
                for name in names
                if _is_setting(name) and not _is_open(name, values[name], config)
            }
        if EngineSpec in groups.values() and not given.get("server"):
            fetch_missing(values["model"])
            fetch_missing(values["draft"])
        for name, kind in groups.items():
            given[name] = config if kind is Settings else kind(**{key: values[key] for key in GROUPS[kind]})
        function(**given)

    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command


def _is_open(name: str, given: object, config: Settings) -> bool:
    """Whether neither an option nor the settings choose what an EngineSpec may leave open."""
    untouched = given is None and getattr(config, name) == getattr(Settings(), name)
    return untouched and getattr(EngineSpec(), name, "") is None


def _is_setting(name: str) -> bool:
    return OPTIONS[name].setting and name != "model"


def _settings(values: Mapping[str, Any]) -> Settings:
    given = {name: value for name, value in values.items() if _is_setting(name) and value is not None}
    return settings_file.with_options(settings_file.load(), given)


def _options(parameter: Parameter, with_settings: bool) -> list[Parameter]:
    """The parameters of a command in place of one whose type is in `GROUPS`."""
    kind = parameter.annotation
    hints = get_type_hints(kind)
    defaults = kind() if parameter.default is Parameter.empty else parameter.default
    found = []
    for name in GROUPS[kind]:
        hint, default = hints[name], getattr(defaults, name)
        if setting := with_settings and _is_setting(name):
            hint, default = hint | None, None
        annotation: Any = Annotated[hint, option(name, default=default, setting=setting)]
        found.append(Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation))
    return found


def parse_bias(entries: list[str]) -> dict[int, float]:
    """`TOKEN_ID=BIAS` entries. Raises EdgespecError for one that is not."""
    bias = {}
    for entry in entries:
        token, _, value = entry.partition("=")
        try:
            bias[int(token)] = float(value)
        except ValueError:
            raise EdgespecError(
                f"invalid --logit-bias {entry!r}: write TOKEN_ID=BIAS, for example 1234=-5"
            ) from None
    return bias


def piped_input() -> str:
    """The text that was piped into the program, empty at a terminal."""
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    return sys.stdin.buffer.read().decode("utf-8", "replace")
