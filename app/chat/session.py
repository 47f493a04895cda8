"""Conversations with a model that may still be loading: the chat without a user interface.

Events of other threads wait in a queue until they are polled, so that a fast model cannot flood the screen
and no other thread touches it. A question is in the history before its answer starts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Literal, TypeVar

from edgespec.app.chat.events import (
    Changed,
    ChatEvent,
    ContextOverflow,
    Ended,
    EventQueue,
    Loaded,
    LoadFailed,
    Loading,
    Notice,
    TextAppended,
    TrimOption,
)
from edgespec.app.chat.history_worker import (
    AnswerRecorder,
    BranchSnapshot,
    HistoryJobs,
    HistoryWorker,
    append_question,
    snapshot,
)
from edgespec.app.chat.messages import SINCE, BranchMessage, Chat, merge_branch
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
SessionState = Literal["loading", "ready", "generating", "stopped", "failed"]

MODES: tuple[Mode, ...] = ("auto", "performance", "balanced", "saver")


class Session:
    """One conversation after another. To be used in one thread, which calls `poll` for events."""

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
        history: HistoryWorker | None = None,
    ) -> None:
        self.name = name
        self.state: SessionState = "loading"
        self.share, self.context, self.used = 0.0, 0, 0
        self.result: TokenTrace | None = None  # of the current answer, else of the last one
        self.sampling, self.max_tokens, self.mode = sampling, max_tokens, mode
        self.system, self.persona = system, persona  # of new conversations
        self.chat = Chat(None, system, persona)
        self.history = history or HistoryWorker()
        self._load = load
        self._waiting: deque[tuple[Chat, BranchMessage]] = deque()
        self._request: Request | None = None
        self.generating: BranchMessage | None = None  # the current answer
        self.overflow: ContextOverflow | None = None  # what could be left out of the conversation shown
        self._events = EventQueue()
        self._jobs = HistoryJobs(self.history, self._events.put)
        self._recorder = AnswerRecorder(self._jobs)
        self._model_worker = ModelWorker(self._events.put)
        self._closing = self._offering = False

    @property
    def items(self) -> list[BranchMessage]:
        """The messages shown."""
        return self.chat.items

    @property
    def quiet(self) -> bool:
        """Whether no event can happen until a method is called."""
        busy = self.state == "loading" or self._request or self._jobs.pending or self._offering
        return not busy and self._events.empty()

    @property
    def model(self) -> ChatModel | None:
        """None before the model is loaded."""
        return self._model_worker.model

    def next_mode(self) -> bool:
        """Switch to the next of the governor's modes. False without a governor."""
        if self.model is None or self.model.decision is None:
            return False
        self.mode = MODES[(MODES.index(self.mode) + 1) % len(MODES)]
        self.model.choose(self.mode)
        return True

    def start(self, load: bool = True) -> None:
        """Open the history, and start to load the model."""
        if load:
            self._model_worker.load(self._load)
        self._jobs.do(
            lambda _: None, lambda _: [Notice(self.history.note, error=True)] if self.history.note else []
        )

    def reload(self, load: ModelLoader, name: str) -> None:
        """Load another model, which answers the waiting questions."""
        if self._request is not None:
            self._request.cancel()
        self._load, self.name = load, name
        self.state, self.share, self.context, self.result = "loading", 0.0, 0, None
        self._model_worker.load(load)

    # --- conversations ---

    def new(self) -> None:
        """Stop the answer, and start a new conversation."""
        self.stop()
        self.used, self.result, self.overflow = 0, None, None
        self.chat = Chat(None, self.system, self.persona)
        self._events.put(Changed(0))

    def open(self, conversation: int, message: int | None = None) -> None:
        """Stop the answer, and show a conversation; with `message`, the branch of that message."""
        if conversation == self.chat.number and message in (None, *(item.id for item in self.items)):
            self._events.put(Changed(len(self.items), message))
            return
        self.stop()
        chat = Chat(conversation)

        def job(history: History) -> BranchSnapshot:
            if message is not None:
                history.switch(message)
            return snapshot(history, conversation)

        def then(branch: BranchSnapshot) -> list[ChatEvent]:
            self.chat, self.used, self.result, self.overflow = chat, 0, None, None
            return self._take(chat, branch, message)

        self._jobs.do(job, then)

    def open_last(self) -> None:
        """Show the conversation that was changed last, if there is one."""

        def then(found: list[Conversation]) -> list[ChatEvent]:
            last = max(found, key=lambda one: one.updated, default=None)
            if last is not None and not self.items:
                self.open(last.id)
            return []

        self._jobs.do(lambda history: history.conversations(200), then)

    def configure(self, *, system: str | None = None, persona: str | None = None) -> None:
        """Change the system prompt and persona of the conversation shown, if not None."""
        chat = self.chat
        chat.system = chat.system if system is None else system
        chat.persona = chat.persona if persona is None else persona
        self._configure(
            chat, lambda history, number: history.configure(number, system=system, persona=persona)
        )

    def drop(self, option: TrimOption | None) -> None:
        """Leave messages out of the prompt, and continue the answer. None: include all again."""
        chat, since = self.chat, option.since if option is not None else 0
        self.overflow = None

        def change(history: History, number: int) -> None:
            about = history.conversation(number)
            history.configure(number, sampling={**about.sampling, SINCE: since})

        self._configure(chat, change, self.resume if option is not None else lambda: None)

    def offer(self) -> bool:
        """Request a ContextOverflow with what could be left out of the prompt. False if nothing could."""
        last = self.items[-1] if self.items else None
        if last is None or self._request is not None or self.state == "loading":
            return False
        self._offering = self._model_worker.offer(last, self.chat.system, self.chat.since)
        return self._offering

    def apply(self, settings: Settings) -> None:
        """Use changed settings from the next answer and the next conversation on."""
        self.sampling, self.max_tokens = settings.sampling(), settings.max_tokens
        self.persona = settings.persona
        self.system = settings.prompt_of(settings.persona) if settings.persona else settings.system
        if settings.mode != self.mode and self.model is not None:
            self.model.choose(settings.mode)
        self.mode = settings.mode

    def _configure(
        self, chat: Chat, change: Callable[[History, int], None], after: Callable[[], object] = lambda: None
    ) -> None:
        """Change `chat` in the history, if it is there, then call `after`."""
        if chat.number is None:
            return

        def job(history: History) -> BranchSnapshot:
            assert chat.number is not None
            change(history, chat.number)
            return snapshot(history, chat.number)

        def then(branch: BranchSnapshot) -> list[ChatEvent]:
            events = self._take(chat, branch)
            after()
            return events

        self._jobs.do(job, then)

    # --- messages ---

    def send(self, text: str) -> None:
        """Store a question. It is answered once the model is loaded and has answered the ones before."""
        self._add(lambda history, number: append_question(history, number, text, "head"), text)

    def edit(self, item: BranchMessage, text: str) -> None:
        """Replace a question of the conversation, on a new branch."""
        self.stop()
        parent = item.parent.id if item.parent is not None else None
        self._add(lambda history, number: append_question(history, number, text, parent), text)

    def regenerate(self, item: BranchMessage | None = None) -> bool:
        """Generate an answer again (by default the last one) on a new branch. False without an answer."""
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
        """Continue the last answer of the branch. False if there is none, or one is being generated."""
        last = self.items[-1] if self.items else None
        if last is None or last.role != "assistant" or self._request is not None or self._waiting:
            return False
        last.error = ""
        self._waiting.append((self.chat, last))
        self._next()
        return True

    def switch(self, item: BranchMessage, step: int) -> bool:
        """Show the `step`-th next sibling of `item`. False if it has none."""
        chat = self.chat
        if item.places < 2:
            return False
        self.stop()

        def job(history: History) -> BranchSnapshot:
            siblings = history.siblings(item.id)
            history.switch(siblings[(siblings.index(item.id) + step) % len(siblings)])
            return snapshot(history, history.message(item.id).conversation)

        self._jobs.do(job, lambda branch: self._take(chat, branch))
        return True

    def last(self, role: str) -> BranchMessage | None:
        return next((item for item in reversed(self.items) if item.role == role), None)

    def stop(self) -> None:
        """Stop the current answer within one round, keep its text, and withdraw the waiting questions."""
        self._withdraw("")
        if self._request is not None:
            self._request.cancel()

    def count(self, text: str) -> Future[int]:
        """Count the tokens of `text` when the model is idle. Canceled if no model is loaded."""
        return self._model_worker.count(text)

    def forget(self, messages: list[dict[str, str]]) -> None:
        """Delete what the model stored on disk for a conversation of these messages."""
        self._model_worker.forget(messages)

    def close(self) -> None:
        """Stop the current answer, keep its text, and free the model. Waits a few seconds at most."""
        self._closing = True
        self.stop()
        self._model_worker.close()
        self.poll()
        self.history.close()

    # --- events ---

    def poll(self, wait: float = 0.0) -> list[ChatEvent]:
        """The events since the last call. Waits up to `wait` seconds for the first."""
        events = self._events.poll(wait)
        for event in events:
            self._apply(event)
        return events

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
                self._recorder.add(item)
            case Ended(item, result, error):
                self._finish(item, result, error)
            case ContextOverflow(item):
                self._offering = False
                self.overflow = event if item in self.items else None
                if item is self.generating:
                    self._request, self.generating, self.state = None, None, "stopped"
                    self._withdraw("")
                    self._jobs.do(lambda history: history.finish(item.id, "stopped"), lambda _: [])
            case Notice():
                self._offering = False

    def _finish(self, item: BranchMessage, result: TokenTrace | None, error: str) -> None:
        self._recorder.finish(item, result, error)
        if item is not self.generating:
            return
        self._request, self.generating = None, None
        cancelled = result is not None and result.stop_reason == "cancelled"
        self.state = "stopped" if cancelled and item in self.items else "ready"
        if result is not None and item in self.items:
            self.used = result.prompt_tokens + len(result.tokens)
        self._next()

    def _withdraw(self, error: str) -> None:
        while self._waiting:
            self._events.put(Ended(self._waiting.popleft()[1], error=error))

    def _add(self, job: Callable[[History, int], int], text: str = "") -> None:
        """Append to the conversation shown by `job`, and generate the answer whose id it returns."""
        chat = self.chat
        system, persona, model = chat.system, chat.persona, self.name

        def run(history: History) -> BranchSnapshot:
            if chat.number is None:
                chat.number = history.new(system=system, persona=persona, model=model).id
            return snapshot(history, chat.number, job(history, chat.number))

        self._jobs.do(run, lambda branch: self._take(chat, branch), text)

    def _take(self, chat: Chat, branch: BranchSnapshot, at: int | None = None) -> list[ChatEvent]:
        """Show a conversation as it is in the history after a change."""
        chat.about = branch.conversation
        chat.system, chat.persona = chat.about.system, chat.about.persona
        chat.items, keep = merge_branch(chat.items, branch.messages)
        for item in chat.items:
            if item.id == branch.answer:
                self._waiting.append((chat, item))
        if chat is not self.chat:  # the user has opened another one
            for one in [one for one in self._waiting if one[0] is chat]:
                self._waiting.remove(one)
                self._events.put(Ended(one[1]))
            return []
        self._next()
        return [Changed(keep, at)]

    def _next(self) -> None:
        if self.state == "failed":
            self._withdraw("no model is loaded: choose one with /model")
        elif self.state != "loading" and self._request is None and self._waiting and not self._closing:
            from edgespec.app.chat.chat_model import TokenTrace
            from edgespec.app.engine.request import Request
            from edgespec.sampling import Sampling

            chat, item = self._waiting.popleft()
            request = Request((), self.sampling or Sampling(), self.max_tokens)
            result = TokenTrace()
            self._request, self.generating, self.result, self.state = request, item, result, "generating"
            self._recorder.start()
            self._model_worker.answer(item, chat.system, chat.since, request, result)
