"""The engine panel: speed, draft lengths, temperature, and the source of each token."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.widgets import Label, Static

from edgespec.app.terminal import clean

if TYPE_CHECKING:
    from edgespec.app.chat.session import Session

_SAMPLES = 240
_SHOWN = 1200  # characters of the answer
_HEIGHT = 2  # lines of a plot
_COOL = 20.0  # °C at the bottom of its plot
_BARS = " ▁▂▃▄▅▆▇█"
# Distinguishable without color, too.
STYLES = {
    "target": "",
    "suffix": "$text-success underline",
    "corpus": "$text-primary underline",
    "model": "$text-error italic",
    "grammar": "$text-warning reverse",
}
_WORDS = {
    "target": "target",
    "suffix": "repeated text",
    "corpus": "corpus",
    "model": "draft model",
    "grammar": "grammar",
}


class EnginePanel(Vertical):
    """Drawn from a session four times per second while it is open."""

    def __init__(self, session: Session) -> None:
        super().__init__(id="engine")
        self._session = session
        self._heat: deque[float] = deque(maxlen=_SAMPLES)
        self._drawn: tuple[int, int, int] | None = None

    def compose(self) -> ComposeResult:
        with Horizontal(id="plots"):
            for name in ("speed", "draft", "heat"):
                with Vertical(classes="plot"):
                    yield Label("", id=f"{name}-label", markup=False)
                    yield Static("", id=f"{name}-plot", classes="bars", markup=False)
        yield Static(legend(), id="legend")
        yield Static("", id="tokens")

    def on_mount(self) -> None:
        self.set_interval(0.25, self.draw)
        self.set_interval(1.0, self._sample_heat)
        self.draw(force=True)

    def on_resize(self) -> None:
        self.draw(force=True)

    def draw(self, force: bool = False) -> None:
        """Draw the current answer, or the last one, if it has changed or `force`."""
        result = self._session.result
        item = self._session.generating or self._session.last("assistant")
        rounds = len(result.drafts) if result is not None else 0
        state = (id(result), rounds, len(item.text) if item is not None else 0)
        if not self.display or (state == self._drawn and not force):
            return
        self._drawn = state
        speeds = result.speeds[-_SAMPLES:] if result is not None else []
        drafts = [float(n) for n in result.drafts[-_SAMPLES:]] if result is not None else []
        self._plot("speed", "{:.0f} tokens/s", speeds)
        self._plot("draft", "draft length {:.0f}", drafts)
        self._plot("heat", "{:.0f} °C", self._heat, _COOL)
        text = Content("no answer yet")
        if item is not None and result is not None and result.spans:
            spans = list(result.spans)
            text = colored(item.text[len(item.text) - _described(spans, item.text) :], spans)
        elif item is not None and item.sources:
            text = colored(item.text, [(source, n) for source, lengths in item.sources for n in lengths])
        elif item is not None:
            text = Content("the sources of this answer's tokens are unknown")
        tokens = self.query_one("#tokens", Static)
        tokens.update(last_lines(text, tokens.size.width, tokens.size.height), layout=False)

    def _sample_heat(self) -> None:
        model = self._session.model
        reading = model.reading if model is not None else None
        if reading is not None and reading.celsius is not None:
            self._heat.append(reading.celsius)
            if self.display:
                self._plot("heat", "{:.0f} °C", self._heat, _COOL)

    def _plot(self, name: str, form: str, values: Sequence[float], bottom: float = 0.0) -> None:
        now = f"{form.format(values[-1])} · max {max(values):.0f}" if values else form.replace("{:.0f}", "no")
        plot = self.query_one(f"#{name}-plot", Static)
        self.query_one(f"#{name}-label", Label).update(now, layout=False)
        plot.update(bars(list(values)[-max(1, plot.size.width) :], bottom), layout=False)


def bars(values: Sequence[float], bottom: float = 0.0) -> str:
    """Two lines of bars from `bottom` to the largest of `values`, one per column."""
    most = max(max(values, default=bottom) - bottom, 1e-9)
    heights = [max(1, round((value - bottom) / most * 8 * _HEIGHT)) for value in values]
    lines = range(8 * (_HEIGHT - 1), -1, -8)
    return "\n".join("".join(_BARS[min(8, max(0, height - below))] for height in heights) for below in lines)


def _described(spans: Sequence[tuple[str, int]], text: str) -> int:
    """Characters at the end of `text` that `spans` describe: a continued answer has earlier ones."""
    return min(sum(length for _, length in spans), len(text))


def colored(text: str, spans: Sequence[tuple[str, int]]) -> Content:
    """The last `_SHOWN` characters of `text` or more, from the start of a line, each token in its style."""
    parts: list[tuple[str, str]] = []
    at, skip = 0, max(0, len(text) - _SHOWN)
    if (line := text.rfind("\n", max(0, skip - _SHOWN), skip) + 1) > 0:
        skip = line
    for source, length in spans:
        if at + length > skip:
            parts.append((clean(text[max(at, skip) : at + length]), STYLES.get(source, "reverse")))
        at += length
    return Content.assemble(*parts)


def last_lines(text: Content, width: int, height: int) -> Content:
    """The last lines of `text`, wrapped, that fit."""
    if not (width and height):
        return text
    return Content("\n").join(text.wrap(width)[-height:])


def legend() -> Content:
    parts: list[str | tuple[str, str]] = ["tokens from: "]
    for source, style in STYLES.items():
        parts += [(_WORDS[source], style), "  "]
    return Content.assemble(*parts)
