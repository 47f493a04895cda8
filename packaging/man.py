"""Write the manual page and shell completions: python packaging/man.py FOLDER, laid out like /usr/share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import typer.main
from typer.completion import get_completion_script

from edgespec import __version__
from edgespec.app.cli.main import app
from edgespec.app.option_table import VARIABLES

COMPLETIONS = {
    "bash": "bash-completion/completions/edgespec",
    "zsh": "zsh/site-functions/_edgespec",
    "fish": "fish/vendor_completions.d/edgespec.fish",
}


def escaped(text: str) -> str:
    """`text` escaped for roff, so that no line begins like a request."""
    text = " ".join(text.split()).replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{text}" if text.startswith((".", "'")) else text


def section(command: Any, context: Any, names: list[str]) -> Iterator[str]:
    """The lines for one command and its subcommands, as in their --help."""
    yield f".SS {escaped(' '.join(names))}" if names[1:] else ".SH OPTIONS"
    if names[1:]:
        yield escaped(command.get_usage(context).removeprefix("Usage: "))
        yield ".PP"
        yield escaped(command.help or "")
    for parameter in command.get_params(context):
        if record := parameter.get_help_record(context):
            yield from (".TP", f".B {escaped(record[0])}", escaped(record[1]))
    if not names[1:]:
        yield ".SH COMMANDS"
    for name, child in sorted(getattr(command, "commands", {}).items()):
        if not child.hidden:
            inner = type(context)(child, info_name=name, parent=context)
            yield from section(child, inner, [*names, name])


def page() -> str:
    """The manual page."""
    app.rich_markup_mode = None
    command = typer.main.get_command(app)
    context = command.make_context("edgespec", [], resilient_parsing=True)
    day = datetime.fromtimestamp(int(os.environ.get("SOURCE_DATE_EPOCH", "0")), UTC).date()
    lines = [
        f'.TH EDGESPEC 1 "{day}" "edgespec {__version__}"',
        ".SH NAME",
        f"edgespec \\- {escaped((command.help or '').rstrip('.'))}",
        ".SH SYNOPSIS",
        ".B edgespec",
        ".I COMMAND",
        "[OPTIONS]",
        *section(command, context, ["edgespec"]),
        ".SH FILES",
        "Models are in the folder models next to the program, and in the user's data folder. Settings,",
        "conversations and measurements are in the user's configuration, data and cache folders.",
        ".SH ENVIRONMENT",
        *(f".TP\n.B {name}\n{escaped(about)}" for name, about in VARIABLES.items()),
    ]
    return "\n".join(line for line in lines if line) + "\n"


def main() -> None:
    share = Path(sys.argv[1])
    texts = {"man/man1/edgespec.1": page()}
    for shell, path in COMPLETIONS.items():
        script = get_completion_script(prog_name="edgespec", complete_var="_EDGESPEC_COMPLETE", shell=shell)
        texts[path] = script + "\n"
    for path, text in texts.items():
        (share / path).parent.mkdir(parents=True, exist_ok=True)
        (share / path).write_text(text, "utf-8")


if __name__ == "__main__":
    main()
