"""The command line. Heavy imports wait until a command needs them, so that --help is quick."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

import edgespec
from edgespec.app import config, convert_cli, corpus_cli, doctor, quant_cli, tune_cli
from edgespec.app import options as opt
from edgespec.app.bench import cli as bench_cli
from edgespec.app.chat import cli as chat_cli
from edgespec.app.serve import cli as serve_cli
from edgespec.app.terminal import one_line
from edgespec.core import Cancelled, EdgespecError
from edgespec.models.catalog import installed, load_catalog, models_folder, remove
from edgespec.sampling import Sampling

app = typer.Typer(
    name="edgespec",
    help="Runs a language model on this machine: guesses ahead, checks, and changes nothing in what it says.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
convert_cli.add_to(quant_cli.app)
app.add_typer(quant_cli.app, name="quant")
app.add_typer(corpus_cli.app, name="corpus")
app.command()(chat_cli.chat)
app.command("config")(config.command)
app.command()(tune_cli.tune)
app.command()(doctor.doctor)
app.command()(bench_cli.bench)
app.command()(serve_cli.serve)
app.command()(serve_cli.mcp)


def main() -> None:
    """Entry point: every error a user can cause is one line on stderr and a non-zero exit."""
    try:
        app()
    except EdgespecError as error:
        _fail(str(error))
    except Cancelled:
        sys.exit(130)
    except BrokenPipeError:
        # The reader went away (`| head`): nothing more to say, also not at interpreter exit.
        sys.stdout = None
        sys.exit(141)
    except MemoryError:
        _fail("Not enough memory: choose a smaller model or --context.")


def _fail(message: str) -> None:
    sys.stderr.write(f"edgespec: {one_line(message)}\n")
    sys.exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"edgespec {edgespec.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


@app.command()
def run(
    prompt: Annotated[
        str, typer.Argument(help="What to ask. Text piped in is appended.", show_default=False)
    ] = "",
    model: opt.Model = "",
    draft: opt.Draft = "auto",
    max_draft: opt.MaxDraft = 31,
    exact: opt.Exact = False,
    system: opt.System = "",
    max_tokens: opt.MaxTokens = 0,
    context: opt.Context = 4096,
    threads: opt.Threads = 0,
    engine: opt.Native = "auto",
    mode: opt.Governed = None,
    temperature: opt.Temperature = 0.0,
    top_k: opt.TopK = 0,
    top_p: opt.TopP = 1.0,
    min_p: opt.MinP = 0.0,
    repetition_penalty: opt.RepetitionPenalty = 1.0,
    frequency_penalty: opt.FrequencyPenalty = 0.0,
    presence_penalty: opt.PresencePenalty = 0.0,
    seed: opt.Seed = None,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(help="TOKEN_ID=BIAS added to a token's logit; repeatable.", show_default=False),
    ] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(help="With --json: log-probabilities and this many alternatives.", show_default=False),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End the answer before this text; repeatable.", show_default=False),
    ] = None,
    schema: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A JSON schema: the answer is JSON that keeps to it. Say in the prompt what is wanted.",
            show_default=False,
        ),
    ] = None,
    tool: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Definitions of functions in OpenAI's form (JSON, one or a list) that the answer may call; "
            "calls are printed as JSON, one a line. Repeatable.",
            show_default=False,
        ),
    ] = None,
    tool_choice: Annotated[
        str, typer.Option(metavar="auto|required|NAME", help="Whether to call a function, or which one.")
    ] = "auto",
    raw: Annotated[
        bool, typer.Option(help="Continue the prompt as it is, without the chat template.")
    ] = False,
    stats: Annotated[bool, typer.Option(help="Print speed and drafting figures on stderr.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Answer one prompt on standard output."""
    from edgespec.app.run import ask, read_form

    sampling = Sampling(
        temperature, top_k, top_p, min_p, repetition_penalty, frequency_penalty, presence_penalty,
        opt.parse_bias(logit_bias or []), seed, logprobs,
    )  # fmt: skip
    if "" in (stop or []):
        raise EdgespecError("--stop needs a text: an empty one would end every answer at once.")
    form = read_form(schema, tool or [], tool_choice, raw)
    text = "\n\n".join(part for part in (prompt, opt.piped_input()) if part.strip())
    if not text:
        raise EdgespecError('Nothing to answer: give a prompt, as in `edgespec run "Why is the sky blue?"`.')
    with opt.load_engine(
        model, draft, max_draft, context, threads, engine=engine, exact=exact, mode=mode
    ) as loaded:
        code = ask(
            loaded, text, form, system=system, sampling=sampling, max_tokens=max_tokens, stops=stop or [],
            raw=raw, stats=stats, as_json=as_json,
        )  # fmt: skip
    sys.exit(code)


@app.command()
def pull(
    names: Annotated[list[str], typer.Argument(help="Catalogue names: see `edgespec models`.")],
    offline: Annotated[bool, typer.Option(help="Never use the network.")] = False,
    requantise: Annotated[
        bool, typer.Option(help="Make the drafts of pulled models faster for this machine.")
    ] = True,
) -> None:
    """Download models, check them, and keep them for use without a network."""
    from edgespec.models import download

    pulled = []
    for name in names:
        entry = load_catalog().get(name)
        if entry is None:
            raise EdgespecError(f"{name!r} is not in the catalogue: `edgespec models` lists it.")
        with _download_bar(name) as report, _interruptible():
            path = download.pull(entry, models_folder(), offline=offline, progress=report)
        print(path)
        pulled.append(entry)
    if requantise:
        quant_cli.make_missing_drafts(pulled)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C during a download: keep what is there, say so, exit 130."""
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write("edgespec: stopped; run the same command again and it goes on where it was.\n")
        sys.exit(130)


@contextlib.contextmanager
def _download_bar(name: str) -> Iterator[Callable[[int, int, str], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(name, total=None)
        yield lambda done, total, what: bars.update(
            task, completed=done, total=total, description=f"{name}: {what}"
        )


@app.command()
def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the catalogue and what is on this machine."""
    files = installed()
    here = {one.entry.name: one for one in files if one.entry is not None}
    others = [one for one in files if one.entry is None]
    if as_json:
        rows = [
            {
                "name": entry.name, "family": entry.family, "role": entry.role, "licence": entry.licence,
                "parameters": entry.parameters, "bytes": entry.bytes, "draft": entry.draft,
                "path": str(here[entry.name].path) if entry.name in here else None,
            }
            for entry in load_catalog().values()
        ]  # fmt: skip
        rows += [{"name": one.path.name, "bytes": one.bytes, "path": str(one.path)} for one in others]
        print(json.dumps(rows, indent=2))
        return
    table = Table(box=None, pad_edge=False)
    for title in ("name", "role", "size", "licence", "draft", "here"):
        table.add_column(title, justify="right" if title == "size" else "left", no_wrap=True)
    for entry in load_catalog().values():
        mark = "yes" if entry.name in here else "no"
        table.add_row(entry.name, entry.role, _megabytes(entry.bytes), entry.licence, entry.draft or "", mark)
    for one in others:
        table.add_row(one.path.name, "", _megabytes(one.bytes), "", "", "yes")
    Console(markup=False, highlight=False).print(table)
    if len(here) < len(load_catalog()):
        print("\n`edgespec pull NAME` fetches one.")


@app.command()
def rm(
    name: Annotated[str, typer.Argument(help="A catalogue name, or a file in the models folder.")],
) -> None:
    """Delete a model from this machine."""
    print(f"freed {_megabytes(remove(name))}")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
