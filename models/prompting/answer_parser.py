"""Separates an answer into text, reasoning and tool calls, as it is generated.

The parts are recognized by the marks of the model's family. Text is passed on at once, except for space
before a possible call and for what may be the start of a mark; no character of it is lost.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from edgespec.models.prompting.answer_text import AnswerText, Steps
from edgespec.models.prompting.call_forms import Syntax
from edgespec.models.prompting.call_reader import CallReader, NotACall
from edgespec.models.prompting.loose_calls import STARTS, LooseCalls
from edgespec.models.prompting.output_events import Arguments, OutputEvent, ReasoningPiece, TextPiece
from edgespec.models.prompting.reasoning import Thoughts
from edgespec.models.prompting.tool_calls import Tool

_CALLED = re.compile(r"\bto=functions\.([^\s<]+)")
_MOST_IN_HEADER = 300
_LEAST_OF_A_MARK = 4  # characters


class AnswerParser:
    """Parses one answer: `feed` its parts, then `finish`.

    `syntax` is that of calls of `tools`, None if there can be none; any name is a tool if `tools` is empty.
    `opened` is what the prompt has begun of the answer, such as <think>.
    """

    def __init__(
        self,
        syntax: Syntax | None,
        thoughts: Thoughts | None = None,
        tools: Sequence[Tool] = (),
        opened: str = "",
    ) -> None:
        self._source = AnswerText()
        self._syntax, self._thoughts = syntax, thoughts
        tools_by_name = {tool.name: tool.parameters for tool in tools}
        self._reader = CallReader(self._source, syntax, tools_by_name) if syntax is not None else None
        self._loose = LooseCalls(self._source, tools_by_name) if tools_by_name else None
        self._events: list[OutputEvent] = self._reader.events if self._reader is not None else []
        self._dropped = (*thoughts.dropped, *thoughts.headers) if thoughts is not None else ()
        self._dropped += (syntax.text,) if syntax is not None and syntax.text else ()
        self._marks = self._all_marks()
        self._pattern = re.compile("|".join(map(re.escape, self._marks)) or r"(?!)")
        self._spaces: list[str] = []  # held back: before a call they are dropped
        self._fresh = True  # nothing but space since the start or the last mark
        self._stripping = False  # space that follows a mark is dropped
        self.thinking = False
        self._steps = self._answer()
        if opened:
            self.feed(opened)

    def feed(self, text: str) -> list[OutputEvent]:
        """Return the events in `text`, the next part of the answer."""
        self._source.feed(text)
        next(self._steps, None)
        return self._take()

    def finish(self, *, cut: bool = False) -> list[OutputEvent]:
        """Return the last events. What only began like a call is text; it is dropped if a limit `cut` it."""
        self._source.end(cut)
        next(self._steps, None)
        return self._take()

    def _take(self) -> list[OutputEvent]:
        """Return the events since the last call, with adjacent pieces of one kind merged."""
        merged: list[OutputEvent] = []
        for event in self._events:
            last = merged[-1] if merged else None
            if isinstance(event, TextPiece) and isinstance(last, TextPiece):
                merged[-1] = TextPiece(last.text + event.text)
            elif isinstance(event, ReasoningPiece) and isinstance(last, ReasoningPiece):
                merged[-1] = ReasoningPiece(last.text + event.text)
            elif isinstance(event, Arguments) and isinstance(last, Arguments) and event.index == last.index:
                merged[-1] = Arguments(event.index, last.text + event.text)
            else:
                merged.append(event)
        self._events.clear()
        return merged

    def _all_marks(self) -> tuple[str, ...]:
        marks = [*self._dropped, *(self._reader.triggers if self._reader is not None else ())]
        if self._thoughts is not None and not self._thoughts.headers:
            marks.append(self._thoughts.open.strip())
        return tuple(sorted(set(marks), key=len, reverse=True))

    # The parts of an answer

    def _answer(self) -> Steps[None]:
        whole = True  # the answer may still be calls without marks
        while True:
            if self._fresh:
                self._source.hold()
                yield from self._source.spaces()
                self._spaces.append(self._source.release())
            mark = yield from self._source.one_of(self._marks)
            if not mark and self._fresh and whole:
                whole = False
                if (yield from self._alone((yield from self._source.peek()))):
                    continue
            if not mark:
                mark = yield from self._text()
            if not mark:
                return
            yield from self._marked(mark)

    def _alone(self, begins: str) -> Steps[bool]:
        """Read an answer that is nothing but calls, without the marks of the syntax. False if it is text."""
        if self._syntax is not None and self._syntax.alone and begins == "{":
            return (yield from self._calls(""))
        if not begins or begins not in STARTS or self._loose is None:
            return False
        self._source.hold()
        try:
            events = yield from self._loose.calls()
        except NotACall:
            self._source.rewind()
            return False
        self._source.release()
        self._events += events
        self._after_mark()
        return True

    def _text(self) -> Steps[str]:
        """Read and report text up to a mark, which is read and returned, "" at the end."""
        while text := (yield from self._source.before(self._pattern, self._marks)):
            self._say(text)
        mark = yield from self._source.one_of(self._marks)
        if not mark and self._source.unread:  # it was cut within a mark
            begun = self._begins_a_call()
            left = self._source.skip(len(self._source.unread))
            self._after_mark() if begun else self._say(left)
        if not mark and not self._stripping and (spaces := "".join(self._spaces)):
            self._events.append(TextPiece(spaces))
        return mark

    def _begins_a_call(self) -> bool:
        """Whether the end of a cut answer is the start of a mark that calls have, not chance."""
        left = self._source.unread
        triggers = self._reader.triggers if self._reader is not None else ()
        return len(left) >= _LEAST_OF_A_MARK and any(mark.startswith(left) for mark in triggers)

    def _say(self, text: str) -> None:
        """Report text; space at its end is held back where it may precede a call."""
        body = text.rstrip() if self._reader is not None else text
        if body:
            lead = "".join(self._spaces) + body
            self._events.append(TextPiece(lead.lstrip() if self._stripping else lead))
            self._spaces.clear()
            self._fresh = self._stripping = False
        self._spaces.append(text[len(body) :])

    def _after_mark(self) -> None:
        self._spaces.clear()
        self._fresh = self._stripping = True

    def _marked(self, mark: str) -> Steps[None]:
        """Read what `mark` begins."""
        thoughts = self._thoughts
        if thoughts is not None and mark in thoughts.headers:
            yield from self._message(mark, thoughts)
        elif mark in self._dropped:
            self._after_mark()
        elif thoughts is not None and mark == thoughts.open.strip():
            if self._fresh:
                yield from self._reasoning(thoughts.close)
            else:
                self._say(mark)
        else:
            yield from self._calls(mark)

    def _calls(self, mark: str) -> Steps[bool]:
        """Read the calls after `mark`; False if there are none, and what was read is text."""
        assert self._reader is not None
        self._source.hold(mark)
        try:
            rest = yield from self._reader.calls(mark)
        except NotACall:
            held = self._source.release()
            if mark and self._source.cut:
                self._source.skip(len(self._source.unread))
                self._after_mark()
            else:
                self._say(held)
            return False
        self._after_mark()
        if rest:
            self._say(rest)
        return True

    def _reasoning(self, close: str) -> Steps[None]:
        """Read reasoning up to `close`, without space at its ends."""
        self.thinking, started, spaces = True, False, list[str]()
        pattern = re.compile(re.escape(close))
        while text := (yield from self._source.before(pattern, [close])):
            text = text if started else text.lstrip()
            if body := text.rstrip():
                self._events.append(ReasoningPiece("".join(spaces) + body))
                spaces.clear()
                started = True
            spaces.append(text[len(body) :])
        yield from self._source.one_of([close])
        self.thinking = False
        self._after_mark()

    def _message(self, mark: str, thoughts: Thoughts) -> Steps[None]:
        """Read the header that `mark` begins, and what follows unless it is text."""
        self._source.hold(mark)
        header = yield from self._source.until(thoughts.body, _MOST_IN_HEADER)
        held = self._source.release()
        called = _CALLED.search(header or "") if self._syntax is not None and self._syntax.headers else None
        if header is None:
            self._say("" if self._source.cut else held)
        elif called is not None and self._reader is not None:
            self._source.hold()
            try:
                yield from self._reader.named(called[1], "")
            except NotACall:
                self._say(self._source.release())
            else:
                self._after_mark()
        elif thoughts.open in header:
            yield from self._reasoning(thoughts.close)
        else:
            self._after_mark()
