"""`edgespec chat`: options before settings, settings before defaults."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgespec.app.cli import fetching
from edgespec.app.cli.options import grouped, option
from edgespec.app.engine import loading
from edgespec.app.engine.loading import EngineSpec
from edgespec.app.settings import Settings
from edgespec.core import EdgespecError
from edgespec.models.hub.selection import default_model, first_model
from edgespec.models.hub.store import installed
from edgespec.sampling import Sampling

if TYPE_CHECKING:
    from edgespec.app.chat.chat_model import ChatModel
    from edgespec.app.chat.model_worker import ModelLoader
    from edgespec.core import Progress


@grouped
def chat(
    *,
    spec: EngineSpec,
    system: Annotated[str | None, option("system", setting=True)] = None,
    persona: Annotated[str, option("persona", setting=True)] = "",
    settings: Settings,
    sampling: Sampling,
    last: Annotated[bool, typer.Option("-c", "--continue", help="Open the last conversation.")] = False,
    number: Annotated[
        int | None, typer.Option("--open", min=1, help="Open the conversation of this number.")
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Line by line: for screen readers, slow lines, pipes.")
    ] = False,
    server: Annotated[str, option("server")] = "",
    pull: Annotated[
        bool, typer.Option("--pull", help="If no model is installed, first download one to begin with.")
    ] = False,
) -> None:
    """Open the terminal chat."""
    if not plain and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise EdgespecError("chat needs a terminal: use `edgespec chat --plain`, or `edgespec run`")
    persona = persona or (settings.persona if system is None else "")
    if system is None:
        system = settings.prompt_of(persona) if persona else settings.system
    name = spec.model if server else spec.model or settings.model or _default_model(pull, plain)
    load = _remote(server, name) if server else _opener(spec, name)
    title = Path(name).name or server
    common: dict[str, Any] = {
        "system": system, "persona": persona, "sampling": sampling, "max_tokens": settings.max_tokens,
        "mode": settings.mode,
    }  # fmt: skip
    reopen = number if number is not None else 0 if last else None
    opener = None if server else partial(_opener, spec)
    if plain:
        from edgespec.app.chat.plain import talk
        from edgespec.app.chat.session import Session

        session = Session(load, title, **common)
        sys.exit(talk(session, reopen, settings=settings, opener=opener))
    from edgespec.app.chat.app import ChatApp

    app = ChatApp(load, title, settings=settings, opener=opener, reopen=reopen, **common)
    sys.exit(app.run() or 0)


def _opener(spec: EngineSpec, name: str) -> ModelLoader:
    def load(progress: Progress) -> ChatModel:
        from edgespec.app.chat.chat_model import LocalModel

        return LocalModel(loading.load_engine(replace(spec, model=name), progress))

    return load


def _remote(server: str, name: str) -> ModelLoader:
    def load(_: Progress) -> ChatModel:
        from edgespec.app.chat.remote_model import RemoteModel

        return RemoteModel(server, name)

    return load


def _default_model(pull: bool, plain: bool) -> str:
    """The model to open; empty if none is installed and one can be chosen on the screen."""
    try:
        return default_model()
    except EdgespecError:
        if pull and not installed():
            entry, why = first_model()
            sys.stderr.write(f"edgespec: fetching {entry.name}, {entry.bytes / 1e6:,.0f} MB: {why}\n")
            fetching.fetch(entry)
            return entry.name
        if plain:
            raise
        return ""
