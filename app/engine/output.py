"""What an answer consists of, and where it ends: from tokens to text, reasoning and tool calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from edgespec.models.prompting.answer_parser import AnswerParser
from edgespec.models.prompting.call_forms import Syntax
from edgespec.models.prompting.output_events import OutputEvent, ReasoningPiece, TextPiece
from edgespec.models.prompting.reasoning import Thoughts
from edgespec.models.prompting.tool_calls import Tool
from edgespec.models.vocab import Vocabulary
from edgespec.text import TextStream

StopReason = Literal["end", "stop", "length", "context", "cancelled"]

_TAIL = 64  # tokens at the end of a prompt in which a mark may be open


@dataclass(frozen=True, slots=True)
class OutputForm:
    """What an answer may contain besides text: calls of `tools` in `syntax`, and reasoning.

    `opened` is the mark that the prompt has opened. `marks` are the texts of control tokens that separate the
    parts; as output they have no text.
    """

    syntax: Syntax | None = None
    tools: tuple[Tool, ...] = ()
    thoughts: Thoughts | None = None
    opened: str = ""
    marks: Mapping[int, str] = field(default_factory=dict)

    def parser(self) -> AnswerParser | None:
        """Return a parser for one answer, None for text alone."""
        if self.syntax is None and self.thoughts is None:
            return None
        return AnswerParser(self.syntax, self.thoughts, self.tools, self.opened)


PLAIN = OutputForm()


def marks_of(vocab: Vocabulary, syntax: Syntax | None, thoughts: Thoughts | None) -> dict[int, str]:
    """Return the control tokens of `vocab` in the marks of a model's family, with their texts."""
    texts = [
        *(syntax.texts() if syntax is not None else ()),
        *(thoughts.texts() if thoughts is not None else ()),
    ]
    tokens = {token for text in texts if text for token in vocab.tokenize(text, special=True)}
    return {token: vocab.text(token) for token in tokens if vocab.is_control(token)}


def opened_by(
    vocab: Vocabulary, prompt: Sequence[int], syntax: Syntax | None, thoughts: Thoughts | None
) -> str:
    """Return the mark of an answer's part that the end of `prompt` has opened, "" for none."""
    tail = "".join(
        vocab.text(token) if vocab.is_control(token) else vocab.detokenize([token])
        for token in prompt[-_TAIL:]
    )
    if thoughts is not None and (mark := thoughts.opened(tail)):
        return mark
    return syntax.trigger if syntax is not None and tail.endswith(syntax.trigger) else ""


class StopCriteria:
    """Checks the tokens of an answer as they become final: its parts, stop strings, end of generation.

    Stop strings end text; in reasoning and in calls they are ignored.
    """

    def __init__(
        self,
        is_end: Callable[[int], bool],
        piece: Callable[[int], bytes],
        stops: Sequence[str],
        form: OutputForm = PLAIN,
    ) -> None:
        self._is_end, self._piece = is_end, piece
        self._stops, self._marks, self._parser = stops, form.marks, form.parser()
        self._decoder = TextStream()
        self._text = TextStream(stops)
        self._events: list[OutputEvent] = []
        self._tokens: list[int] = []
        self._reasoning = 0
        self.reason: StopReason | None = None

    def __call__(self, token: int) -> bool:
        if self._is_end(token):
            self.reason = "end"
            return True
        self._tokens.append(token)
        if self._parser is None:
            self._text.push(self._piece(token))
        else:
            self._parse(self._parser, token)
        if self._text.stopped is not None:
            self.reason = "stop"
        return self.reason is not None

    @property
    def stopped_by(self) -> str | None:
        """The stop string that was generated."""
        return self._text.stopped

    def take(self) -> tuple[list[OutputEvent], list[int], int]:
        """Return what can no longer change, since the last call: parts, tokens, tokens of reasoning."""
        self._flush()
        taken = self._events, self._tokens, self._reasoning
        self._events, self._tokens, self._reasoning = [], [], 0
        return taken

    def finish(self, *, cut: bool) -> tuple[list[OutputEvent], list[int], int]:
        """Return the rest. `cut`: a limit ended the answer, not the model."""
        if self._parser is not None and self.reason != "stop":
            self._decoder.push(b"", final=True)
            self._add(self._parser.feed(self._decoder.take()))
            self._add(self._parser.finish(cut=cut))
            if self._text.stopped is not None:
                self.reason = "stop"
        self._text.push(b"", final=True)
        return self.take()

    def _parse(self, parser: AnswerParser, token: int) -> None:
        thought = parser.thinking
        mark = self._marks.get(token)
        self._decoder.push(self._piece(token) if mark is None else mark.encode())
        events = parser.feed(self._decoder.take())
        if thought or parser.thinking or any(isinstance(event, ReasoningPiece) for event in events):
            self._reasoning += 1
        self._add(events)

    def _add(self, events: Iterable[OutputEvent]) -> None:
        for event in events:
            if self._text.stopped is not None:
                return
            if isinstance(event, TextPiece):
                self._text.push(event.text.encode("utf-8", "replace"))
            else:  # text ends here, so what was held back cannot become a stop string
                self._text.push(b"", final=True)
                self._flush()
                self._text = TextStream(self._stops)
                self._events.append(event)

    def _flush(self) -> None:
        if text := self._text.take():
            self._events.append(TextPiece(text))
