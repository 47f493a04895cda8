"""`edgespec run`: one prompt, one answer on standard output."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from edgespec.app.answer import Request, Result
from edgespec.app.engine import Engine
from edgespec.app.readings import told
from edgespec.app.terminal import clean
from edgespec.models.chat import Message
from edgespec.sampling import Sampling


def ask(
    engine: Engine,
    text: str,
    *,
    system: str,
    sampling: Sampling,
    max_tokens: int,
    stops: Sequence[str],
    raw: bool,
    stats: bool,
    as_json: bool,
) -> int:
    """Print the answer and return the exit code: 0, or 130 when Ctrl-C ended it early."""
    for note in engine.notes:
        sys.stderr.write(f"edgespec: {clean(note)}\n")
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    tokens = engine.model.vocab.tokenize(text, begin=True) if raw else engine.chat_prompt(messages)
    request = Request(tokens, sampling, max_tokens, stops)
    result = Result()
    terminal = sys.stdout.isatty()
    with _stopped_by_ctrl_c(request):
        for piece in engine.answer(request, result):
            if not as_json:
                sys.stdout.write(clean(piece) if terminal else piece)
                sys.stdout.flush()
    if as_json:
        print(json.dumps(result.as_json()))
    elif result.text and not result.text.endswith("\n"):
        print()
    if stats:
        sys.stderr.write(_stats(result) + _unloaded(engine))
    return 130 if result.stop_reason == "cancelled" else 0


@contextmanager
def _stopped_by_ctrl_c(request: Request) -> Iterator[None]:
    """Ctrl-C stops the request within one round instead of raising in the middle of one."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        request.cancel()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _stats(result: Result) -> str:
    return (
        f"\n{len(result.tokens)} tokens, {result.tokens_per_second:.1f} tokens/s, "
        f"first token after {result.seconds_to_first_token:.2f} s, "
        f"prompt {result.prompt_tokens} tokens\n"
        f"{result.drafted} drafted, {result.accepted} accepted ({result.acceptance:.0%}), "
        f"{result.rounds} rounds, {result.tokens_per_round:.2f} tokens a round; "
        f"ended by: {result.stop_reason}\n"
        f"{_spent(result)}\n"
    )


def _unloaded(engine: Engine) -> str:
    """A draft model that cannot pay on this machine, and the memory that this saves."""
    path = engine.draft_path
    if path is None or engine.draft is not None:
        return ""
    return f"draft model not loaded: {path.stat().st_size / 1e6:,.0f} MB of memory saved\n"


def _spent(result: Result) -> str:
    """Mode, reason, readings, and the energy of a token: joules where something meters them."""
    mode = ", then ".join(f"{mode} ({reason})" for mode, reason in result.modes)
    energy = f"{result.cpu_seconds_per_token * 1000:.0f} ms of processor time a token"
    if result.energy is not None and result.joules_per_token is not None:
        energy = f"{result.joules_per_token:.2f} J a token ({result.energy.source}), {energy}"
    return f"mode {mode}; {energy}" + "".join(f"; {one}" for one in told(result.reading))
