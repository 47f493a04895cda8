"""The chat's two lines of figures: title and machine above, model and speed below."""

from __future__ import annotations

from collections.abc import Sequence

from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.widgets import Label, ProgressBar

from edgespec.app.chat.session import Session
from edgespec.app.terminal import one_line

_BETWEEN = " · "


def fitted(parts: Sequence[tuple[int, str, str]], width: int) -> str:
    """Join as many of `parts` as fit into `width` characters.

    Each is (rank, full text, short text). Lowest ranks are shortened first, then left out.
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
    """The state, the figures of the answer, and the use of the context."""
    state: str = session.state
    result = session.result
    if session.state == "loading":
        state = f"loading {session.share:.0%}"
    elif session.state == "generating" and result is not None and not result.tokens:
        state = "prefill"
    parts = [(9, state, state)]
    if result is not None and result.tokens:
        speed, rounds = result.tokens_per_second, result.tokens_per_round
        parts.append((7, f"{speed:.1f} tokens/s", f"{speed:.1f} t/s"))
        if result.rounds:
            parts.append((4, f"{rounds:.1f}/round", f"{rounds:.1f}/r"))
            parts.append((5, f"{result.acceptance:.0%} accepted", f"{result.acceptance:.0%} acc"))
    if session.context:
        used = session.used
        if session.generating is not None and result is not None and result.prompt_tokens:
            used = result.prompt_tokens + len(result.tokens)
        percent = f"{used / session.context:.0%} full"
        parts.append((8, f"{used:,}/{session.context:,}", percent))
    return fitted(parts, width)


def machine(session: Session, width: int) -> str:
    """Mode with its reason, battery, temperature, as far as they are known."""
    model = session.model
    if model is None:
        return ""
    parts: list[tuple[int, str, str]] = []
    if (reading := model.reading) is not None:
        if reading.charge is not None:
            sign = "+" if reading.plugged else ""
            parts.append((5, f"battery {reading.charge:.0f}%{sign}", f"{reading.charge:.0f}%{sign}"))
        if reading.celsius is not None:
            parts.append((4, f"{reading.celsius:.0f} °C", f"{reading.celsius:.0f}°"))
    if (decision := model.decision) is not None:
        full, room = f"{decision.mode}: {one_line(decision.reason)}", width - len(fitted(parts, width)) - 3
        brief = full if len(full) <= room else full[: max(room - 1, len(decision.mode))] + "…"
        parts.insert(0, (9, brief, decision.mode))
    return fitted(parts, width)


class Header(Horizontal):
    """The conversation's title, and the state of the machine."""

    def __init__(self, session: Session) -> None:
        super().__init__(id="header")
        self._session = session
        self._title = Label("", id="head", markup=False)
        self._machine = Label("", id="machine", markup=False)

    def compose(self) -> ComposeResult:
        yield self._title
        yield self._machine

    def draw(self) -> None:
        chat = self._session.chat
        persona = f"[{one_line(chat.persona)}] " if chat.persona else ""
        _update(self._machine, machine(self._session, max(20, self.app.size.width - 28)))
        _update(self._title, persona + (one_line(chat.title) or "New conversation"))


class StatusBar(Horizontal):
    """The model, how far it is loaded or downloaded, and the figures of the answer."""

    def __init__(self, session: Session) -> None:
        super().__init__(id="status")
        self._session = session
        self._model = Label(one_line(session.name), id="name", markup=False)
        self._progress = ProgressBar(total=1.0, show_percentage=False, show_eta=False, id="loading")
        self._figures = Label("", id="state", markup=False)

    def compose(self) -> ComposeResult:
        yield self._model
        yield self._progress
        yield self._figures

    def draw(self) -> None:
        session = self._session
        name = one_line(session.name)
        _update(self._model, name)
        loading = session.state == "loading" and bool(name)
        if loading or self._progress.display:
            self._show_progress(loading, session.share)
        width = self.app.size.width
        room = width - min(len(name), width // 3) - 22 * loading - 5
        _update(self._figures, figures(session, max(20, room)))

    def draw_download(self, name: str, share: float) -> None:
        self._show_progress(True, share)
        self._figures.update(one_line(f"downloading {name} {share:.0%}"))

    def _show_progress(self, shown: bool, share: float) -> None:
        self._progress.display = shown
        self._progress.update(progress=share)


def _update(label: Label, text: str) -> None:
    """Change a label, if its text changes; with a layout of the screen only if its size depends on it."""
    if label.content != text:
        label.update(text, layout=label.styles.width is not None and label.styles.width.is_auto)
