"""The side of a chat that is in the engine's thread: loading, answering, counting."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

from edgespec.app.chat.items import (
    Ended,
    Event,
    Item,
    Loaded,
    LoadFailed,
    Loading,
    Offer,
    Outgrown,
    Told,
    Written,
    told,
)
from edgespec.app.terminal import one_line
from edgespec.app.worker import EngineThread

if TYPE_CHECKING:  # these import numpy and llama.cpp
    from edgespec.app.answer import Request
    from edgespec.app.chat.engine import ChatEngine, Traced

Progress = Callable[[float], bool]
"""Hears fractions from 0 to 1, returns False to give up loading."""
Load = Callable[[Progress], "ChatEngine"]
_LEAST_ROOM = 256  # tokens that must be left for an answer, or a quarter of a small context


class Writer:
    """Owns the engine and its thread. What happens is told to `tell`, from that thread."""

    def __init__(self, tell: Callable[[Event], None]) -> None:
        self.engine: ChatEngine | None = None  # others use only what the Protocol allows them
        self._tell = tell
        self._thread: EngineThread | None = None
        self._closing = False

    def load(self, load: Load) -> None:
        """Load an engine in place of the one there is."""
        self._thread = self._thread or EngineThread()
        self._thread.submit(self._free)
        self._thread.submit(lambda: self._load(load))

    def write(self, item: Item, system: str, since: int, request: Request, result: Traced) -> None:
        """Write the answer `item`. One that has text goes on from there."""
        messages = told(item, system, since)
        assert self._thread is not None
        self._thread.submit(lambda: self._write(item, messages, system, since, request, result))

    def offer(self, item: Item, system: str, since: int) -> bool:
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

    def _load(self, load: Load) -> None:
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
        item: Item,
        messages: list[dict[str, str]],
        system: str,
        since: int,
        request: Request,
        result: Traced,
    ) -> None:
        try:
            assert self.engine is not None
            request.prompt = self.engine.prompt(messages)
            tokens, context = len(request.prompt), self.engine.context_length
            full = context and tokens > context - min(_LEAST_ROOM, context // 4)
            if full and (offers := self._offers(item, system, since)):
                self._tell(Outgrown(item, tokens, offers))
                return
            for text in self.engine.answer(messages, request, result):
                self._tell(Written(item, text))
            self._tell(Ended(item, result))
        except Exception as error:  # noqa: BLE001
            self._tell(Ended(item, error=explain(error)))

    def _offer(self, item: Item, system: str, since: int) -> None:
        try:
            assert self.engine is not None
            tokens = len(self.engine.prompt(told(item, system, since)))
            self._tell(Outgrown(item, tokens, self._offers(item, system, since)))
        except Exception as error:  # noqa: BLE001
            self._tell(Told(explain(error), bad=True))

    @staticmethod
    def _questions(item: Item, since: int) -> list[int]:
        """The questions that the model is told, the last one with `item` among them."""
        questions: list[int] = []
        above: Item | None = item
        while above is not None and above.id >= since:
            if above.role == "user":
                questions.insert(0, above.id)
            above = above.parent
        return questions

    def _offers(self, item: Item, system: str, since: int) -> tuple[Offer, ...]:
        """What could be left out to make room: as little as helps, or all but the last question."""
        assert self.engine is not None
        engine, context = self.engine, self.engine.context_length
        questions = self._questions(item, since)

        def without(dropped: int) -> Offer:
            first = questions[dropped]
            return Offer(first, dropped, len(engine.prompt(told(item, system, first))))

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
