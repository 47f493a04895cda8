"""A conversation with a model that may still be loading: the terminal chat's domain.

Knows no widgets. What happens in the engine's thread waits in a queue until it is asked for, so that a fast
model cannot flood a screen and nothing of a screen is touched from another thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Literal, Protocol

from edgespec.app.terminal import one_line
from edgespec.app.worker import EngineThread

if TYPE_CHECKING:  # these import numpy and llama.cpp
    from edgespec.app.answer import Request, Result
    from edgespec.governor import Decision, Mode
    from edgespec.sampling import Sampling

State = Literal["loading", "ready", "writing", "stopped", "failed"]
Progress = Callable[[float], bool]
"""Hears fractions from 0 to 1, returns False to give up loading."""


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

    def choose(self, mode: Mode) -> Decision:
        """Change what the machine may give, from the next second on. Any thread may call this."""

    @property
    def decision(self) -> Decision:
        """What it gives at this moment, and why."""

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

    def __init__(
        self,
        load: Load,
        system: str | None,
        sampling: Sampling | None,
        max_tokens: int,
        mode: Mode = "auto",
    ) -> None:
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
        self._engine: ChatEngine | None = None  # of the engine's thread, but for `choose` and `decision`
        self.mode = mode
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

    @property
    def decision(self) -> Decision | None:
        """What the machine gives at this moment, None before the model is loaded."""
        return self._engine.decision if self._engine is not None else None

    def next_mode(self) -> Mode | None:
        """Go on to the next of the governor's modes and return it, None before the model is loaded."""
        if self._engine is None:
            return None
        order: tuple[Mode, ...] = ("auto", "performance", "balanced", "saver")
        self.mode = order[(order.index(self.mode) + 1) % len(order)]
        self._engine.choose(self.mode)
        return self.mode

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
            from edgespec.app.answer import Request
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
        from edgespec.app.answer import Result

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
