"""`edgespec chat --plain`: the same conversations line by line, for screen readers and plain terminals.

Nothing is drawn twice, no cursor moves, no colour. What is said of the chat begins with "- ".
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from edgespec.app.chat.attachments import find, folded, path_of, unfolded_question, with_files
from edgespec.app.chat.history_worker import delete_conversation
from edgespec.app.chat.messages import (
    BranchMessage,
    Changed,
    ContextOverflow,
    Ended,
    Loaded,
    LoadFailed,
    Notice,
    TextAppended,
)
from edgespec.app.chat.session import Session
from edgespec.app.console import on_ctrl_c
from edgespec.app.terminal import clean, one_line
from edgespec.core import EdgespecError

_HELP = """- Enter sends a line; after \\ at its end, the next one belongs to it. @path attaches a file.
- Ctrl+C stops the answer, Ctrl+D or /quit leaves.
- /new, /list, /search WORDS, /open NUMBER, /last, /rename TITLE, /pin, /delete, /undo,
- /again (another answer), /edit TEXT (the last question differently), /branch (the next one), /continue,
- /drop NUMBER (leave out what is offered), /export FILE, /import FILE, /help"""


class PlainChat:
    """Reads lines, writes lines. `read` raises EOFError at the end of the input."""

    def __init__(self, session: Session, read: Callable[[str], str], write: Callable[[str], object]) -> None:
        self._session, self._read, self._write = session, read, write
        self._outgrown: ContextOverflow | None = None
        self._failed = False

    def run(self, reopen: int | None = None) -> int:
        """Talk until the input ends. Returns the exit code."""
        session = self._session
        session.start()
        self._say("loading the model")
        try:
            if reopen:
                session.open(reopen)
            elif reopen == 0:
                session.open_last()
            self._follow()
            if self._failed:
                return 1
            self._say("ready. /help lists the commands.")
            while (text := self._message()) is not None:
                try:
                    if text.startswith("/") and not text.startswith("//"):
                        name, _, argument = text[1:].partition(" ")
                        if name == "quit":
                            break
                        self._command(name, argument.strip())
                    elif text.strip():
                        self._send(text.removeprefix("/"), session.send)
                except EdgespecError as error:
                    self._say(str(error))
                self._follow()
        finally:
            session.close()
        return 0

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

    def _send(self, text: str, send: Callable[[str], None]) -> None:
        files = find(text) if "@" in text else []
        for one in files:
            if one.error:
                raise EdgespecError(f"@{one.name} {one.error}")
            self._say(f"@{one.name} is attached: {len(one.text):,} characters")
        send(with_files(text, files))

    def _command(self, name: str, argument: str) -> None:
        session, number = self._session, self._session.chat.number
        match name:
            case "help":
                self._write(_HELP + "\n")
            case "new":
                session.new()
            case "list":
                for one in session.store.do(lambda h: h.conversations(50)).result():
                    self._say(f"{one.id}{' pinned' if one.pinned else ''}: {one.title}")
            case "search":
                for hit in session.store.do(lambda h: h.search(argument, 20)).result():
                    self._say(f"{hit.conversation}: {hit.title}: {hit.snippet}")
            case "open" if argument.isdecimal():
                session.open(int(argument))
            case "last":
                session.new()
                session.open_last()
            case "rename" if number is not None and argument:
                session.store.do(lambda h: h.rename(number, argument)).result()
            case "pin" if number is not None:
                pinned = session.store.do(lambda h: not h.conversation(number).pinned).result()
                session.store.do(lambda h: h.pin(number, pinned)).result()
                self._say("pinned" if pinned else "no longer pinned")
            case "delete" if number is not None:
                session.new()
                session.forget(session.store.do(lambda h: delete_conversation(h, number)).result())
                self._say("deleted; /undo brings it back")
            case "undo":
                deleted = session.store.do(lambda h: h.conversations(1, deleted=True)).result()
                for one in deleted:
                    session.store.do(lambda h, one=one: h.restore(one.id)).result()  # type: ignore[misc]
                    session.open(one.id)
            case "again":
                session.regenerate()
            case "edit" if (question := session.last("user")) is not None:
                if argument:
                    self._send(argument, lambda text: session.edit(question, text))
                else:
                    self._say(f"the last question: {unfolded_question(question.text)}")
            case "branch":
                forked = [item for item in session.items if item.places > 1]
                if not forked or not session.switch(forked[-1], 1):
                    self._say("there is one branch")
            case "continue":
                if not session.resume():
                    self._say("there is no stopped answer at the end")
            case "drop" if self._outgrown is not None and argument.isdecimal():
                offers, self._outgrown = self._outgrown.offers, None
                if 1 <= int(argument) <= len(offers):
                    session.drop(offers[int(argument) - 1])
            case "export" if number is not None and argument:
                self._export(number, path_of(argument))
            case "import" if argument:
                from edgespec.app.history import io as history_io

                text = history_io.read(path_of(argument))
                added = session.store.do(lambda h: history_io.from_json(h, text)).result()
                self._say(f"imported: {len(added)}")
            case _:
                self._say(f"nothing to do for /{name} {argument}: /help lists the commands")

    def _export(self, number: int, path: Path) -> None:
        from edgespec.app.history import io as history_io

        to_json = path.suffix == ".json"
        text = self._session.store.do(
            lambda h: history_io.to_json(h, [number]) if to_json else history_io.to_markdown(h, number)
        ).result()
        history_io.write(path, text)
        self._say(f"written to {path}")

    def _follow(self) -> None:
        """Write what happens until nothing more will."""
        session = self._session
        with on_ctrl_c(session.stop):
            while not session.quiet:
                for event in session.poll(0.1):
                    self._show(event)

    def _show(self, event: object) -> None:
        session = self._session
        match event:
            case Changed(keep):
                if not keep and session.items:
                    self._say(f"conversation {session.chat.number}: {session.chat.title}")
                for item in session.items[keep:]:
                    self._show_item(item, keep)
            case TextAppended(_, text):
                self._write(clean(text))
            case Ended(item, result, error):
                if item.text:
                    self._write("\n")
                if error:
                    self._say(error)
                elif result is None or result.stop_reason == "cancelled":
                    self._say("stopped")
                elif result.stop_reason == "context":
                    self._say("the context is full; /new begins anew")
            case Loaded(notes=notes):
                for note in notes:
                    self._say(note)
            case LoadFailed(error):
                self._failed = True
                self._say(error)
            case ContextOverflow(_, tokens, offers):
                self._outgrown = event
                self._say(f"the conversation has {tokens:,} tokens, the context holds {session.context:,}:")
                for n, one in enumerate(offers, 1):
                    self._say(f"/drop {n} leaves out the first {one.dropped:,} questions and answers")
            case Notice(note, _, text):
                self._say(note + (f" Not sent: {text[:80]}" if text else ""))

    def _show_item(self, item: BranchMessage, keep: int) -> None:
        """A message of the history; one just typed is on the screen already."""
        if item.places > 1:
            self._say(f"branch {item.place} of {item.places}")
        fresh = item is self._session.writing or item.state == "partial"
        if item.role == "user" and not (keep or len(self._session.items) <= 2):
            self._write(f"You: {clean(folded(item.text))}\n")
        elif item.role == "assistant" and item.text and not fresh:
            self._write(f"{clean(item.text)}\n")

    def _say(self, text: str) -> None:
        self._write(f"- {one_line(text)}\n")


def talk(session: Session, reopen: int | None = None) -> int:
    """Talk on standard input and output. Returns the exit code."""
    prompts = sys.stdin.isatty()
    if prompts:
        with suppress(ImportError):  # a frozen program goes without: the library's licence is the GPL
            import readline  # noqa: F401 - gives `input` its line editing

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    return PlainChat(session, lambda prompt: clean(input(prompt if prompts else "")), write).run(reopen)
