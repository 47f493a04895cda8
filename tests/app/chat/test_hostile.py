"""Nothing but text reaches the terminal, whatever a model, a title, a file or a server contains."""

from __future__ import annotations

import os
import pty
import random
import sys
import threading
import tty
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyte
import pytest
from chats import SIZE, FakeModel, answered, app_of, send, shown, until
from hostile import EVIL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it.token import Token
from textual.events import Paste

from edgespec.app.chat.attachments import Attached, folded, with_files
from edgespec.app.chat.events import Ended, Notice, TextAppended
from edgespec.app.chat.markup import parser
from edgespec.app.chat.messages import BranchMessage
from edgespec.app.chat.plain import PlainChat
from edgespec.app.chat.session import Session
from edgespec.app.chat.widgets.input import MessageInput
from edgespec.app.chat.widgets.panel import colored
from edgespec.app.chat.widgets.sidebar import _hit, _title
from edgespec.app.cli import main, run
from edgespec.app.engine.request import GenerationStats, Request, Step
from edgespec.app.history.io import to_json, to_markdown
from edgespec.app.history.search import Hit
from edgespec.app.history.store import History
from edgespec.app.terminal import clean, one_line
from edgespec.sampling import Sampling

HOSTILE = st.lists(st.one_of(st.sampled_from(EVIL), st.text(max_size=4)), max_size=6).map("".join)


def splits(text: str, cuts: list[int]) -> list[str]:
    at = sorted({cut % (len(text) + 1) for cut in cuts} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(at)]


def bad(text: str) -> list[str]:
    return [
        c for c in text
        if (ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0 or "\u202a" <= c <= "\u202e"
        or "\u2066" <= c <= "\u2069" or "\ud800" <= c <= "\udfff"
    ]  # fmt: skip


class Watched(pyte.Screen):
    """A terminal that records everything it executes except writing text."""

    def __init__(self) -> None:
        super().__init__(200, 50)
        self.obeyed: list[str] = []
        self.reported: list[str] = []

    def write_process_input(self, data: str) -> None:
        self.reported.append(data)

    def __getattribute__(self, name: str) -> Any:
        if name in ("erase_in_display", "set_title", "reset", "report_device_status", "cursor_position",
                    "select_graphic_rendition", "shift_out", "backspace", "set_mode", "reset_mode",
                    "report_device_attributes", "reverse_index", "index"):  # fmt: skip
            super().__getattribute__("__dict__").setdefault("obeyed", []).append(name)
        return super().__getattribute__(name)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(HOSTILE, st.lists(st.integers(0, 200), max_size=8))
def test_every_split_of_a_stream_is_text_to_a_terminal(text: str, cuts: list[int]) -> None:
    pieces = [clean(piece) for piece in splits(text, cuts)]
    assert bad("".join(pieces)) == []
    screen = Watched()
    stream = pyte.Stream(screen)
    screen.obeyed.clear()
    stream.feed("".join(pieces).replace("\n", " ").replace("\t", " "))
    assert screen.obeyed == []
    assert screen.reported == []


class Scripted:
    """The part of an engine that `run` needs, with scripted pieces and a note."""

    drafters = SimpleNamespace(asked_for=None)

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.model = self.vocab = self

    @property
    def notes(self) -> list[str]:
        return ["".join(self.pieces)]

    def chat_prompt(self, messages: object, tools: object) -> list[int]:
        return [0]

    def detokenize(self, tokens: Sequence[int]) -> str:
        return ""

    def generate(self, request: Request) -> Steps:
        return Steps(self.pieces)


class Steps:
    def __init__(self, pieces: Sequence[str]) -> None:
        self._pieces, self.stats = pieces, GenerationStats()

    def __iter__(self) -> Iterator[Step]:
        return (Step(piece) for piece in self._pieces)


def streams(count: int) -> Iterator[list[str]]:
    """Hostile texts in pieces: split anywhere, every tenth after each character."""
    rng = random.Random(count)
    parts = [*EVIL, *"ab1;[]?\x1b\x9b\x9d\n\t", "\u200f", "é", "`", "**", "&#27;", "&#x9b;", "![](x)", "<b>"]
    for number in range(count):
        text = "".join(rng.choices(parts, k=rng.randint(1, 8)))
        cuts = (
            range(len(text)) if number % 10 == 0 else rng.choices(range(len(text) + 1), k=rng.randint(1, 6))
        )
        yield splits(text, list(cuts))


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals of POSIX")
def test_ten_thousand_hostile_streams_are_text_in_every_sink(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output of `run`, the plain chat, notes, errors, titles and notifications; exports."""
    master, slave = pty.openpty()
    tty.setraw(slave)
    heard = bytearray()

    def read() -> None:
        while not heard.endswith(b"THE END"):
            heard.extend(os.read(master, 1 << 16))

    reader = threading.Thread(target=read, daemon=True)  # a failure must not wait for it
    reader.start()
    engine, count = Scripted(), 0
    with (
        open(slave, "w", encoding="utf-8", closefd=False) as terminal,
        History(tmp_path / "h.db") as history,
        monkeypatch.context() as patch,
    ):
        patch.setattr(sys, "stdout", terminal)
        patch.setattr(sys, "stderr", terminal)
        plain = PlainChat(Session(lambda _: engine), input, terminal.write)  # type: ignore[arg-type,return-value]
        number = history.new().id
        for pieces in streams(10_000):
            engine.pieces, text = pieces, "".join(pieces)
            item = BranchMessage(1, "assistant", text, "partial")
            run.ask(
                engine, "", run.AnswerForm(), system="", sampling=Sampling(), max_tokens=0, stops=(),
                raw=False, stats=False, as_json=False,
            )  # type: ignore[arg-type] # fmt: skip
            for piece in pieces:
                plain._show(TextAppended(item, piece))
            plain._show(Ended(item, error=text))
            plain._show(Notice(text, text=text))
            with pytest.raises(SystemExit):
                main._fail(text)
            terminal.write(one_line(text) + _title(text, False).plain)
            count += 1
            tokens = parser().parse("".join(map(clean, pieces)))
            assert not bad("".join(_texts(tokens)))
            if count % 50 == 0:
                history.append(number, "assistant", text)
        exported = to_markdown(history, number) + to_json(history)
        assert set(bad(exported)) == set()
        terminal.write("THE END")
        terminal.flush()
        reader.join()
    os.close(slave)
    os.close(master)
    assert set(bad(heard.decode())) == set()
    screen = Watched()
    stream = pyte.ByteStream(screen)
    screen.obeyed.clear()
    stream.feed(bytes(heard))
    assert set(screen.obeyed) <= {"index"}  # of a line feed
    assert screen.reported == []


def _texts(tokens: Iterable[Token]) -> Iterator[str]:
    """All text that a Textual widget may take from a Markdown token."""
    for token in tokens:
        yield token.content + token.info + "".join(map(str, token.attrs.values()))
        yield from _texts(token.children or [])


@settings(max_examples=200, deadline=None)
@given(HOSTILE, HOSTILE, st.integers(0, 9), st.integers(0, 9))
def test_titles_snippets_files_and_tokens_are_clean(a: str, b: str, start: int, length: int) -> None:
    whole = a + b
    hit = Hit(1, a, 2, whole, ((min(start, len(whole)), min(start + length, len(whole))),))
    spans = [("suffix", 1)] * len(whole)
    shown = [_title(a, True).plain, _hit(hit).plain, colored(whole, spans).plain]
    shown += [clean(folded(with_files(a, [Attached(b, a)]))), one_line(a)]
    assert bad("".join(shown)) == []


async def test_a_hostile_conversation_cannot_steer_the_screen(tmp_path: Path) -> None:
    evil = "".join(EVIL)
    with History(tmp_path / "h.db") as history:
        number = history.new(title=f"ti{evil}tle", persona=f"pe{evil}r", model=evil).id
        history.append(number, "user", f"question{evil} **bold{evil}** findme")
        history.append(number, "assistant", f"# an{evil}swer\n\n`co{evil}de` [a{evil}](http://x{evil})")
        history.append(number, "tool", evil)
    pieces = list(f"str{evil}eam &#27;[2J &#x9b;2J &#x202e; <b>{evil}</b>\n\n```{evil}\n{evil}\n```\n")
    app = app_of(FakeModel(pieces, notes=[f"no{evil}te"]), tmp_path / "h.db", reopen=number)
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        seen = []
        await answered(pilot)
        await pilot.press("ctrl+b")
        app.post_message(Paste(f"find{evil}me"))
        await pilot.pause(0.3)
        seen.append(shown(app))
        app.sidebar.begin("findme")
        await until(pilot, lambda: "findme" in shown(app))
        seen.append(shown(app))
        await pilot.press("ctrl+b", "ctrl+g")
        app.post_message(Paste(f"pasted{evil}"))
        await until(pilot, lambda: "pasted" in app.query_one(MessageInput).text)
        await pilot.press("enter")
        await answered(pilot)
        for _ in range(2):  # with the engine panel, and without it
            await pilot.pause(0.4)
            seen.append(shown(app))
            await pilot.press("ctrl+g")
        await pilot.press("f2")  # edits the question
        await pilot.pause(0.1)
        seen.append(shown(app))
        await pilot.press("escape")
        for command in (f"/rename x{evil}y", f"/{evil}", f"/export /no{evil}where/x.md", f"/persona {evil}"):
            app.query_one(MessageInput).clear()
            await send(pilot, command)
            await pilot.pause(0.2)
            seen.append(shown(app))
        for key in ("f1", "f6", "f7", "f4"):
            await pilot.press(key)
            app.post_message(Paste(f"into{evil}"))
            await pilot.pause(0.1)
            seen.append(shown(app))
            await pilot.press("escape")
        assert "stream" not in seen[0]
        assert any("eam" in screen for screen in seen)
        lines = [line for screen in seen for line in screen.split("\n") if bad(line)]
        assert lines == []
        strips = [strip for screen in app.screen_stack for strip in screen._compositor.render_strips()]
        links = [segment.style.link for strip in strips for segment in strip if segment.style is not None]
        assert not any(link and bad(link) for link in links)
        assert bad(app.title + app.sub_title) == []


@pytest.mark.parametrize("evil", EVIL)
def test_the_check_itself_sees_each_of_them(evil: str) -> None:
    assert bad(evil)
    assert not bad(clean(evil))
