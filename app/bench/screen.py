"""Cost of drawing the chat: a scripted answer at a given speed on a screen of its own, without a model.

The share of a core is that of the screen's thread: during an answer, and while the user types as well.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter, thread_time
from typing import Any

from textual.events import Key, Paste

from edgespec.app.chat.app import ChatApp
from edgespec.app.chat.chat_model import ChatMessage, TokenTrace
from edgespec.app.chat.history_worker import HistoryWorker
from edgespec.app.chat.widgets.input import MessageInput
from edgespec.app.engine.request import Request
from edgespec.core import EdgespecError
from edgespec.machine.governor import Mode

SIZE = (120, 40)
_PASTE = 100_000  # characters
_PARAGRAPH = (
    "A step of several rows costs little more than one: the weights are read **once**, and the draft tokens "
    "are verified in the same pass. See `decode.py`.\n\n"
)
_CODE = (
    "```python\ndef speculate(context: list[int]) -> Round:\n    draft = propose(context)  # cheap\n"
    "    return verify(context, draft, forward(context, draft))\n```\n\n"
)
_LIST = "- first the prompt,\n- then the draft tokens,\n- last the target's token.\n\n"


def pieces(tokens: int) -> list[str]:
    """Markdown in `tokens` pieces, each about as long as a token."""
    text = ""
    while len(text) < 4 * tokens:
        text += _PARAGRAPH * 2 + _CODE + _LIST
    return [text[at : at + 4] for at in range(0, 4 * tokens, 4)]


class Scripted:
    """A chat model that streams its pieces at a steady pace."""

    notes: Sequence[str] = ()
    context_length = 1 << 20
    decision = None
    reading = None

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.pace = 0.0  # pieces per second
        self.given = 0

    def prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        return [0]

    def count(self, text: str) -> int:
        return len(text) // 4

    def answer(self, messages: Sequence[ChatMessage], request: Request, result: TokenTrace) -> Iterator[str]:
        start, result.prompt_tokens = perf_counter(), 1
        for number, piece in enumerate(self.pieces):
            time.sleep(max(0.0, start + number / self.pace - perf_counter()))
            if request.cancelled:
                result.stop_reason = "cancelled"
                return
            result.tokens.append(0)
            self.given = number + 1
            yield piece
        result.stop_reason = "end"

    def choose(self, mode: Mode) -> None:
        return None

    def forget(self, messages: Sequence[ChatMessage]) -> None: ...

    def close(self) -> None: ...


def measure() -> dict[str, Any]:
    """Measure the share of a core for drawing, and the delay of a key on screen, in several situations."""
    return asyncio.run(_measure())


async def _measure() -> dict[str, Any]:
    engine, rows = Scripted(), []
    with tempfile.TemporaryDirectory(prefix="edgespec-") as folder:
        app = ChatApp(lambda _: engine, "scripted", history=HistoryWorker(Path(folder) / "history.db"))
        async with app.run_test(size=SIZE) as pilot:
            while app.session.state == "loading":
                await pilot.pause(0.05)
            for name, tokens, pace, before in (
                ("50 tokens/s", 1000, 50, 0),
                ("100 tokens/s", 1500, 100, 0),
                ("50 tokens/s at the end of 10,000", 10_000, 50, 8_500),
            ):
                rows.append({"situation": name, **await _course(app, engine, tokens, pace, before)})
            app.session.new()
            await pilot.pause(0.5)
            start = perf_counter()
            app.post_message(Paste("pasted text\n" * (_PASTE // 12)))
            box = app.query_one(MessageInput)
            while not box.text:
                await asyncio.sleep(0.001)
            await _drawn(app)
            paste = perf_counter() - start
    return {"drawing": rows, "paste_100_kb_seconds": paste}


async def _course(app: ChatApp, engine: Scripted, tokens: int, pace: float, before: int) -> dict[str, float]:
    """Draw one answer; its first `before` pieces come at once and do not count."""
    app.session.new()
    await asyncio.sleep(0.3)
    made = pieces(tokens)
    engine.given = 0
    engine.pieces, engine.pace = ["".join(made[:before]), *made[before:]] if before else made, pace
    app.session.send("Go on.")
    app._wake()
    while not (item := app.session.last("assistant")) or not item.text:
        await asyncio.sleep(0.01)
    await asyncio.sleep(5.0 if before else 1.0)
    box, delays = app.query_one(MessageInput), list[float]()
    wall, used = perf_counter(), thread_time()
    half = (engine.given + len(engine.pieces)) // 2
    while engine.given < half:
        await asyncio.sleep(0.2)
    drawing = (thread_time() - used) / (perf_counter() - wall)
    wall, used = perf_counter(), thread_time()
    while app.session.generating is not None:
        await asyncio.sleep(0.2)
        start = perf_counter()
        box.post_message(Key("x", "x"))
        length = len(box.text)
        while len(box.text) == length:
            await asyncio.sleep(0.001)
        await _drawn(app)
        delays.append(perf_counter() - start)
    typing = (thread_time() - used) / (perf_counter() - wall)
    box.clear()
    if not delays:
        raise EdgespecError("the machine is too busy to measure: try again when it is idle")
    delays.sort()
    return {
        "core_share": drawing,
        "core_share_typing": typing,
        "key_ms_median": 1000 * median(delays),
        "key_ms_most": 1000 * delays[-1],
    }


async def _drawn(app: ChatApp) -> None:
    drawn = asyncio.Event()
    app.call_after_refresh(drawn.set)
    await drawn.wait()


def table(report: dict[str, Any]) -> str:
    """Format the report for people."""
    lines = [f"{'':34}{'core':>7}{'typing':>9}{'key, median':>13}{'most':>8}"]
    lines += [
        f"{row['situation']:34}{row['core_share']:7.1%}{row['core_share_typing']:9.1%}"
        f"{row['key_ms_median']:10.0f} ms"
        f"{row['key_ms_most']:5.0f} ms"
        for row in report["drawing"]
    ]
    return "\n".join([*lines, f"a paste of 100 KB: {report['paste_100_kb_seconds']:.3f} s"])
