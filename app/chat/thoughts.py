"""Reasoning within an answer's text: how the history stores it, and what is shown of it."""

from __future__ import annotations

_OPEN, _CLOSE = "<think>", "</think>"


class JoinedAnswer:
    """Joins the reasoning and the text of an answer to one text, in which `parts` finds both again."""

    def __init__(self) -> None:
        self._thinking = False

    def reasoning(self, text: str) -> str:
        """Return what more reasoning adds."""
        before, self._thinking = "" if self._thinking else f"{_OPEN}\n", True
        return before + text

    def text(self, text: str) -> str:
        """Return what more text adds."""
        before, self._thinking = f"\n{_CLOSE}\n\n" if self._thinking else "", False
        return before + text


def parts(text: str) -> tuple[str, str]:
    """Return the reasoning and the rest of an answer, of which more may follow."""
    if not text.startswith(_OPEN):
        return "", text
    thought, closed, rest = text.removeprefix(_OPEN).partition(_CLOSE)
    return thought.strip(), rest.lstrip("\n") if closed else ""


def summary(thought: str, thinking: bool) -> str:
    """Return the line shown in place of reasoning."""
    return f"{'thinking' if thinking else 'reasoning'}: {len(thought.split()):,} words"
