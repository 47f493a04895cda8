"""Conversations with a model that may still be loading: the terminal chat's domain.

Knows no widgets. What happens in other threads waits in a queue until it is asked for, so that a fast model
cannot flood a screen and nothing of a screen is touched from another thread. What is shown as sent is in the
history before its answer begins.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from edgespec.app.chat.history_worker import HistoryWorker, Jobs, Kept, as_kept, ask
from edgespec.app.chat.messages import (
    SINCE,
    BranchMessage,
    Changed,
    Chat,
    ChatEvent,
    ContextOverflow,
    Ended,
    Loaded,
    LoadFailed,
    Loading,
    Notice,
    TextAppended,
    TrimOption,
    figures,
    joined,
    merged,
)
from edgespec.app.chat.model_worker import ModelLoader, ModelWorker

if TYPE_CHECKING:  # these import numpy and llama.cpp
    from edgespec.app.chat.chat_model import ChatModel, TokenTrace
    from edgespec.app.engine.request import Request
    from edgespec.app.history.rows import Conversation
    from edgespec.app.history.store import History
    from edgespec.app.settings import Settings
    from edgespec.machine.governor import Mode
    from edgespec.sampling import Sampling

T = TypeVar("T")
SessionState = Literal["loading", "ready", "writing", "stopped", "failed"]

MODES: tuple[Mode, ...] = ("auto", "performance", "balanced", "saver")
_CHECKPOINT = 0.25  # seconds of an answer that a kill may cost


class Session:
    """One conversation after another. To be used in one thread, which `poll`s for news."""

    def __init__(
        self,
        load: ModelLoader,
        name: str = "",
        *,
        system: str = "",
        persona: str = "",
        sampling: Sampling | None = None,
        max_tokens: int = 0,
        mode: Mode = "auto",
        store: HistoryWorker | None = None,
    ) -> None:
        self.name = name
        self.state: SessionState = "loading"
        self.share, self.context, self.used = 0.0, 0, 0
        self.result: TokenTrace | None = None  # of the answer under way, else of the last one
        self.sampling, self.max_tokens, self.mode = sampling, max_tokens, mode
        self.system, self.persona = system, persona  # of new conversations
        self.chat = Chat(None, system, persona)
        self.store = store or HistoryWorker()
        self._load = load
        self._waiting: deque[tuple[Chat, BranchMessage]] = deque()
        self._request: Request | None = None
        self.writing: BranchMessage | None = None  # the answer under way
        self._checked = 0.0
        self._events: SimpleQueue[ChatEvent | Callable[[], list[ChatEvent]]] = SimpleQueue()
        self._jobs = Jobs(self.store, self._events.put)
        self._writer = ModelWorker(self._events.put)
        self._closing = self._offering = False

    @property
    def items(self) -> list[BranchMessage]:
        """The messages shown."""
        return self.chat.items

    @property
    def quiet(self) -> bool:
        """Nothing will happen until something is asked for."""
        busy = self.state == "loading" or self._request or self._jobs.pending or self._offering
        return not busy and self._events.empty()

    @property
    def engine(self) -> ChatModel | None:
        """None before the model is loaded."""
        return self._writer.engine

    def next_mode(self) -> None:
        """Go on to the next of the governor's modes, if there is a governor."""
        if self.engine is not None and self.engine.decision is not None:
            self.mode = MODES[(MODES.index(self.mode) + 1) % len(MODES)]
            self.engine.choose(self.mode)

    def start(self, load: bool = True) -> None:
        """Open the history, and begin to load the model."""
        if load:
            self._writer.load(self._load)
        self._jobs.do(
            lambda _: None, lambda _: [Notice(self.store.note, bad=True)] if self.store.note else []
        )

    def reload(self, load: ModelLoader, name: str) -> None:
        """Go on with another model, which answers what waits."""
        if self._request is not None:
            self._request.cancel()
        self._load, self.name = load, name
        self.state, self.share, self.context, self.result = "loading", 0.0, 0, None
        self._writer.load(load)

    # --- conversations ---

    def new(self) -> None:
        """Stop, and begin a conversation."""
        self.stop()
        self.used, self.result = 0, None
        self.chat = Chat(None, self.system, self.persona)
        self._events.put(Changed(0))

    def open(self, conversation: int, message: int | None = None) -> None:
        """Stop, and show a conversation of the history; with `message`, the branch it is on."""
        if conversation == self.chat.number and message in (None, *(item.id for item in self.items)):
            self._events.put(Changed(len(self.items), message))
            return
        self.stop()
        chat = Chat(conversation)

        def job(history: History) -> Kept:
            if message is not None:
                history.switch(message)
            return as_kept(history, conversation)

        def then(kept: Kept) -> list[ChatEvent]:
            self.chat, self.used, self.result = chat, 0, None
            return self._take(chat, kept, message)

        self._jobs.do(job, then)

    def open_last(self) -> None:
        """Show the conversation that was written to last, if there is one."""

        def then(found: list[Conversation]) -> list[ChatEvent]:
            last = max(found, key=lambda one: one.updated, default=None)
            if last is not None and not self.items:
                self.open(last.id)
            return []

        self._jobs.do(lambda history: history.conversations(200), then)

    def configure(self, *, system: str | None = None, persona: str | None = None) -> None:
        """Change the settings of the conversation shown."""
        chat = self.chat
        chat.system = chat.system if system is None else system
        chat.persona = chat.persona if persona is None else persona
        self._settle(chat, lambda history, number: history.configure(number, system=system, persona=persona))

    def drop(self, offer: TrimOption | None) -> None:
        """Tell the model no more of the conversation shown than from `offer` on (None: all), and go on."""
        chat, since = self.chat, offer.since if offer is not None else 0

        def change(history: History, number: int) -> None:
            about = history.conversation(number)
            history.configure(number, sampling={**about.sampling, SINCE: since})

        self._settle(chat, change, self.resume if offer is not None else lambda: None)

    def offer(self) -> bool:
        """Have `Outgrown` tell what of the conversation shown could be left out."""
        last = self.items[-1] if self.items else None
        if last is None or self._request is not None or self.state == "loading":
            return False
        self._offering = self._writer.offer(last, self.chat.system, self.chat.since)
        return self._offering

    def apply(self, settings: Settings) -> None:
        """Let changed settings hold from the next answer and the next conversation on."""
        self.sampling, self.max_tokens = settings.sampling(), settings.max_tokens
        self.persona = settings.persona
        self.system = settings.prompt_of(settings.persona) if settings.persona else settings.system
        if settings.mode != self.mode and self.engine is not None:
            self.engine.choose(settings.mode)
        self.mode = settings.mode

    def _settle(
        self, chat: Chat, change: Callable[[History, int], None], after: Callable[[], object] = lambda: None
    ) -> None:
        """Change what is kept of `chat`, if anything is, then do `after`."""
        if chat.number is None:
            return

        def job(history: History) -> Kept:
            assert chat.number is not None
            change(history, chat.number)
            return as_kept(history, chat.number)

        def then(kept: Kept) -> list[ChatEvent]:
            news = self._take(chat, kept)
            after()
            return news

        self._jobs.do(job, then)

    # --- messages ---

    def send(self, text: str) -> None:
        """Keep a question, and answer it once the model is there and has answered what was sent before."""
        self._add(lambda history, number: ask(history, number, text, "head"), text)

    def edit(self, item: BranchMessage, text: str) -> None:
        """Ask a question of the conversation differently, on a branch of its own."""
        self.stop()
        parent = item.parent.id if item.parent is not None else None
        self._add(lambda history, number: ask(history, number, text, parent), text)

    def regenerate(self, item: BranchMessage | None = None) -> bool:
        """Write an answer again, the last one if none is given, on a branch of its own."""
        answer = item or self.last("assistant")
        if answer is None or answer.parent is None:
            return False
        question = answer.parent.id
        self.stop()
        self._add(
            lambda history, number: history.append(number, "assistant", parent=question, state="partial").id
        )
        return True

    def resume(self) -> bool:
        """Go on with an answer at the end of the branch that was stopped or ran out of room."""
        last = self.items[-1] if self.items else None
        if last is None or last.role != "assistant" or self._request is not None or self._waiting:
            return False
        last.error = ""
        self._waiting.append((self.chat, last))
        self._next()
        return True

    def switch(self, item: BranchMessage, step: int) -> bool:
        """Show the branch beside `item`, `step` further."""
        chat = self.chat
        if item.places < 2:
            return False
        self.stop()

        def job(history: History) -> Kept:
            beside = history.siblings(item.id)
            history.switch(beside[(beside.index(item.id) + step) % len(beside)])
            return as_kept(history, history.message(item.id).conversation)

        self._jobs.do(job, lambda kept: self._take(chat, kept))
        return True

    def last(self, role: str) -> BranchMessage | None:
        return next((item for item in reversed(self.items) if item.role == role), None)

    def stop(self) -> None:
        """End the answer under way within one round, keep its text, and withdraw what waits behind it."""
        self._withdraw("")
        if self._request is not None:
            self._request.cancel()

    def count(self, text: str) -> Future[int]:
        """Tokens of `text`, as soon as the engine has time to count them."""
        return self._writer.count(text)

    def forget(self, messages: list[dict[str, str]]) -> None:
        """A conversation of these messages was deleted: nothing that was read of it stays on disk."""
        self._writer.forget(messages)

    def close(self) -> None:
        """Give up what is under way, keep its text, and free the model. Waits a few seconds at most."""
        self._closing = True
        self.stop()
        self._writer.close()
        self.poll()
        self.store.close()

    # --- news ---

    def poll(self, wait: float = 0.0) -> list[ChatEvent]:
        """What happened since the last call, the text of a burst in one piece. Waits for it if asked to."""
        happened: list[ChatEvent] = []
        try:
            first = self._events.get(timeout=wait) if wait else self._events.get_nowait()
            happened += first() if callable(first) else [first]
        except Empty:
            pass
        while not self._events.empty():
            one = self._events.get_nowait()
            happened += one() if callable(one) else [one]
        news = joined(happened)
        for event in news:
            self._apply(event)
        return news

    def _apply(self, event: ChatEvent) -> None:
        match event:
            case Loading(share):
                self.share = share
            case Loaded(context):
                self.state, self.context = "ready", context
                self._next()
            case LoadFailed():
                self.state = "failed"
                self._next()
            case TextAppended(item, text):
                item.text += text
                if monotonic() - self._checked > _CHECKPOINT:
                    self._checkpoint(item)
            case Ended(item, result, error):
                self._finish(item, result, error)
            case ContextOverflow(item):
                self._offering = False
                if item is self.writing:
                    self._request, self.writing, self.state = None, None, "stopped"
                    self._withdraw("")
                    self._jobs.do(lambda history: history.finish(item.id, "stopped"), lambda _: [])
            case Notice():
                self._offering = False

    def _finish(self, item: BranchMessage, result: Any, error: str) -> None:
        complete = result is not None and result.stop_reason in ("end", "stop", "length")
        item.error, item.state = error, "complete" if complete else "stopped"
        self._checkpoint(item)
        state: Literal["complete", "stopped"] = "complete" if complete else "stopped"
        number, stats, sources = item.id, None, None
        if result is not None:
            item.stats = stats = figures(result)
            item.sources = sources = [*item.sources, *result.sources()]
        self._jobs.do(lambda db: db.finish(number, state, stats=stats, sources=sources), lambda _: [])
        if item is not self.writing:
            return
        self._request, self.writing = None, None
        cancelled = result is not None and result.stop_reason == "cancelled"
        self.state = "stopped" if cancelled and item in self.items else "ready"
        if result is not None and item in self.items:
            self.used = result.prompt_tokens + len(result.tokens)
        self._next()

    def _checkpoint(self, item: BranchMessage) -> None:
        """Keep what came of an answer since the last time."""
        self._checked = monotonic()
        more, number = item.text[item.kept :], item.id
        if more:
            item.kept = len(item.text)
            self._jobs.do(lambda history: history.append_text(number, more), lambda _: [])

    def _withdraw(self, error: str) -> None:
        while self._waiting:
            self._events.put(Ended(self._waiting.popleft()[1], error=error))

    def _add(self, job: Callable[[History, int], int], text: str = "") -> None:
        """Append by `job` to the conversation shown, and write the answer whose number it returns."""
        chat = self.chat
        system, persona, model = chat.system, chat.persona, self.name

        def run(history: History) -> Kept:
            if chat.number is None:
                chat.number = history.new(system=system, persona=persona, model=model).id
            return as_kept(history, chat.number, job(history, chat.number))

        self._jobs.do(run, lambda kept: self._take(chat, kept), text)

    def _take(self, chat: Chat, kept: Kept, at: int | None = None) -> list[ChatEvent]:
        """Show what a change left in the history."""
        chat.about, branch, answer = kept
        chat.system, chat.persona = chat.about.system, chat.about.persona
        chat.items, keep = merged(chat.items, branch)
        for item in chat.items:
            if item.id == answer:
                self._waiting.append((chat, item))
        if chat is not self.chat:  # the user went on to another one meanwhile
            for one in [one for one in self._waiting if one[0] is chat]:
                self._waiting.remove(one)
                self._events.put(Ended(one[1]))
            return []
        self._next()
        return [Changed(keep, at)]

    def _next(self) -> None:
        if self.state == "failed":
            self._withdraw("No model is loaded, so nothing can be answered.")
        elif self.state != "loading" and self._request is None and self._waiting and not self._closing:
            from edgespec.app.chat.chat_model import TokenTrace
            from edgespec.app.engine.request import Request
            from edgespec.sampling import Sampling

            chat, item = self._waiting.popleft()
            request = Request((), self.sampling or Sampling(), self.max_tokens)
            result = TokenTrace()
            self._request, self.writing, self.result, self.state = request, item, result, "writing"
            self._checked = monotonic()
            self._writer.write(item, chat.system, chat.since, request, result)
