"""The part of a chat that runs in the thread of the model: load, answer, count tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

from edgespec.app.chat.events import (
    ChatEvent,
    ContextOverflow,
    Ended,
    Loaded,
    LoadFailed,
    Loading,
    Notice,
    TextAppended,
    TrimOption,
)
from edgespec.app.chat.messages import BranchMessage, model_messages
from edgespec.app.engine.worker import SerialWorker
from edgespec.app.terminal import one_line

if TYPE_CHECKING:  # these import numpy and llama.cpp
    from edgespec.app.chat.chat_model import ChatModel, TokenTrace
    from edgespec.app.engine.request import Request

ModelLoader = Callable[[Callable[[float], bool]], "ChatModel"]
"""Takes an `edgespec.core.Progress`, which is spelled out here since its module imports numpy."""
_LEAST_ROOM = 256  # tokens that must remain for an answer; of a small context, a quarter


class ModelWorker:
    """Owns the model and its thread, from which it passes events to `emit`."""

    def __init__(self, emit: Callable[[ChatEvent], None]) -> None:
        self.model: ChatModel | None = None  # other threads use only what ChatModel allows
        self._emit = emit
        self._thread: SerialWorker | None = None
        self._closing = False

    def load(self, load: ModelLoader) -> None:
        """Load a model in place of the current one."""
        self._thread = self._thread or SerialWorker()
        self._thread.submit(self._free)
        self._thread.submit(lambda: self._load(load))

    def answer(
        self, item: BranchMessage, system: str, since: int, request: Request, result: TokenTrace
    ) -> None:
        """Generate the answer `item`, continuing its text if it has some."""
        messages = model_messages(item, system, since)
        assert self._thread is not None
        self._thread.submit(lambda: self._answer(item, messages, system, since, request, result))

    def offer(self, item: BranchMessage, system: str, since: int) -> bool:
        """Emit a ContextOverflow with what could be left out of the conversation. False if nothing could."""
        if self.model is None or self._thread is None or not self._questions(item, since)[1:]:
            return False
        self._thread.submit(lambda: self._offer(item, system, since))
        return True

    def count(self, text: str) -> Future[int]:
        """Count the tokens of `text` when the model is idle. Canceled if no model is loaded."""
        future: Future[int] = Future()

        def job() -> None:
            if self.model is None:
                future.cancel()
            elif future.set_running_or_notify_cancel():
                try:
                    future.set_result(self.model.count(text))
                except Exception as error:  # noqa: BLE001 - a job must not raise
                    future.set_exception(error)

        assert self._thread is not None
        self._thread.submit(job)
        return future

    def forget(self, messages: list[dict[str, str]]) -> None:
        """Delete what the model stored for a conversation that was deleted."""

        def job() -> None:
            if self.model is not None:
                with contextlib.suppress(Exception):  # the template may reject the messages
                    self.model.forget(messages)

        if self._thread is not None:
            self._thread.submit(job)

    def close(self) -> None:
        """Free the model. Waits a few seconds at most for the current job."""
        self._closing = True
        if self._thread is not None:
            self._thread.submit(self._free)
            self._thread.close()

    # All methods below run in the thread of the model. A job must not raise; every error is shown.

    def _load(self, load: ModelLoader) -> None:
        def progress(share: float) -> bool:
            self._emit(Loading(share))
            return not self._closing

        try:
            self.model = model = load(progress)
            self._emit(Loaded(model.context_length, tuple(model.notes)))
        except Exception as error:  # noqa: BLE001
            self._emit(LoadFailed(explain(error)))

    def _answer(
        self,
        item: BranchMessage,
        messages: list[dict[str, str]],
        system: str,
        since: int,
        request: Request,
        result: TokenTrace,
    ) -> None:
        try:
            assert self.model is not None
            request.prompt = self.model.prompt(messages)
            tokens, context = len(request.prompt), self.model.context_length
            full = context and tokens > context - min(_LEAST_ROOM, context // 4)
            if full and (options := self._options(item, system, since)):
                self._emit(ContextOverflow(item, tokens, options))
                return
            for text in self.model.answer(messages, request, result):
                self._emit(TextAppended(item, text))
            self._emit(Ended(item, result))
        except Exception as error:  # noqa: BLE001
            self._emit(Ended(item, error=explain(error)))

    def _offer(self, item: BranchMessage, system: str, since: int) -> None:
        try:
            assert self.model is not None
            tokens = len(self.model.prompt(model_messages(item, system, since)))
            self._emit(ContextOverflow(item, tokens, self._options(item, system, since)))
        except Exception as error:  # noqa: BLE001
            self._emit(Notice(explain(error), error=True))

    @staticmethod
    def _questions(item: BranchMessage, since: int) -> list[int]:
        """The ids of the questions in the prompt that ends with `item`."""
        questions: list[int] = []
        above: BranchMessage | None = item
        while above is not None and above.id >= since:
            if above.role == "user":
                questions.insert(0, above.id)
            above = above.parent
        return questions

    def _options(self, item: BranchMessage, system: str, since: int) -> tuple[TrimOption, ...]:
        """Options to leave out: the fewest questions that free a quarter of the context, or all but one."""
        assert self.model is not None
        model, context = self.model, self.model.context_length
        questions = self._questions(item, since)

        def without(dropped: int) -> TrimOption:
            first = questions[dropped]
            return TrimOption(first, dropped, len(model.prompt(model_messages(item, system, first))))

        low, high = 1, len(questions) - 1  # binary search
        while low < high:
            middle = (low + high) // 2
            if without(middle).tokens <= context - context // 4:
                high = middle
            else:
                low = middle + 1
        wanted = sorted({low, len(questions) - 1}) if len(questions) > 1 else []
        return tuple(offer for offer in map(without, wanted) if not context or offer.tokens < context)

    def _free(self) -> None:
        if self.model is not None:
            model, self.model = self.model, None
            model.close()


def explain(error: BaseException) -> str:
    """Describe an error in one line for the user."""
    from edgespec.core import EdgespecError

    if isinstance(error, EdgespecError):
        return one_line(str(error))
    return one_line(f"internal error, please report it: {type(error).__name__}: {error}")
