"""`edgespec run`: one prompt, one answer on standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgespec.app.console import on_ctrl_c
from edgespec.app.engine.constraints import FREE, ConstraintCompiler, Format, OutputConstraint
from edgespec.app.engine.engine import Engine
from edgespec.app.engine.request import GenerationStats, Request
from edgespec.app.terminal import clean
from edgespec.core import EdgespecError
from edgespec.machine.reading import descriptions
from edgespec.models.prompting import grammar_sources
from edgespec.models.prompting.chat_template import Message
from edgespec.models.prompting.output_events import Arguments, Called, OutputEvent, TextPiece
from edgespec.models.prompting.tool_calls import ToolChoice, read_tools
from edgespec.sampling import Sampling

_AUTO = ToolChoice()


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """The form of an answer: JSON that conforms to `schema`, or calls of `tools` (in OpenAI's form)."""

    schema: grammar_sources.Schema | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    choice: ToolChoice = _AUTO

    def shape(self, engine: Engine, prompt: Sequence[int]) -> OutputConstraint:
        """Return the constraint for the answer to `prompt` (token ids).

        Raises EdgespecError for an unsupported schema or tool.
        """
        format_: Format | None = ("json_schema", self.schema) if self.schema is not None else None
        if not self.tools and format_ is None:
            return FREE
        shaper = ConstraintCompiler(engine.model.vocab, engine.model.chat_template)
        return shaper.shape(read_tools(self.tools), self.choice, format_, prompt)


def read_form(schema: Path | None, tools: Sequence[Path], choice: str, raw: bool) -> AnswerForm:
    """Read the files of --schema and --tool. Raises EdgespecError for invalid ones, and for both together."""
    if not tools:
        if choice != "auto":
            raise EdgespecError("--tool-choice needs tools: give their definitions with --tool")
        if schema is None:
            return AnswerForm()
        found = _read_json(schema)
        grammar_sources.json_schema(found, str(schema))
        return AnswerForm(found)
    if schema is not None or raw:
        raise EdgespecError(
            f"--tool cannot be used with {'--raw' if schema is None else '--schema'}: leave out one of them"
        )
    read: list[Any] = []
    for path in tools:
        found = _read_json(path)
        read += found if isinstance(found, list) else [found]
    try:
        named = [tool.name for tool in read_tools(read)]
    except EdgespecError as error:
        raise EdgespecError(f"--tool: {error}") from None
    if not named:
        raise EdgespecError("--tool: the file defines no function")
    if choice in ("auto", "required"):
        return AnswerForm(tools=read, choice=ToolChoice("required" if choice == "required" else "auto"))
    if choice not in named:
        raise EdgespecError(f"unknown --tool-choice {choice!r} (valid: auto, required, {', '.join(named)})")
    return AnswerForm(tools=read, choice=ToolChoice("required", named=choice, parallel=False))


def _read_json(path: Path) -> Any:
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise EdgespecError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise EdgespecError(f"{path} is not text in UTF-8") from None
    return grammar_sources.read_json(text, str(path))


def ask(
    engine: Engine,
    text: str,
    form: AnswerForm,
    *,
    system: str,
    sampling: Sampling,
    max_tokens: int,
    stops: Sequence[str],
    raw: bool,
    stats: bool,
    as_json: bool,
) -> int:
    """Print the answer and return the exit code: 0, or 130 when Ctrl-C ended it early.

    Raises EdgespecError, after printing the answer, if it was cut before it conformed to `form`.
    """
    for note in engine.notes:
        sys.stderr.write(f"edgespec: {clean(note)}\n")
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    vocab = engine.model.vocab
    tokens = vocab.tokenize(text, begin=True) if raw else engine.chat_prompt(messages, form.tools or None)
    shape = form.shape(engine, tokens)
    request = Request(tokens, sampling, max_tokens, stops, constraint=shape.start, form=shape.form)
    printed, rest = _Printed(silent=as_json), list[OutputEvent]()
    with on_ctrl_c(request.cancel):
        answering = engine.generate(request)
        for step in answering:
            rest = list(step.events)
            printed.add(() if step.finished else rest)
    result = answering.stats
    cut = result.stop_reason in ("length", "context")
    demanded = form.choice.mode == "required" and not printed.calls
    incomplete = cut and (form.schema is not None or printed.inside_a_call or demanded)
    printed.add(() if incomplete else rest)
    if as_json:
        calls = {"text": printed.text, "tool_calls": printed.calls} if form.tools else {}
        print(json.dumps(result.as_json() | calls))
    else:
        printed.end_line()
    if stats:
        sys.stderr.write(_stats(result) + _unloaded(engine))
    if incomplete:
        raise EdgespecError("the answer was cut before it was complete: raise --max-tokens or --context")
    return 130 if result.stop_reason == "cancelled" else 0


class _Printed:
    """Text and calls of an answer, printed unless `silent`: text as it comes, each call as a line of JSON."""

    def __init__(self, *, silent: bool) -> None:
        self.text = ""
        self.calls: list[dict[str, Any]] = []
        self._silent, self._terminal = silent, sys.stdout.isatty()
        self._line = ""  # the end of what is printed
        self._name, self._arguments = "", ""  # of the current call
        self.inside_a_call = False

    def add(self, events: Sequence[OutputEvent]) -> None:
        for event in events:
            match event:
                case TextPiece(text):
                    self.text += text
                    self._print(text)
                case Called(_, name):
                    self._name, self._arguments, self.inside_a_call = name, "", True
                case Arguments(_, text):
                    self._arguments += text
                    self._complete()

    def end_line(self) -> None:
        if self._line and not self._line.endswith("\n"):
            self._print("\n")

    def _complete(self) -> None:
        """Add the current call if its arguments are complete."""
        try:
            call = {"name": self._name, "arguments": json.loads(self._arguments)}
        except (ValueError, RecursionError):
            return
        self.inside_a_call = False
        self.calls.append(call)
        self.end_line()
        self._print(json.dumps(call) + "\n")

    def _print(self, text: str) -> None:
        if text and not self._silent:
            sys.stdout.write(clean(text) if self._terminal else text)
            sys.stdout.flush()
            self._line = text


def _stats(result: GenerationStats) -> str:
    return (
        f"\n{len(result.tokens)} tokens, {result.tokens_per_second:.1f} tokens/s, "
        f"first token after {result.seconds_to_first_token:.2f} s, "
        f"prompt {result.prompt_tokens} tokens\n"
        f"{result.drafted} drafted, {result.accepted} accepted ({result.acceptance:.0%}), "
        f"{result.rounds} rounds, {result.tokens_per_round:.2f} tokens per round; "
        f"ended by: {result.stop_reason}\n"
        f"{_spent(result)}\n"
    )


def _unloaded(engine: Engine) -> str:
    """A line on a draft model that does not pay on this machine, and on the memory that this saves."""
    path = engine.drafters.asked_for
    if path is None or engine.draft is not None:
        return ""
    return f"draft model not loaded: {path.stat().st_size / 1e6:,.0f} MB of memory saved\n"


def _spent(result: GenerationStats) -> str:
    """Mode, reason, sensor readings, and the energy per token: in joules where a meter reports them."""
    mode = ", then ".join(f"{mode} ({reason})" for mode, reason in result.modes)
    energy = f"{result.cpu_seconds_per_token * 1000:.0f} ms of CPU time per token"
    if result.energy is not None and result.joules_per_token is not None:
        energy = f"{result.joules_per_token:.2f} J per token ({result.energy.source}), {energy}"
    return f"mode {mode}; {energy}" + "".join(f"; {one}" for one in descriptions(result.reading))
