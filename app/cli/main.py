"""The command line. Heavy modules are imported by the commands that need them, so that --help is fast."""

from __future__ import annotations

import logging
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

import edgespec
from edgespec.app import settings
from edgespec.app.cli import bench as bench_cli
from edgespec.app.cli import chat as chat_cli
from edgespec.app.cli import convert, corpus, doctor, licences, models, quant, tune
from edgespec.app.cli import serve as serve_cli
from edgespec.app.cli.options import grouped, option, parse_bias, piped_input
from edgespec.app.engine import loading
from edgespec.app.engine.loading import EngineSpec
from edgespec.app.terminal import CleanHandler, one_line
from edgespec.core import Cancelled, EdgespecError
from edgespec.sampling import Sampling

BiasOption = Annotated[
    list[str] | None,
    typer.Option(help="TOKEN_ID=BIAS, added to the logit of a token; repeatable.", show_default=False),
]
LogprobsOption = Annotated[
    int | None,
    typer.Option(help="With --json: log-probabilities and this many alternatives.", show_default=False),
]
StopOption = Annotated[
    list[str] | None, typer.Option(help="End the answer before this text; repeatable.", show_default=False)
]
SchemaOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A JSON schema that the answer conforms to. The prompt should describe it, too.",
        show_default=False,
    ),
]
ToolOption = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        help="Definitions of functions in OpenAI's form (JSON, one or a list) that the answer may call; "
        "calls are printed as JSON, one per line. Repeatable.",
        show_default=False,
    ),
]
ToolChoiceOption = Annotated[
    str, typer.Option(metavar="auto|required|NAME", help="Whether to call a function, or which one.")
]

app = typer.Typer(
    name="edgespec",
    help="Run language models locally with lossless speculative decoding.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
convert.add_to(quant.app)
app.add_typer(models.app, name="models")
app.command()(models.pull)
app.command()(models.rm)
app.command()(licences.licences)
app.add_typer(quant.app, name="quant")
app.add_typer(corpus.app, name="corpus")
app.command()(chat_cli.chat)
app.command("config")(settings.command)
app.command()(tune.tune)
app.command()(doctor.doctor)
app.add_typer(bench_cli.app, name="bench")
app.command()(serve_cli.serve)
app.command()(serve_cli.mcp)


def main() -> None:
    """Run the command line; an error that a user can cause is one line on stderr and a non-zero exit code."""
    logging.basicConfig(level=logging.WARNING, handlers=[CleanHandler()], format="edgespec: %(message)s")
    try:
        app()
    except EdgespecError as error:
        _fail(str(error))
    except Cancelled:
        sys.exit(130)
    except BrokenPipeError:
        # The reader is gone (`| head`): write nothing more, also not at interpreter exit.
        sys.stdout = None
        sys.exit(141)
    except MemoryError:
        _fail("not enough memory: choose a smaller model or --context")


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
@grouped
def run(
    *,
    prompt: Annotated[
        str, typer.Argument(help="The prompt. Text piped in is appended.", show_default=False)
    ] = "",
    spec: EngineSpec,
    system: Annotated[str, option("system")] = "",
    max_tokens: Annotated[int, option("max_tokens")] = 0,
    sampling: Sampling,
    logit_bias: BiasOption = None,
    logprobs: LogprobsOption = None,
    stop: StopOption = None,
    schema: SchemaOption = None,
    tool: ToolOption = None,
    tool_choice: ToolChoiceOption = "auto",
    raw: Annotated[bool, typer.Option(help="Continue the prompt as it is, without a chat template.")] = False,
    stats: Annotated[bool, typer.Option(help="Print speed and drafting statistics on stderr.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Answer one prompt on standard output."""
    from edgespec.app.cli.run import ask, read_form

    sampling = replace(sampling, logit_bias=parse_bias(logit_bias or []), logprobs=logprobs)
    if "" in (stop or []):
        raise EdgespecError("--stop is empty, which would end every answer at once: give a text")
    form = read_form(schema, tool or [], tool_choice, raw)
    text = "\n\n".join(part for part in (prompt, piped_input()) if part.strip())
    if not text:
        raise EdgespecError('no prompt: give one, as in `edgespec run "Why is the sky blue?"`')
    with loading.load_engine(spec) as loaded:
        code = ask(
            loaded, text, form, system=system, sampling=sampling, max_tokens=max_tokens, stops=stop or [],
            raw=raw, stats=stats, as_json=as_json,
        )  # fmt: skip
    sys.exit(code)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
