"""A scripted model, and a chat with it, driven by keys or line by line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from textual.pilot import Pilot

from edgespec.app.chat.app import ChatApp
from edgespec.app.chat.chat_model import TokenTrace
from edgespec.app.chat.history_worker import HistoryWorker
from edgespec.app.chat.plain import PlainChat
from edgespec.app.chat.session import Session
from edgespec.app.chat.widgets.input import MessageInput
from edgespec.app.engine.request import Request, Step
from edgespec.core import Draft, Reading, Round
from edgespec.machine.governor import Decision, Governor, Mode

SIZE = (80, 24)


@dataclass
class FakeModel:
    """Answers every prompt with `pieces`, raising the exceptions among them. A message has ten tokens."""

    pieces: Sequence[str | Exception] = ("Hello ", "there.")
    pause: float = 0.0
    notes: Sequence[str] = ()
    context_length: int = 512
    asked: list[list[dict[str, str]]] = field(default_factory=list)
    forgotten: list[list[dict[str, str]]] = field(default_factory=list)
    given: int = 0
    closed: bool = False
    governor: Governor = field(default_factory=Governor)
    reading: Reading | None = None
    before_answer: Callable[[], None] = lambda: None
    before_piece: Callable[[int], object] = lambda number: None

    def prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return [1] * 10 * len(messages)

    def count(self, text: str) -> int:
        return len(text.split())

    def answer(
        self, messages: Sequence[dict[str, str]], request: Request, result: TokenTrace
    ) -> Iterator[str]:
        self.asked.append(list(messages))
        self.before_answer()
        result.prompt_tokens = len(request.prompt)
        result.piece = lambda token: str(self.pieces[token]).encode("utf-8", "replace")
        for number, piece in enumerate(self.pieces):
            if request.cancelled:
                result.stop_reason = "cancelled"
                return
            if isinstance(piece, Exception):
                raise piece
            self.before_piece(number)
            suffix = number % 2 == 1
            draft = Draft((number, number), (0.9, 0.9), ("suffix", "suffix"))
            round_ = Round((number,), draft, int(suffix), 0.01, 0.0, 0.01)
            result.add(Step(piece, (number,), round=round_))
            self.given += 1
            yield piece
            sleep(self.pause)
        result.stop_reason = "end"

    def choose(self, mode: Mode) -> Decision:
        return self.governor.choose(mode)

    @property
    def decision(self) -> Decision:
        return self.governor.decision

    def forget(self, messages: Sequence[dict[str, str]]) -> None:
        self.forgotten.append(list(messages))

    def close(self) -> None:
        self.closed = True


def app_of(engine: FakeModel, path: Path | None = None, **settings: Any) -> ChatApp:
    settings = {"system": "Be kind.", **settings}
    return ChatApp(lambda progress: engine, "fake-model", history=HistoryWorker(path), **settings)


def shown(app: Any) -> str:
    """The text on the screen, line by line."""
    return "\n".join(strip.text for strip in app.screen._compositor.render_strips())


async def until(pilot: Pilot[Any], ready: Callable[[], bool], seconds: float = 60.0) -> None:
    end = monotonic() + seconds
    while not ready():
        assert monotonic() < end, f"still waiting; the screen is\n{shown(pilot.app)}"
        await pilot.pause(0.02)


async def send(pilot: Pilot[Any], text: str) -> None:
    pilot.app.query_one(MessageInput).insert(text)
    await pilot.press("enter")


async def answered(pilot: Pilot[Any]) -> None:
    """Wait until no event can happen."""
    app = pilot.app
    assert isinstance(app, ChatApp)
    await until(pilot, lambda: app.session.quiet and app.session.state != "loading")
    await pilot.pause(0.06)


def talk_plainly(path: Path, model: FakeModel, *lines: str, reopen: int | None = None, **options: Any) -> str:
    """Return the output of `--plain` when `lines` are typed."""
    typed: Iterator[str] = iter(lines)
    written: list[str] = []

    def read(prompt: str) -> str:
        try:
            line = next(typed)
        except StopIteration:
            raise EOFError from None
        written.append(f"{prompt}{line}\n")
        return line

    session = Session(lambda progress: model, "fake", system="Be kind.", history=HistoryWorker(path))
    assert PlainChat(session, read, written.append, **options).run(reopen) == 0
    assert model.closed
    return "".join(written)
