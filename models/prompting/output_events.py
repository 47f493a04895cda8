"""What an answer consists of: text, reasoning, and tool calls, in the pieces in which they arrive."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TextPiece:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningPiece:
    """More of what the model writes before its answer, for itself."""

    text: str


@dataclass(frozen=True, slots=True)
class Called:
    """The start of call number `index`."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the arguments of call number `index`, as JSON."""

    index: int
    text: str


OutputEvent = TextPiece | ReasoningPiece | Called | Arguments
