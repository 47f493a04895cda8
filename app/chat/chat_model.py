"""The interface between a chat and the model that answers it, and its implementation by the local engine."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from edgespec.app.chat.thoughts import JoinedAnswer
from edgespec.app.engine.request import GenerationStats, Request, Step
from edgespec.core import Reading
from edgespec.grammar_drafting import GRAMMAR
from edgespec.machine.governor import Decision, Mode
from edgespec.models.prompting.output_events import ReasoningPiece, TextPiece

if TYPE_CHECKING:  # llama.cpp
    from edgespec.app.engine.engine import Engine
    from edgespec.app.history.rows import Sources

ChatMessage = dict[str, str]
"""`role` and `content`."""

TARGET, FORCED = "target", GRAMMAR


@dataclass(slots=True)
class TokenTrace(GenerationStats):
    """Statistics that record the source of each token. Other threads may read them during the generation.

    `spans` are (source, characters) of each token of the answer, `drafts` the number of draft tokens of each
    round, `speeds` the tokens per second of each round after the first. `piece` returns the bytes of a token;
    without it there are no spans.
    """

    piece: Callable[[int], bytes] | None = None
    spans: list[tuple[str, int]] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)
    _decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )

    def add(self, step: Step) -> None:
        GenerationStats.add(self, step)  # super() does not work in a class with slots made by dataclass
        if (round_ := step.round) is None:
            return
        self.drafts.append(len(round_.draft.tokens))
        if len(self.drafts) > 1:  # the first round includes the prefill
            self.speeds.append(len(round_.tokens) / max(round_.seconds, 1e-6))
        for i, token in enumerate(step.tokens if self.piece is not None else ()):
            source = round_.draft.sources[i] if i < round_.accepted else TARGET
            assert self.piece is not None
            self.spans.append((source, len(self._decoder.decode(self.piece(token)))))

    def sources(self) -> Sources:
        """The spans as the history stores them: consecutive tokens of one source in one run."""
        runs: list[tuple[str, list[int]]] = []
        for source, length in self.spans:
            if not runs or runs[-1][0] != source:
                runs.append((source, []))
            runs[-1][1].append(length)
        return runs


class ChatModel(Protocol):
    """A model that answers. To be called in its own thread, except for `choose`, `decision` and `reading`."""

    @property
    def notes(self) -> Sequence[str]:
        """Notes to show once."""

    @property
    def context_length(self) -> int:
        """In tokens, 0 if unknown."""

    def prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        """The token ids of a conversation, empty if a server counts them.

        If the last message is an answer, its generation continues from there.
        """

    def count(self, text: str) -> int:
        """The number of tokens of a text, possibly estimated."""

    def answer(self, messages: Sequence[ChatMessage], request: Request, result: TokenTrace) -> Iterator[str]:
        """Generate the answer to `messages`, whose `prompt` is in the request, as pieces of text.

        Ends soon after `request.cancel()`. Raises EdgespecError if the generation fails.
        """

    def choose(self, mode: Mode) -> Decision | None:
        """Change the governor's mode. Takes effect within a second. None without a governor."""

    @property
    def decision(self) -> Decision | None:
        """The governor's current decision, and its reason."""

    @property
    def reading(self) -> Reading | None:
        """The last reading of the machine's sensors."""

    def forget(self, messages: Sequence[ChatMessage]) -> None:
        """Delete what is stored on disk for a conversation that was deleted."""

    def close(self) -> None: ...


class LocalModel:
    """A model on this machine. Keeps KV-cache snapshots on disk for conversations that are opened again."""

    def __init__(self, engine: Engine, states: Path | None = None) -> None:
        """`states` is the folder of the snapshots, by default next to the history."""
        from edgespec.app.engine.constraints import ConstraintCompiler
        from edgespec.app.engine.prompt_cache import PromptCache
        from edgespec.app.history.store import data_folder

        self._engine = engine
        self._forms = ConstraintCompiler(engine.model.vocab, engine.model.chat_template)
        self._prompt_cache = engine.pool.snapshots = PromptCache(
            folder=states or data_folder() / "states", lasting=True
        )

    @property
    def notes(self) -> Sequence[str]:
        return self._engine.notes

    @property
    def context_length(self) -> int:
        return self._engine.context_length

    def prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        continues = bool(messages) and messages[-1]["role"] == "assistant"
        return self._engine.chat_prompt(messages, continues=continues)

    def count(self, text: str) -> int:
        return len(self._engine.model.vocab.tokenize(text))

    def answer(self, messages: Sequence[ChatMessage], request: Request, result: TokenTrace) -> Iterator[str]:
        result.piece = self._engine.model.vocab.piece
        request.form, joined = self._forms.form(request.prompt), JoinedAnswer()
        answering = self._engine.generate(request)
        for step in answering:
            stats = answering.stats
            result.prompt_tokens, result.cached_tokens = stats.prompt_tokens, stats.cached_tokens
            result.add(step)
            for event in step.events:
                if isinstance(event, ReasoningPiece):
                    yield joined.reasoning(event.text)
                elif isinstance(event, TextPiece):
                    yield joined.text(event.text)

    def choose(self, mode: Mode) -> Decision:
        return self._engine.choose(mode)

    @property
    def decision(self) -> Decision:
        return self._engine.decision

    @property
    def reading(self) -> Reading:
        return self._engine.resources.watch.latest()

    def forget(self, messages: Sequence[ChatMessage]) -> None:
        self._prompt_cache.forget(self.prompt(messages), self._engine.pool.slots[0])

    def close(self) -> None:
        self._prompt_cache.keep(self._engine.pool.slots[0])
        self._engine.close()
