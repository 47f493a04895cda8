"""The terminal chat: a conversation with a model that may still be loading, and the screen it is shown on.

`Session` is the conversation and owns the engine's thread; it knows no widgets. `ChatApp` draws it and knows
no models: what happens in the engine's thread waits in a queue that the screen empties 20 times a second, so
that a fast model cannot flood it and no widget is touched from another thread. Nothing heavy is imported
before the screen is there. Everything shown is cleaned; what the model reads is what was written.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

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

from edgespec.app.terminal import clean, one_line
from edgespec.app.worker import EngineThread

if TYPE_CHECKING:  # these import numpy and llama.cpp
    from edgespec.app.engine import Request, Result
    from edgespec.sampling import Sampling

State = Literal["loading", "ready", "writing", "stopped", "failed"]
Progress = Callable[[float], bool]
"""Hears fractions from 0 to 1, returns False to give up loading."""

_FRAMES_PER_SECOND = 20


class Context(Protocol):
    """How much text the model can hold."""

    @property
    def context_length(self) -> int: ...


class ChatEngine(Protocol):
    """What a chat needs of an engine. All of it is called in the engine's thread."""

    @property
    def model(self) -> Context: ...

    @property
    def notes(self) -> Sequence[str]:
        """Sentences the user should read once."""

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> list[int]: ...

    def answer(self, request: Request, result: Result) -> Iterator[str]:
        """Pieces of text; ends soon after `request.cancel()`."""

    def close(self) -> None: ...


Load = Callable[[Progress], ChatEngine]


@dataclass(slots=True, eq=False)
class Turn:
    """A message of the user and what the model wrote to it so far."""

    question: str
    answer: str = ""


@dataclass(frozen=True, slots=True)
class Loading:
    share: float


@dataclass(frozen=True, slots=True)
class Loaded:
    context: int
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LoadFailed:
    error: str


@dataclass(frozen=True, slots=True)
class Written:
    turn: Turn
    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The turn is over: with a result, with an error, or withdrawn before it began."""

    turn: Turn
    result: Result | None = None
    error: str = ""


Event = Loading | Loaded | LoadFailed | Written | Ended


class Session:
    """One conversation after another with one model. To be used in one thread, which `poll`s for news.

    A turn without a word of answer (an error, or stopped before it began) is not told to the model again.
    """

    def __init__(self, load: Load, system: str | None, sampling: Sampling | None, max_tokens: int) -> None:
        self.state: State = "loading"
        self.share = 0.0
        self.context = self.used = 0
        self.result: Result | None = None
        self._load, self._system, self._sampling, self._max_tokens = load, system, sampling, max_tokens
        self._turns: list[Turn] = []
        self._waiting: deque[Turn] = deque()
        self._request: Request | None = None
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._thread: EngineThread | None = None
        self._engine: ChatEngine | None = None  # of the engine's thread
        self._closing = False

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation as the model gets it."""
        system = [{"role": "system", "content": self._system}] if self._system else []
        return system + [
            {"role": role, "content": text}
            for turn in self._turns
            if turn.answer
            for role, text in (("user", turn.question), ("assistant", turn.answer))
        ]

    @property
    def quiet(self) -> bool:
        """Nothing will happen until something is sent."""
        return self.state != "loading" and self._request is None and self._events.empty()

    def start(self) -> None:
        """Begin to load the model."""
        self._thread = EngineThread()
        self._thread.submit(self._run_load)

    def send(self, question: str) -> Turn:
        """Answer `question` as soon as the model is there and has answered what was sent before."""
        turn = Turn(question)
        self._waiting.append(turn)
        self._next()
        return turn

    def stop(self) -> None:
        """End the answer under way within one round, keep its text, and withdraw what waits behind it."""
        self._withdraw("")
        if self._request is not None:
            self._request.cancel()

    def restart(self) -> None:
        """Stop and forget the conversation."""
        self.stop()
        self._turns = []
        self.used, self.result = 0, None

    def close(self) -> None:
        """Give up what is under way and free the model. Waits a few seconds at most."""
        self._closing = True
        self.stop()
        if self._thread is not None:
            self._thread.submit(self._run_close)
            self._thread.close()

    def poll(self) -> list[Event]:
        """What happened since the last call, the text of a burst in one piece."""
        news: list[Event] = []
        while not self._events.empty():
            event = self._events.get_nowait()
            last = news[-1] if news else None
            if isinstance(event, Written) and isinstance(last, Written) and last.turn is event.turn:
                news[-1] = Written(event.turn, last.text + event.text)
            else:
                news.append(event)
        for event in news:
            self._apply(event)
        return news

    def _apply(self, event: Event) -> None:
        match event:
            case Loading(share):
                self.share = share
            case Loaded(context):
                self.state, self.context = "ready", context
                self._next()
            case LoadFailed():
                self.state = "failed"
                self._next()
            case Written(turn, text):
                turn.answer += text
            case Ended(turn, result) if turn in self._turns:
                self._request = None
                self.state = (
                    "stopped" if result is not None and result.stop_reason == "cancelled" else "ready"
                )
                if result is not None:
                    self.result, self.used = result, result.prompt_tokens + len(result.tokens)
                self._next()
            case Ended(_, result, error) if (
                result is not None or error
            ):  # of a conversation already forgotten
                self._request = None
                self.state = "ready" if self.state == "writing" else self.state
                self._next()

    def _withdraw(self, error: str) -> None:
        while self._waiting:
            self._events.put(Ended(self._waiting.popleft(), error=error))

    def _next(self) -> None:
        if self.state == "failed":
            self._withdraw("No model is loaded, so nothing can be answered.")
        elif self.state != "loading" and self._request is None and self._waiting:
            from edgespec.app.engine import Request
            from edgespec.sampling import Sampling

            assert self._thread is not None
            turn = self._waiting.popleft()
            messages = [*self.messages, {"role": "user", "content": turn.question}]
            self._turns.append(turn)
            request = Request((), self._sampling or Sampling(), self._max_tokens)
            self._request, self.state = request, "writing"
            self._thread.submit(lambda: self._run_answer(turn, messages, request))

    # The rest runs in the engine's thread. A job must not raise, and whatever went wrong is worth showing.

    def _run_load(self) -> None:
        def progress(share: float) -> bool:
            self._events.put(Loading(share))
            return not self._closing

        try:
            import edgespec.app.engine  # noqa: F401 - here, so that the screen need not wait for it

            self._engine = engine = self._load(progress)
            self._events.put(Loaded(engine.model.context_length, tuple(engine.notes)))
        except Exception as error:  # noqa: BLE001
            self._events.put(LoadFailed(_explain(error)))

    def _run_answer(self, turn: Turn, messages: list[dict[str, str]], request: Request) -> None:
        from edgespec.app.engine import Result

        result = Result()
        try:
            assert self._engine is not None
            request.prompt = self._engine.chat_prompt(messages)
            for text in self._engine.answer(request, result):
                self._events.put(Written(turn, text))
            self._events.put(Ended(turn, result))
        except Exception as error:  # noqa: BLE001
            self._events.put(Ended(turn, error=_explain(error)))

    def _run_close(self) -> None:
        if self._engine is not None:
            self._engine.close()


def _explain(error: Exception) -> str:
    from edgespec.core import EdgespecError

    if isinstance(error, EdgespecError):
        return one_line(str(error))
    return one_line(f"Edgespec made a mistake, please report it: {type(error).__name__}: {error}")


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

    def compose(self) -> ComposeResult:
        yield Static(clean(self._turn.question), classes="question", markup=False)
        yield Markdown(parser_factory=_markdown, open_links=False)
        yield Static("", classes="outcome", markup=False)

    async def write(self, text: str) -> None:
        if self._stream is None:
            self._stream = Markdown.get_stream(self.query_one(Markdown))
        await self._stream.write(clean(text))

    async def end(self, event: Ended) -> None:
        stopped = event.result is None or event.result.stop_reason == "cancelled"
        full = event.result is not None and event.result.stop_reason == "context"
        ending = "Stopped." if stopped else "The context is full: Ctrl+L begins anew." if full else ""
        outcome = self.query_one(".outcome", Static)
        outcome.update(clean(event.error) or ending)
        outcome.set_class(bool(event.error or ending), "-shown").set_class(bool(event.error), "-error")
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
    ) -> None:
        super().__init__()
        self.title = one_line(title)
        self._session = Session(load, system, sampling, max_tokens)
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
    if session.context:
        parts.append(f"{session.used}/{session.context}")
    return " · ".join(parts)
