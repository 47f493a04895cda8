"""The command line of the chat: options before settings, settings before defaults."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgespec.app import settings as settings_file
from edgespec.app.cli import models
from edgespec.app.cli import options as opt
from edgespec.app.engine import loading
from edgespec.core import EdgespecError
from edgespec.models.hub.selection import default_model, first_model
from edgespec.models.hub.store import installed
from edgespec.sampling import Sampling

if TYPE_CHECKING:
    from edgespec.app.chat.model_worker import ModelLoader
    from edgespec.core import Progress

_SET = "of the settings"
MaxTokensSetting = Annotated[
    int | None, typer.Option(min=0, help="Most tokens of an answer; 0: no limit.", show_default=_SET)
]
ContextSetting = Annotated[
    int | None,
    typer.Option(min=0, help="Context size in tokens; 0: as large as the model's own.", show_default=_SET),
]
TemperatureSetting = Annotated[
    float | None, typer.Option(help="0 takes the likeliest token every time.", show_default=_SET)
]
TopKSetting = Annotated[
    int | None, typer.Option(help="Draw from the k likeliest tokens only; 0: off.", show_default=_SET)
]
TopPSetting = Annotated[
    float | None, typer.Option(help="Draw from the likeliest that sum to p; 1: off.", show_default=_SET)
]
MinPSetting = Annotated[
    float | None, typer.Option(help="Drop what is less likely than this share; 0: off.", show_default=_SET)
]
RepetitionPenaltySetting = Annotated[
    float | None, typer.Option(help="Above 1: avoid words of prompt and answer.", show_default=_SET)
]
ServerOption = Annotated[
    str,
    typer.Option(
        envvar="EDGESPEC_SERVER",
        help="Use this OpenAI-compatible server instead of a model here: http://127.0.0.1:8080, or "
        "unix:/path/to/socket. A key is read from OPENAI_API_KEY.",
        show_default=False,
    ),
]


def chat(
    model: opt.ModelOption = "",
    draft: opt.DraftOption = "auto",
    max_draft: opt.MaxDraftOption = 31,
    exact: opt.ExactOption = False,
    system: Annotated[str | None, typer.Option(help="System prompt.", show_default=_SET)] = None,
    persona: Annotated[
        str, typer.Option(help="A name in the table personas of the settings.", show_default=_SET)
    ] = "",
    max_tokens: MaxTokensSetting = None,
    context: ContextSetting = None,
    threads: opt.ThreadsOption = 0,
    engine: opt.EngineOption = "auto",
    mode: opt.ModeOption = None,
    temperature: TemperatureSetting = None,
    top_k: TopKSetting = None,
    top_p: TopPSetting = None,
    min_p: MinPSetting = None,
    repetition_penalty: RepetitionPenaltySetting = None,
    frequency_penalty: opt.FrequencyPenaltyOption = 0.0,
    presence_penalty: opt.PresencePenaltyOption = 0.0,
    seed: opt.SeedOption = None,
    last: Annotated[bool, typer.Option("-c", "--continue", help="Open the last conversation.")] = False,
    number: Annotated[
        int | None, typer.Option("--open", min=1, help="Open the conversation of this number.")
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Line by line: for screen readers, slow lines, pipes.")
    ] = False,
    server: ServerOption = "",
    pull: Annotated[
        bool,
        typer.Option("--pull", help="Without a model on this machine, first fetch the one to begin with."),
    ] = False,
) -> None:
    """Open the terminal chat."""
    if not plain and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise EdgespecError("chat needs a terminal; use `edgespec chat --plain`, or `edgespec run`.")
    settings = settings_file.load()
    given: dict[str, Any] = {
        "max_tokens": max_tokens, "context": context, "temperature": temperature, "top_k": top_k,
        "top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty, "mode": mode,
    }  # fmt: skip
    settings = settings_file.with_options(settings, {k: v for k, v in given.items() if v is not None})
    base = settings.sampling()
    sampling = Sampling(
        base.temperature, base.top_k, base.top_p, base.min_p, base.repetition_penalty,
        frequency_penalty, presence_penalty, seed=seed,
    )  # fmt: skip
    persona = persona or (settings.persona if system is None else "")
    if system is None:
        system = settings.prompt_of(persona) if persona else settings.system

    def opener(name: str) -> ModelLoader:
        def load(progress: Progress) -> Any:
            from edgespec.app.chat.chat_model import LocalModel

            return LocalModel(
                loading.load_engine(
                    name, draft, max_draft, settings.context, threads, progress,
                    engine=engine, exact=exact, mode=settings.mode,
                )
            )  # fmt: skip

        return load

    def remote(_: Progress) -> Any:
        from edgespec.app.chat.remote_model import RemoteModel

        return RemoteModel(server, model)

    name = model if server else model or settings.model or _default_model(pull, plain)
    load = remote if server else opener(name)
    common: dict[str, Any] = {
        "system": system, "persona": persona, "sampling": sampling, "max_tokens": settings.max_tokens,
        "mode": settings.mode,
    }  # fmt: skip
    title = (Path(name).name or server) if server else Path(name).name
    reopen = number if number is not None else 0 if last else None
    if plain:
        from edgespec.app.chat.plain import talk
        from edgespec.app.chat.session import Session

        sys.exit(talk(Session(load, title, **common), reopen))
    from edgespec.app.chat.app import ChatApp

    app = ChatApp(load, title, settings=settings, opener=None if server else opener, reopen=reopen, **common)
    sys.exit(app.run() or 0)


def _default_model(pull: bool, plain: bool) -> str:
    """Empty without a model on this machine where one can be chosen on the screen."""
    try:
        return default_model()
    except EdgespecError:
        if pull and not installed():
            entry, why = first_model()
            sys.stderr.write(f"edgespec: fetching {entry.name}, {entry.bytes / 1e6:,.0f} MB: {why}\n")
            models.fetch(entry)
            return entry.name
        if plain:
            raise
        return ""
