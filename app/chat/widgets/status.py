"""What the chat's two lines of figures say, in the room there is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgespec.app.terminal import one_line

if TYPE_CHECKING:
    from edgespec.app.chat.session import Session

_BETWEEN = " · "


def fitted(parts: Sequence[tuple[int, str, str]], width: int) -> str:
    """As much of `parts` as fits into `width` characters.

    Each is (rank, in full, in short). What ranks lowest is shortened first, then left out.
    """
    texts = [full for _, full, _ in parts]
    order = sorted(range(len(parts)), key=lambda i: parts[i][0])
    for forms in ([brief for *_, brief in parts], [""] * len(parts)):
        for i in order:
            if len(_joined(texts)) > width:
                texts[i] = forms[i]
    return _joined(texts)


def _joined(texts: Sequence[str]) -> str:
    return _BETWEEN.join(filter(None, texts))


def figures(session: Session, width: int) -> str:
    """The state in words, the figures of the answer, and how full the context is."""
    state: str = session.state
    result = session.result
    if session.state == "loading":
        state = f"loading {session.share:.0%}"
    elif session.state == "writing" and result is not None and not result.tokens:
        state = "reading"  # the prompt
    parts = [(9, state, state)]
    if result is not None and result.tokens:
        speed, rounds = result.tokens_per_second, result.tokens_per_round
        parts.append((7, f"{speed:.1f} tokens/s", f"{speed:.1f} t/s"))
        if result.rounds:
            parts.append((4, f"{rounds:.1f}/round", f"{rounds:.1f}/r"))
            parts.append((5, f"{result.acceptance:.0%} accepted", f"{result.acceptance:.0%} acc"))
    if session.context:
        used = session.used
        if session.writing is not None and result is not None and result.prompt_tokens:
            used = result.prompt_tokens + len(result.tokens)
        percent = f"{used / session.context:.0%} full"
        parts.append((8, f"{used:,}/{session.context:,}", percent))
    return fitted(parts, width)


def machine(session: Session, width: int) -> str:
    """Mode and reason, battery, temperature: what is known of them."""
    engine = session.engine
    if engine is None:
        return ""
    parts: list[tuple[int, str, str]] = []
    if (reading := engine.reading) is not None:
        if reading.charge is not None:
            sign = "+" if reading.plugged else ""
            parts.append((5, f"battery {reading.charge:.0f}%{sign}", f"{reading.charge:.0f}%{sign}"))
        if reading.celsius is not None:
            parts.append((4, f"{reading.celsius:.0f} °C", f"{reading.celsius:.0f}°"))
    if (decision := engine.decision) is not None:
        said, room = f"{decision.mode}: {one_line(decision.reason)}", width - len(fitted(parts, width)) - 3
        brief = said if len(said) <= room else said[: max(room - 1, len(decision.mode))] + "…"
        parts.insert(0, (9, brief, decision.mode))
    return fitted(parts, width)
