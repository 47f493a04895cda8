"""The side of a chat that is in the engine's thread: loading, answering, counting."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

from edgespec.app.chat.messages import (
    BranchMessage,
    ChatEvent,
    ContextOverflow,
    Ended,
    Loaded,
    LoadFailed,
    Loading,
    Notice,
    TextAppended,
    TrimOption,
    told,
)
from edgespec.app.engine.worker import SerialWorker
from edgespec.app.terminal import one_line

if TYPE_CHECKING:  # these import numpy and llama.cpp
    from edgespec.app.chat.chat_model import ChatModel, TokenTrace
    from edgespec.app.engine.request import Request

ModelLoader = Callable[[Callable[[float], bool]], "ChatModel"]
"""Given `edgespec.core.Progress`. Named here in full: the module imports numpy."""
_LEAST_ROOM = 256  # tokens that must be left for an answer, or a quarter of a small context


class ModelWorker:
    """Owns the engine and its thread. What happens is told to `tell`, from that thread."""

    def __init__(self, tell: Callable[[ChatEvent], None]) -> None:
        self.engine: ChatModel | None = None  # others use only what the Protocol allows them
        self._tell = tell
        self._thread: SerialWorker | None = None
        self._closing = False

    def load(self, load: ModelLoader) -> None:
        """Load an engine in place of the one there is."""
        self._thread = self._thread or SerialWorker()
        self._thread.submit(self._free)
        self._thread.submit(lambda: self._load(load))

    def write(
        self, item: BranchMessage, system: str, since: int, request: Request, result: TokenTrace
    ) -> None:
        """Write the answer `item`. One that has text goes on from there."""
        messages = told(item, system, since)
        assert self._thread is not None
        self._thread.submit(lambda: self._write(item, messages, system, since, request, result))

    def offer(self, item: BranchMessage, system: str, since: int) -> bool:
        """Tell what could be left out of a conversation that ends with `item`, if anything could."""
        if self.engine is None or self._thread is None or not self._questions(item, since)[1:]:
            return False
        self._thread.submit(lambda: self._offer(item, system, since))
        return True

    def count(self, text: str) -> Future[int]:
        """Tokens of `text`, as soon as the engine has time to count them; cancelled if there is none."""
        future: Future[int] = Future()

        def job() -> None:
            if self.engine is None:
                future.cancel()
            elif future.set_running_or_notify_cancel():
                try:
                    future.set_result(self.engine.count(text))
                except Exception as error:  # noqa: BLE001 - a job must not raise
                    future.set_exception(error)

        assert self._thread is not None
        self._thread.submit(job)
        return future

    def forget(self, messages: list[dict[str, str]]) -> None:
        """A conversation was deleted."""

        def job() -> None:
            if self.engine is not None:
                with contextlib.suppress(Exception):  # a template may refuse what there was of it
                    self.engine.forget(messages)

        if self._thread is not None:
            self._thread.submit(job)

    def close(self) -> None:
        """Free the model. Waits a few seconds at most for what is under way."""
        self._closing = True
        if self._thread is not None:
            self._thread.submit(self._free)
            self._thread.close()

    # All below runs in the engine's thread. A job must not raise, and whatever went wrong is worth showing.

    def _load(self, load: ModelLoader) -> None:
        def progress(share: float) -> bool:
            self._tell(Loading(share))
            return not self._closing

        try:
            self.engine = engine = load(progress)
            self._tell(Loaded(engine.context_length, tuple(engine.notes)))
        except Exception as error:  # noqa: BLE001
            self._tell(LoadFailed(explain(error)))

    def _write(
        self,
        item: BranchMessage,
        messages: list[dict[str, str]],
        system: str,
        since: int,
        request: Request,
        result: TokenTrace,
    ) -> None:
        try:
            assert self.engine is not None
            request.prompt = self.engine.prompt(messages)
            tokens, context = len(request.prompt), self.engine.context_length
            full = context and tokens > context - min(_LEAST_ROOM, context // 4)
            if full and (offers := self._offers(item, system, since)):
                self._tell(ContextOverflow(item, tokens, offers))
                return
            for text in self.engine.answer(messages, request, result):
                self._tell(TextAppended(item, text))
            self._tell(Ended(item, result))
        except Exception as error:  # noqa: BLE001
            self._tell(Ended(item, error=explain(error)))

    def _offer(self, item: BranchMessage, system: str, since: int) -> None:
        try:
            assert self.engine is not None
            tokens = len(self.engine.prompt(told(item, system, since)))
            self._tell(ContextOverflow(item, tokens, self._offers(item, system, since)))
        except Exception as error:  # noqa: BLE001
            self._tell(Notice(explain(error), bad=True))

    @staticmethod
    def _questions(item: BranchMessage, since: int) -> list[int]:
        """The questions that the model is told, the last one with `item` among them."""
        questions: list[int] = []
        above: BranchMessage | None = item
        while above is not None and above.id >= since:
            if above.role == "user":
                questions.insert(0, above.id)
            above = above.parent
        return questions

    def _offers(self, item: BranchMessage, system: str, since: int) -> tuple[TrimOption, ...]:
        """What could be left out to make room: as little as helps, or all but the last question."""
        assert self.engine is not None
        engine, context = self.engine, self.engine.context_length
        questions = self._questions(item, since)

        def without(dropped: int) -> TrimOption:
            first = questions[dropped]
            return TrimOption(first, dropped, len(engine.prompt(told(item, system, first))))

        low, high = 1, len(questions) - 1  # the fewest that leave a quarter free are between them
        while low < high:
            middle = (low + high) // 2
            if without(middle).tokens <= context - context // 4:
                high = middle
            else:
                low = middle + 1
        wanted = sorted({low, len(questions) - 1}) if len(questions) > 1 else []
        return tuple(offer for offer in map(without, wanted) if not context or offer.tokens < context)

    def _free(self) -> None:
        if self.engine is not None:
            engine, self.engine = self.engine, None
            engine.close()


def explain(error: BaseException) -> str:
    """What went wrong, in one line for the user."""
    from edgespec.core import EdgespecError

    if isinstance(error, EdgespecError):
        return one_line(str(error))
    return one_line(f"Edgespec made a mistake, please report it: {type(error).__name__}: {error}")
