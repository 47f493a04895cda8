"""`edgespec bench` without a subcommand, and the flags that were there before the subcommands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typer.core import TyperGroup

from edgespec.core import EdgespecError

_FORMER = {
    "--energy": "energy",
    "--busy": "busy",
    "--agents": "agents",
    "--schemas": "json",
    "--against": "versus",
    "--replay": "replay",
    "--chat": "chat",
    "--untouched": "untouched",
    "--self-test": "self-test",
}
"""Subcommands by the flags of version 0.1, which are accepted for one more release."""
_WITH_VALUE = ("--against", "--replay")


class BenchGroup(TyperGroup):
    """A group of commands whose default is `speed`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = args if ctx.resilient_parsing else with_subcommand(args)
        return super().parse_args(ctx, given)


def with_subcommand(arguments: Sequence[str]) -> list[str]:
    """Arguments that begin with a subcommand: `speed`, or the one that a former flag names.

    Raises EdgespecError for former flags that exclude each other.
    """
    if arguments and (not arguments[0].startswith("-") or arguments[0] in ("-h", "--help")):
        return list(arguments)
    flags: list[str] = []
    values: list[str] = []
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag not in _FORMER:
            rest.append(word)
            continue
        flags.append(flag)
        if flag in _WITH_VALUE:
            values.append(value if equals else next(words, ""))
    if set(flags) == {"--schemas", "--against"}:
        return ["json", *(f"--against={value}" for value in values), *rest]
    if len(set(flags)) > 1:
        raise EdgespecError(f"choose one benchmark, not {' and '.join(dict.fromkeys(flags))}")
    return [_FORMER[flags[0]] if flags else "speed", *values, *rest]
