"""`edgespec chat --plain`: the same chat line by line, for screen readers and plain terminals.

Nothing is drawn twice, no cursor moves, no color. Notes of the chat begin with "- ".
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from edgespec.app.chat import commands
from edgespec.app.chat.actions import ChatActions
from edgespec.app.chat.attachments import attach, folded, unfolded_question
from edgespec.app.chat.command_table import is_command, parse
from edgespec.app.chat.events import (
    Changed,
    ChatEvent,
    ContextOverflow,
    Ended,
    Loaded,
    LoadFailed,
    Notice,
    TextAppended,
)
from edgespec.app.chat.messages import BranchMessage
from edgespec.app.chat.model_picker import fetch
from edgespec.app.chat.model_worker import ModelLoader, explain
from edgespec.app.chat.session import Session
from edgespec.app.chat.thoughts import parts, summary
from edgespec.app.console import on_ctrl_c
from edgespec.app.settings import Settings
from edgespec.app.terminal import clean, one_line

if TYPE_CHECKING:  # imports SQLite
    from edgespec.app.history.store import History

T = TypeVar("T")
_LISTED = 50  # conversations


class PlainChat:
    """Reads lines, writes lines; the `ChatActions` of a chat without a screen.

    `read` gets a prompt, and raises EOFError at the end of the input.
    """

    plain = True

    def __init__(
        self,
        session: Session,
        read: Callable[[str], str],
        write: Callable[[str], object],
        *,
        settings: Settings | None = None,
        opener: Callable[[str], ModelLoader] | None = None,
    ) -> None:
        self.session, self.settings, self.opener = session, settings or Settings(), opener
        self._read, self._write = read, write
        self._failed = self._ended = False
        self._item: BranchMessage | None = None  # the answer that is written, and how much of it
        self._written = 0

    def run(self, reopen: int | None = None) -> int:
        """Chat until the input ends. Returns the exit code."""
        session = self.session
        session.start()
        self.note("loading the model")
        loop = asyncio.new_event_loop()  # asyncio.run would take Ctrl+C away from `read`
        try:
            if reopen:
                session.open(reopen)
            elif reopen == 0:
                session.open_last()
            self._follow()
            if self._failed:
                return 1
            self.note("ready: /help lists the commands")
            while not self._ended and (text := self._message()) is not None:
                try:
                    loop.run_until_complete(self._do(text))
                except Exception as error:  # noqa: BLE001 - must not end a chat of hours
                    self.note(explain(error))
                self._follow()
        finally:
            loop.close()
            session.close()
        return 0

    async def _do(self, text: str) -> None:
        """Run a command, or send a message."""
        if is_command(text):
            command, argument = parse(text, plain=True)
            actions: ChatActions = self
            await command.run(actions, argument)
        elif text.strip():
            text, files = attach(text.removeprefix("/"))
            for one in files:
                self.note(f"@{one.name} attached: {len(one.text):,} characters")
            self.session.send(text)

    def _message(self) -> str | None:
        lines = []
        try:
            while (line := self._read("> ")).endswith("\\"):
                lines.append(line[:-1])
        except EOFError:
            return None
        except KeyboardInterrupt:
            self._write("\n")
            return ""
        return "\n".join([*lines, line])

    # --- what commands may do: see `actions.ChatActions` ---

    def note(self, text: str, error: bool = False) -> None:
        self._write(f"- {one_line(text)}\n")

    def show(self, title: str, text: str) -> None:
        self._write(f"{clean(text)}\n")

    async def ask_text(self, question: str, value: str = "") -> str | None:
        current = f", now {value!r}" if value else ""
        self.note(f"{question}{current}: an empty line changes nothing")
        return self._answer() or None

    async def choose(self, question: str, options: Sequence[tuple[T, str, str]]) -> T | None:
        self.note(f"{question}: enter a number, an empty line changes nothing")
        for number, (_, name, about) in enumerate(options, 1):
            self.note(f"{number}: {name}{about and ': '}{about}")
        answer = self._answer()
        if answer.isdecimal() and 1 <= int(answer) <= len(options):
            return options[int(answer) - 1][0]
        if answer:
            self.note(f"no such choice {answer!r}: nothing is changed")
        return None

    def _answer(self) -> str:
        try:
            return self._read("? ").strip()
        except (EOFError, KeyboardInterrupt):
            return ""

    async def ask_history(self, job: Callable[[History], T]) -> T:
        return self.session.history.do(job).result()

    def begin_edit(self, question: BranchMessage) -> None:
        self.note(f"the last question: {unfolded_question(question.text)}")
        self.note("/edit TEXT replaces it")

    def show_conversations(self, words: str = "") -> None:
        history = self.session.history
        if words:
            for hit in history.do(lambda h: h.search(words, 20)).result():
                self.note(f"{hit.conversation}: {hit.title}: {hit.snippet}")
        else:
            for one in history.do(lambda h: h.conversations(_LISTED)).result():
                self.note(f"{one.id}{' pinned' if one.pinned else ''}: {one.title}")

    def fetch(self, name: str) -> None:
        done, errors = threading.Event(), list[str]()

        def finish(error: str) -> None:
            errors.extend([error] if error else [])
            done.set()

        self.note(f"downloading {name}")
        fetch(name, lambda _: None, finish)
        try:
            done.wait()
        except KeyboardInterrupt:
            self.note(f"the download of {name} continues until the chat ends")
            return
        if errors:
            self.note(errors[0])
        else:
            self.use(name)

    def use(self, name: str) -> None:
        assert self.opener is not None
        self.note(f"loading {name}")
        self.session.reload(self.opener(name), name)

    def apply(self, settings: Settings) -> None:
        self.settings = settings
        self.session.apply(settings)

    def quit(self) -> None:
        self._ended = True

    # --- events ---

    def _follow(self) -> None:
        """Write events until none is left to wait for."""
        session = self.session
        with on_ctrl_c(session.stop):
            while not session.quiet:
                for event in session.poll(0.1):
                    self._show(event)

    def _show(self, event: ChatEvent) -> None:
        session = self.session
        match event:
            case Changed(keep):
                if not keep and session.items:
                    self.note(f"conversation {session.chat.number}: {session.chat.title}")
                for item in session.items[keep:]:
                    self._show_item(item, keep)
            case TextAppended(item, text):
                self._show_more(item, item.text[: len(item.text) - len(text)])
            case Ended():
                self._show_end(event)
            case Loaded(notes=notes):
                for note in notes:
                    self.note(note)
            case LoadFailed(error):
                self._failed = True
                self.note(error)
            case ContextOverflow():
                self.note(commands.overflow_text(self, event))
                for number, one in enumerate(event.options, 1):
                    self.note(f"/drop {number} leaves out {commands.trim_text(one)}")
            case Notice(note, _, text):
                self.note(note + (f" (not sent: {text[:80]})" if text else ""))

    def _show_more(self, item: BranchMessage, before: str) -> None:
        """Write the text of an answer that is new; reasoning is one line."""
        thought, answer = parts(item.text)
        if item is not self._item:
            self._item, self._written = item, len(parts(before)[1])
        if thought and not self._written:
            if not answer:
                return
            self.note(summary(thought, thinking=False))
        self._write(clean(answer[self._written :]))
        self._written = len(answer)

    def _show_end(self, event: Ended) -> None:
        if event.item.text:
            self._write("\n")
        if event.error:
            self.note(event.error)
        elif event.result is None or event.result.stop_reason == "cancelled":
            self.note("stopped")
        elif event.result.stop_reason == "context":
            self.note("context full: /drop lists what can be left out, /new starts a new conversation")

    def _show_item(self, item: BranchMessage, keep: int) -> None:
        """A stored message; one that was just typed is on the screen already."""
        if item.places > 1:
            self.note(f"branch {item.place} of {item.places}")
        fresh = item is self.session.generating or item.state == "partial"
        if item.role == "user" and not (keep or len(self.session.items) <= 2):
            self._write(f"You: {clean(folded(item.text))}\n")
        elif item.role == "assistant" and item.text and not fresh:
            self._write(f"{clean(parts(item.text)[1])}\n")


def talk(
    session: Session,
    reopen: int | None = None,
    *,
    settings: Settings | None = None,
    opener: Callable[[str], ModelLoader] | None = None,
) -> int:
    """Chat on standard input and output. Returns the exit code."""
    prompts = sys.stdin.isatty()
    if prompts:
        with suppress(ImportError):  # the frozen program does without: readline's license is the GPL
            import readline  # noqa: F401 - gives `input` its line editing

    def read(prompt: str) -> str:
        return clean(input(prompt if prompts else ""))

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    return PlainChat(session, read, write, settings=settings, opener=opener).run(reopen)
