"""`edgespec serve` and `edgespec mcp`: serve a model to other programs."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Annotated

import typer

from edgespec.app.cli.options import grouped, option
from edgespec.app.engine import loading
from edgespec.app.engine.loading import EngineSpec
from edgespec.app.terminal import one_line
from edgespec.models.hub.selection import default_model

if TYPE_CHECKING:
    from edgespec.app.engine.engine import Engine
    from edgespec.app.serve.sockets import Bound

_GIVE_UP_SECONDS = 3.0
_OLLAMA = "127.0.0.1:11434"
ParallelOption = Annotated[int, option("parallel")]


@grouped
def serve(
    *,
    spec: EngineSpec,
    socket: Annotated[
        Path | None,
        typer.Option(help="The Unix socket.", show_default="edgespec.sock in the user's runtime folder"),
    ] = None,
    tcp: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Listen here too; needs a token.", show_default=False)
    ] = "",
    ollama: Annotated[
        bool, typer.Option("--ollama", help=f"Listen on {_OLLAMA} too, where programs look for Ollama.")
    ] = False,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Allow --tcp addresses that other machines can reach.")
    ] = False,
    host_name: Annotated[
        list[str] | None,
        typer.Option(help="A name that TCP clients use for this server; repeatable.", show_default=False),
    ] = None,
    alias: Annotated[
        list[str] | None,
        typer.Option(
            help="Another name of the model, or a pattern of names ('gpt-*', '*'); repeatable.",
            show_default=False,
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse requests with unknown fields instead of ignoring these.")
    ] = False,
    parallel: ParallelOption = 4,
    queue: Annotated[int, option("queue")] = 64,
) -> None:
    """Serve OpenAI's, Anthropic's and Ollama's APIs on a Unix socket or TCP port."""
    from edgespec.app.serve import sockets
    from edgespec.app.serve.access_control import own_names

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    with ExitStack() as stack:
        # Bound before threads start and the model is loaded: errors show at once, early clients wait.
        bound = sockets.inherited(allow_remote)
        for one in bound:
            stack.callback(one.close)
        if socket is not None or not (bound or ((tcp or ollama) and os.name != "posix")):
            bound.append(sockets.bind_unix(socket or sockets.default_path()))
            stack.callback(bound[-1].close)
        for address in [tcp] * bool(tcp) + [_OLLAMA] * ollama:
            bound.append(sockets.bind_tcp(address, allow_remote))
            stack.callback(bound[-1].close)
        token = _token() if any(one.is_tcp for one in bound) else None
        name = spec.model or default_model()
        spec = replace(spec, model=name, parallel=parallel)
        loaded = _loaded(lambda progress: loading.load_engine(spec, progress))
        for note in loaded.notes:
            _say(note)
        names = list(dict.fromkeys([Path(name).name.removesuffix(".gguf"), Path(name).name, *(alias or [])]))
        hosts = [*(host_name or []), *(own_names() if allow_remote else ())]
        _run(loaded, bound, names, token, hosts, queue, strict=strict)


@grouped
def mcp(*, spec: EngineSpec, parallel: ParallelOption = 1) -> None:
    """Serve the model to agents as tools of the Model Context Protocol on standard input and output."""
    from edgespec.app.engine.completions import CompletionService
    from edgespec.app.engine.scheduler import Scheduler
    from edgespec.app.serve import mcp_server
    from edgespec.models.hub.store import resolve

    name = spec.model or default_model()
    resolve(name)  # errors show now, not at the first request
    services: list[CompletionService] = []

    def load() -> CompletionService:
        loaded = loading.load_engine(replace(spec, model=name, parallel=parallel))
        for note in loaded.notes:
            _say(note)
        services.append(CompletionService(Scheduler(loaded)))
        return services[0]

    try:
        mcp_server.run(load, Path(name).name)
    finally:
        for service in services:
            service.close()
            service.scheduler.close()


def _run(
    loaded: Engine,
    bound: list[Bound],
    names: list[str],
    token: str | None,
    hosts: list[str],
    queue: int,
    *,
    strict: bool,
) -> None:
    from edgespec.app.engine.completions import CompletionService
    from edgespec.app.engine.scheduler import Scheduler
    from edgespec.app.serve.application import make_app
    from edgespec.app.serve.connections import make_server
    from edgespec.app.serve.metrics import Metrics

    scheduler = Scheduler(loaded, queue=queue)
    metrics = Metrics(scheduler)
    service = CompletionService(scheduler, metrics)
    try:
        app = make_app(service, metrics, names, token=token, hosts=hosts, strict=strict)
        server = make_server(app, service.stop)
        for one in bound:
            _say(f"{names[0]} is served on {one.address}")
        # uvicorn stops on a signal and then raises it again, which must not end the process.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        server.run([one.socket for one in bound])
    finally:
        service.close()
        scheduler.close()


def _loaded(load: Callable[[Callable[[float], bool]], Engine]) -> Engine:
    """Call `load` in a thread of its own: native code would swallow the exception of a signal handler."""
    future: Future[Engine] = Future()
    leaving = Event()

    def job() -> None:
        try:
            future.set_result(load(lambda _: not leaving.is_set()))
        except BaseException as error:  # noqa: BLE001 - raised by `future.result`
            future.set_exception(error)

    Thread(target=job, name="edgespec-loading", daemon=True).start()
    try:
        return future.result()
    except SystemExit:
        leaving.set()
        with suppress(Exception):
            future.result(_GIVE_UP_SECONDS).close()
        raise


def _token() -> str:
    from edgespec.app.history.store import data_folder
    from edgespec.app.serve import sockets

    token, path = sockets.token(data_folder())
    _say(f"TCP clients need the token in {path} as API key")
    return token


def _say(text: str) -> None:
    sys.stderr.write(f"edgespec: {one_line(text)}\n")
    sys.stderr.flush()


def _leave(number: int, _frame: object) -> None:
    """Exit on a signal while the model is loading, so that the socket is removed."""
    sys.exit(0 if number == signal.SIGTERM else 130)
