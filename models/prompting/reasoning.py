"""How model families mark their reasoning: a table of marks, and which of them a chat template shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Thoughts:
    """Reasoning is between `open` and `close`, before the answer or wherever a part of it may begin.

    `dropped` are other marks that are not text. With `headers`, an answer is a sequence of messages, each
    with a header up to `body` that shows what it is; `open` is then what the header of reasoning contains.
    """

    open: str
    close: str
    dropped: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    body: str = ""

    def texts(self) -> Iterator[str]:
        """Yield the literal texts of all marks."""
        yield from (self.open, self.close, self.body, *self.dropped, *self.headers)

    def opened(self, prompt: str) -> str:
        """Return the mark that the end of a prompt has opened, "" if it opens none."""
        end = prompt.rstrip()
        if self.headers:
            return next((one for one in self.headers if end.endswith(one)), "")
        return self.open if end.endswith(self.open.strip()) else ""


THINK = Thoughts("<think>", "</think>")
_ENDS = ("<|end|>", "<|eom|>", "<|call|>", "<|return|>")
HARMONY = Thoughts("analysis", "<|end|>", _ENDS, ("<|start|>assistant", "<|channel|>"), "<|message|>")
ADDRESSED = Thoughts("to=self", "<|eom|>", _ENDS, ("<|start|>assistant",), "<|message|>")

_MARKS: tuple[tuple[str, Thoughts], ...] = (
    ("<|channel|>analysis", HARMONY),
    ("to=self", ADDRESSED),
    ("<|channel>thought", Thoughts("<|channel>thought\n", "<channel|>")),
    ("[THINK]", Thoughts("[THINK]", "[/THINK]")),
    (
        "<|START_THINKING|>",
        Thoughts(
            "<|START_THINKING|>",
            "<|END_THINKING|>",
            ("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"),
        ),
    ),
    ("<seed:think>", Thoughts("<seed:think>", "</seed:think>")),
    ("<mm:think>", Thoughts("<mm:think>", "</mm:think>")),
    (":opensource", Thoughts("<think:opensource>", "</think:opensource>")),
    ("<|inner_prefix|>", Thoughts("<|inner_prefix|>", "<|inner_suffix|>")),
    (
        "<|open|>",
        Thoughts(
            "<|open|>think<|sep|>",
            "<|close|>think<|sep|>",
            ("<|open|>response<|sep|>", "<|close|>response<|sep|>", "<|close|>message<|sep|>"),
        ),
    ),
    ("<|think|>", Thoughts("<|think|>", "<|end|>", ("<|begin|>assistant", "<|content|>"))),
    ("[BEGIN FINAL RESPONSE]", Thoughts("Here are my reasoning steps:\n", "[BEGIN FINAL RESPONSE]")),
    ("<response></response>", Thoughts("<think>", "</think>", ("<response>", "</response>"))),
    ("<think>", THINK),
    ("</think>", THINK),
)
ALL_THOUGHTS: Sequence[Thoughts] = tuple(dict.fromkeys(thoughts for _, thoughts in _MARKS))
"""Every entry of the table, once."""


def thoughts_of(template: str | None) -> Thoughts | None:
    """Return how a chat template marks reasoning, None if it does not."""
    return next((thoughts for mark, thoughts in _MARKS if mark in (template or "")), None)
