"""The terminal chat's screen. Draws a `Session`, whose news it asks for 20 times a second; knows no models.

Nothing heavy is imported before the screen is there. Everything shown is cleaned; what the model reads is
what was written.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, ClassVar

from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore
from markdown_it.token import Token
from textual import events
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.message import Message
from textual.widgets import Label, Markdown, ProgressBar, Static, TextArea
from textual.widgets.markdown import MarkdownStream

from edgespec.app.session import Ended, Load, Loaded, LoadFailed, Session, Turn, Written
from edgespec.app.terminal import clean, one_line

if TYPE_CHECKING:  # these import numpy and llama.cpp
    from edgespec.governor import Mode
    from edgespec.sampling import Sampling

_FRAMES_PER_SECOND = 20


def _markdown() -> MarkdownIt:
    """A parser whose output is clean too: Markdown's own `&#x202e;` writes what was not in the source."""

    def scrub(state: StateCore) -> None:
        def walk(tokens: list[Token]) -> None:
            for token in tokens:
                token.content = clean(token.content)
                token.attrs = {k: one_line(v) if isinstance(v, str) else v for k, v in token.attrs.items()}
                walk(token.children or [])
                if token.type in ("fence", "code_block") and not token.info.strip():
                    token.info = "text"  # guessing the language at every new piece is far too slow

        walk(state.tokens)

    # Without html, since `<int>` and `<think>` would vanish from the screen with it.
    parser = MarkdownIt("gfm-like", {"html": False})
    parser.core.ruler.push("scrub", scrub)
    return parser


class MessageInput(TextArea):
    """Enter sends, other ways of Enter make a new line."""

    class Sent(Message):
        def __init__(self, text: str) -> None:
            super().__init__()
            self.text = text

    async def _on_key(self, event: events.Key) -> None:
        if event.key == "enter":
            event.prevent_default().stop()
            if self.text.strip():
                self.post_message(self.Sent(self.text.strip("\n")))
                self.clear()
        elif event.key in ("ctrl+j", "shift+enter", "alt+enter", "ctrl+enter"):
            event.prevent_default().stop()
            self.insert("\n")

    async def _on_paste(self, event: events.Paste) -> None:
        event.text = clean(event.text)  # TextArea's own handler runs next


class TurnView(Vertical):
    """A question, the answer as it grows, and a line if it did not end well."""

    def __init__(self, turn: Turn) -> None:
        super().__init__()
        self._turn = turn
        self._stream: MarkdownStream | None = None
        # Held, not looked up: the last news may come when the app is closing and the children are gone.
        self._answer = Markdown(parser_factory=_markdown, open_links=False)
        self._outcome = Static("", classes="outcome", markup=False)

    def compose(self) -> ComposeResult:
        yield Static(clean(self._turn.question), classes="question", markup=False)
        yield self._answer
        yield self._outcome

    async def write(self, text: str) -> None:
        if self._stream is None:
            self._stream = Markdown.get_stream(self._answer)
        await self._stream.write(clean(text))

    async def end(self, event: Ended) -> None:
        stopped = event.result is None or event.result.stop_reason == "cancelled"
        full = event.result is not None and event.result.stop_reason == "context"
        ending = "Stopped." if stopped else "The context is full: Ctrl+L begins anew." if full else ""
        self._outcome.update(clean(event.error) or ending)
        self._outcome.set_class(bool(event.error or ending), "-shown").set_class(bool(event.error), "-error")
        if self._stream is not None:
            await self._stream.stop()


class ChatApp(App[int]):
    """The chat screen. `load` is called in the engine's thread; `run()` returns the exit code."""

    CSS_PATH = "chat.tcss"
    ENABLE_COMMAND_PALETTE = False
    AUTO_FOCUS = "#input"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "stop", "Stop", priority=True),
        Binding("ctrl+l", "restart", "New conversation", priority=True),
        Binding("f3", "mode", "Mode", priority=True),
        Binding("pageup", "page(-1)", "Back", priority=True),
        Binding("pagedown", "page(1)", "Forth", priority=True),
    ]

    def __init__(
        self,
        load: Load,
        title: str,
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        max_tokens: int = 0,
        mode: Mode = "auto",
    ) -> None:
        super().__init__()
        self.title = one_line(title)
        self._session = Session(load, system, sampling, max_tokens, mode)
        self._views: dict[Turn, TurnView] = {}

    def compose(self) -> ComposeResult:
        yield VerticalScroll(id="conversation", can_focus=False)
        hint = "Enter sends · Ctrl+J new line · Esc stops · Ctrl+L new · Ctrl+Q quits"
        yield MessageInput(id="input", placeholder=hint, highlight_cursor_line=False)
        with Horizontal(id="status"):
            yield Label(self.title, id="name", markup=False)
            yield ProgressBar(total=1.0, show_percentage=False, show_eta=False, id="loading")
            yield Label("", id="state", markup=False)

    def on_mount(self) -> None:
        self._conversation = self.query_one("#conversation", VerticalScroll)
        self._bar, self._state = self.query_one("#loading", ProgressBar), self.query_one("#state", Label)
        self._conversation.anchor()
        self._show_status()
        self._clock = self.set_interval(1 / _FRAMES_PER_SECOND, self._tick)
        # Imports hold the interpreter, so they wait for the first frame.
        self.call_after_refresh(self._session.start)

    async def on_unmount(self) -> None:
        self._clock.stop()
        self._views.clear()
        await asyncio.to_thread(self._session.close)

    async def on_message_input_sent(self, message: MessageInput.Sent) -> None:
        turn = self._session.send(message.text)
        self._views[turn] = view = TurnView(turn)
        await self._conversation.mount(view)
        self._conversation.anchor()
        self._wake()

    def action_stop(self) -> None:
        self._session.stop()
        self._wake()

    async def action_restart(self) -> None:
        self._session.restart()
        self._views.clear()
        await self._conversation.remove_children()
        self._conversation.anchor()
        self._wake()

    def action_mode(self) -> None:
        self._session.next_mode()
        self._wake()

    def action_page(self, direction: int) -> None:
        scroll = self._conversation
        (scroll.scroll_page_up if direction < 0 else scroll.scroll_page_down)(animate=False)

    async def action_quit(self) -> None:
        self._session.stop()
        self.exit(0)

    def _wake(self) -> None:
        self._show_status()
        self._clock.resume()

    async def _tick(self) -> None:
        news = self._session.poll()
        for event in news:
            match event:
                case Written(turn, text) if turn in self._views:
                    await self._views[turn].write(text)
                case Ended(turn) if turn in self._views:
                    await self._views.pop(turn).end(event)
                case Loaded(notes=notes):
                    await self._tell("note", *notes)
                case LoadFailed(error):
                    await self._tell("error", f"{error} Nothing can be answered: Ctrl+Q quits.")
        if news:
            self._show_status()
        if self._session.quiet:
            self._clock.pause()

    async def _tell(self, kind: str, *lines: str) -> None:
        await self._conversation.mount_all(Static(one_line(x), classes=kind, markup=False) for x in lines)

    def _show_status(self) -> None:
        session = self._session
        self._bar.display = session.state == "loading"
        self._bar.update(progress=session.share)
        self._state.update(status(session))


def status(session: Session) -> str:
    """The state in words, and the figures of the last answer."""
    parts: list[str] = [session.state]
    if session.state == "loading":
        parts = [f"loading {session.share:.0%}"]
    if result := session.result:
        parts.append(f"{result.tokens_per_second:.1f} tokens/s")
        parts.append(f"{result.tokens_per_round:.1f}/round")
        parts.append(f"{result.acceptance:.0%} accepted")
    decision = session.decision
    if decision is not None and (decision.mode != "performance" or session.mode == "performance"):
        parts.append(f"{decision.mode}: {decision.reason}")
    if session.context:
        parts.append(f"{session.used}/{session.context}")
    return " · ".join(parts)
