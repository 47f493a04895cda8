"""The main screens in every theme, at 80 by 24 and 140 by 40.

The expected screens are in tests/app/chat/screens: the text of each screen once, and the styles of each theme
with the first words in them. EDGESPEC_SCREENS=new writes new ones; check the difference.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from chats import FakeModel, answered, app_of, send, shown, until
from rich.style import Style
from textual.pilot import Pilot
from textual.widgets import Input

from edgespec.app import settings as settings_file
from edgespec.app.chat.app import ChatApp
from edgespec.app.chat.widgets.input import MessageInput
from edgespec.app.history.store import History
from edgespec.models.hub import selection

KEPT = Path(__file__).parent / "screens"
ANSWER = """\
A **suffix automaton** holds every substring of a text in *linear* space.

1. Walk the text once.
2. Follow suffix links.

```python
def extend(self, token: int) -> None:
    \"\"\"Amortized constant time.\"\"\"
    self.next[node][token] = state  # a comment
```

| structure | build |
|---|---|
| suffix array | O(n log n) |

> Draft what you can verify: `retrieval.py`.
"""
CHOICES = [
    selection.ModelChoice("fake-model", True, "98 MB · Apache-2.0"),
    selection.ModelChoice("large", False, "1,117 MB · draft tiny · not downloaded"),
]


async def key(pilot: Pilot[int], pressed: str, sign: str) -> None:
    await pilot.press(pressed)
    await until(pilot, lambda: sign in shown(pilot.app))


async def _answer(pilot: Pilot[int]) -> None:
    await send(pilot, "What is a suffix automaton?")
    await answered(pilot)
    await until(pilot, lambda: "retrieval.py" in shown(pilot.app))


async def _stopped(pilot: Pilot[int]) -> None:
    await pilot.press("ctrl+g", "ctrl+r")
    await answered(pilot)
    await pilot.press("ctrl+up")
    await until(pilot, lambda: "branch 2 of 2" in shown(pilot.app))


async def _search(pilot: Pilot[int]) -> None:
    await pilot.press("escape", "ctrl+f")
    await pilot.press(*"sky")
    await until(pilot, lambda: "is the sky" in shown(pilot.app))


async def _then(pilot: Pilot[int], before: str, pressed: str, sign: str) -> None:
    await pilot.press(before)
    await pilot.pause()
    await key(pilot, pressed, sign)


SCREENS: dict[str, Callable[[Pilot[int]], Awaitable[None]]] = {
    "empty": lambda pilot: until(pilot, lambda: "ready · 0/512" in shown(pilot.app)),
    "answer": _answer,
    "engine": lambda pilot: key(pilot, "ctrl+g", "repeated text"),
    "branch": _stopped,
    "search": _search,
    "help": lambda pilot: _then(pilot, "ctrl+b", "f1", "/regenerate"),
    "settings": lambda pilot: _then(pilot, "escape", "f6", "catalog name"),
    "model": lambda pilot: _then(pilot, "escape", "f4", "in use"),
}


def styles(app: ChatApp) -> list[str]:
    """Every style on the screen, as the terminal gets it, with the first words in it."""
    background = app.screen.styles.background
    found: dict[str, str] = {}
    for strip in app.screen._compositor.render_strips():
        for one in app._filters:
            if one.enabled:
                strip = strip.apply_filter(one, background)
        for text, style, _ in strip:
            if text.strip():
                found.setdefault(str(_plain(style or Style())), text.strip()[:24])
    return sorted(f"  {style}: {text}" for style, text in found.items())


def _plain(style: Style) -> Style:
    return Style.from_color(style.color, style.bgcolor) + Style(
        bold=style.bold, dim=style.dim, italic=style.italic, underline=style.underline, reverse=style.reverse
    )


async def settled(pilot: Pilot[int]) -> None:
    before = ""
    while before != (before := shown(pilot.app)):
        await pilot.pause(0.2)


@pytest.mark.parametrize("size", [(80, 24), (140, 40)], ids=["80x24", "140x40"])
@pytest.mark.parametrize("theme", ["dark", "light", "contrast", "no-color"])
async def test_screens_look_as_they_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theme: str, size: tuple[int, int]
) -> None:
    monkeypatch.setattr(settings_file, "config_path", lambda: Path("/home/me/.config/edgespec/config.toml"))
    monkeypatch.setattr(selection, "choices", lambda: CHOICES)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if theme == "no-color":
        monkeypatch.setenv("NO_COLOR", "1")
    with History(tmp_path / "h.db") as history:
        for question in ("Why is the sky blue?", "A title that is far too long for the list of titles"):
            about = history.new()
            history.append(about.id, "user", question)
            history.append(about.id, "assistant", "Because the sky is the sky.")
        history.pin(1)
    settings = settings_file.Settings(theme="dark" if theme == "no-color" else theme)  # type: ignore[arg-type]
    engine = FakeModel([ANSWER[at : at + 9] for at in range(0, len(ANSWER), 9)])
    app = app_of(engine, tmp_path / "h.db", settings=settings, opener=lambda name: lambda _: engine)
    seen: dict[str, str] = {}
    async with app.run_test(size=size, notifications=True) as pilot:
        app.query_one(MessageInput).cursor_blink = False
        app.query_one("#search", Input).cursor_blink = False
        for name, reach in SCREENS.items():
            await reach(pilot)
            if name == "settings":
                app.screen.query_one(Input).cursor_blink = False
            await settled(pilot)
            seen[f"{name}.txt"] = "\n".join(line.rstrip() for line in shown(app).splitlines()) + "\n"
            seen[f"{theme}.txt"] = seen.get(f"{theme}.txt", "") + "\n".join([name, *styles(app), ""])
    folder = KEPT / "x".join(map(str, size))
    for name, text in seen.items():
        if os.environ.get("EDGESPEC_SCREENS") == "new":
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        assert (folder / name).read_text() == text, f"{folder / name} differs; the screen is\n{text}"
