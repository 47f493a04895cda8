"""The command line. Heavy imports wait until a command needs them, so that --help is quick."""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

import edgespec
from edgespec.app import settings
from edgespec.app.cli import bench as bench_cli
from edgespec.app.cli import chat as chat_cli
from edgespec.app.cli import convert, corpus, doctor, licences, models, quant, tune
from edgespec.app.cli import options as opt
from edgespec.app.cli import serve as serve_cli
from edgespec.app.engine import loading
from edgespec.app.terminal import CleanHandler, one_line
from edgespec.core import Cancelled, EdgespecError
from edgespec.sampling import Sampling

app = typer.Typer(
    name="edgespec",
    help="Runs a language model on this machine: guesses ahead, checks, and changes nothing in what it says.",
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
app.command()(bench_cli.bench)
app.command()(serve_cli.serve)
app.command()(serve_cli.mcp)


def main() -> None:
    """Entry point: every error a user can cause is one line on stderr and a non-zero exit."""
    logging.basicConfig(level=logging.WARNING, handlers=[CleanHandler()], format="edgespec: %(message)s")
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
    model: opt.ModelOption = "",
    draft: opt.DraftOption = "auto",
    max_draft: opt.MaxDraftOption = 31,
    exact: opt.ExactOption = False,
    system: opt.SystemOption = "",
    max_tokens: opt.MaxTokensOption = 0,
    context: opt.ContextOption = 4096,
    threads: opt.ThreadsOption = 0,
    engine: opt.EngineOption = "auto",
    mode: opt.ModeOption = None,
    temperature: opt.TemperatureOption = 0.0,
    top_k: opt.TopKOption = 0,
    top_p: opt.TopPOption = 1.0,
    min_p: opt.MinPOption = 0.0,
    repetition_penalty: opt.RepetitionPenaltyOption = 1.0,
    frequency_penalty: opt.FrequencyPenaltyOption = 0.0,
    presence_penalty: opt.PresencePenaltyOption = 0.0,
    seed: opt.SeedOption = None,
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
    from edgespec.app.cli.run import ask, read_form

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
    with loading.load_engine(
        model, draft, max_draft, context, threads, engine=engine, exact=exact, mode=mode
    ) as loaded:
        code = ask(
            loaded, text, form, system=system, sampling=sampling, max_tokens=max_tokens, stops=stop or [],
            raw=raw, stats=stats, as_json=as_json,
        )  # fmt: skip
    sys.exit(code)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
