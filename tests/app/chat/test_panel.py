"""The lines of figures, and the engine panel."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from chats import SIZE, FakeModel, answered, app_of, send, shown, until
from hypothesis import given
from hypothesis import strategies as st
from textual.content import Content
from textual.widgets import Static

from edgespec.app.chat.session import Session
from edgespec.app.chat.widgets.panel import STYLES, bars, colored, last_lines
from edgespec.app.chat.widgets.status import fitted, machine
from edgespec.core import Reading

PARTS = st.lists(
    st.tuples(st.integers(0, 9), st.text("ab", min_size=1, max_size=20), st.text("c", max_size=8)), max_size=8
)


@given(PARTS, st.integers(0, 80))
def test_what_is_shown_fits_and_the_least_goes_first(parts: list[tuple[int, str, str]], width: int) -> None:
    text = fitted(parts, width)
    assert len(text) <= width
    full = " · ".join(part for _, part, _ in parts)
    if len(full) <= width:
        assert text == full


def test_the_most_important_stays_longest() -> None:
    parts = [(9, "ready", "ready"), (1, "a long reason", "short"), (5, "80% accepted", "80%")]
    assert fitted(parts, 40) == "ready · a long reason · 80% accepted"
    assert fitted(parts, 30) == "ready · short · 80% accepted"
    assert fitted(parts, 21) == "ready · short · 80%"
    assert fitted(parts, 13) == "ready · 80%"
    assert fitted(parts, 8) == "ready"


@pytest.mark.parametrize("width", [80, 140])
async def test_the_lines_stay_readable(tmp_path: Path, width: int) -> None:
    engine = FakeModel(reading=Reading(0, celsius=61.4, charge=43, plugged=False), context_length=4096)
    engine.governor.decide(Reading(1.0, plugged=False, charge=43.0))
    app = app_of(engine, tmp_path / "h.db")
    async with app.run_test(size=(width, 24)) as pilot:
        await send(pilot, "A question with a rather long first line, which becomes the title of all this")
        await answered(pilot)
        await until(pilot, lambda: "43%" in shown(app).splitlines()[0])
        first, *_, last = shown(app).splitlines()
        assert "61" in first
        assert engine.decision.mode in first
        assert "A question" in first
        for part in ("fake-model", "ready", "tokens/s", "1.0/round", "25% accepted", "22/4,096"):
            assert part in last


async def test_the_panel_plots_and_colors(tmp_path: Path) -> None:
    engine = FakeModel(["alpha ", "beta ", "gamma\x1b[31m "], reading=Reading(0, celsius=70.0))
    app = app_of(engine, tmp_path / "h.db")
    async with app.run_test(size=SIZE) as pilot:
        await pilot.press("ctrl+g")
        await until(pilot, lambda: "no answer yet" in shown(app))
        await send(pilot, "Go")
        await answered(pilot)
        await until(pilot, lambda: "draft length" in shown(app) and "70 °C" in shown(app))
        await until(pilot, lambda: app.query_one("#draft-plot", Static).content == "███\n███")
        assert app.query_one("#speed-plot", Static).content == "██\n██"
        assert "100 tokens/s · max 100" in shown(app)
        assert "repeated text" in shown(app)
        await until(pilot, lambda: "gamma" in shown(app).split("tokens from: target")[1])
        content = app.query_one("#tokens", Static).content
        assert isinstance(content, Content)
        assert content.plain == "alpha beta gamma[31m "
        marked = [content.plain[s.start : s.end] for s in content.spans if "underline" in str(s.style)]
        assert marked == ["beta "]
        await pilot.press("ctrl+g")
        await until(pilot, lambda: "draft length" not in shown(app))
    # A conversation that is opened again shows the stored sources.
    app = app_of(FakeModel(), tmp_path / "h.db", reopen=0)
    async with app.run_test(size=SIZE) as pilot:
        await until(pilot, lambda: "alpha" in shown(app))
        await pilot.press("ctrl+g")
        await until(pilot, lambda: re.search(r"from: target.*\n.*alpha beta", shown(app)) is not None)


async def test_the_panel_shows_the_newest_lines_with_their_indentation(tmp_path: Path) -> None:
    lines = [f"{' ' * (n % 9)}line_{n}\n" for n in range(300)]
    app = app_of(FakeModel(["```\n", *lines, "        last"]), tmp_path / "h.db")
    async with app.run_test(size=SIZE) as pilot:
        await pilot.press("ctrl+g")
        await send(pilot, "Go")
        await answered(pilot)
        tokens = app.query_one("#tokens", Static)
        await until(pilot, lambda: "last" in str(tokens.content))
        shown_lines = [strip.text for strip in app.screen._compositor.render_strips()]
        region = tokens.region
        panel = [line[region.x :].rstrip() for line in shown_lines[region.y : region.bottom]]
        assert panel == [line.rstrip("\n") for line in [*lines[1 - region.height :], "        last"]]


def test_the_end_of_a_text_begins_with_a_line_and_fits() -> None:
    text = "".join(f"    line {n}\n" for n in range(200))
    content = colored(text, [("target", 1), ("suffix", 1)] * (len(text) // 2))
    assert all(line.startswith("    line") for line in content.plain.splitlines())
    assert last_lines(content, 40, 3).plain == "    line 198\n    line 199\n"
    assert last_lines(Content("word " * 30), 20, 2).plain.split() == ["word"] * 6


@given(st.lists(st.floats(0, 1e6), max_size=50), st.floats(0, 100))
def test_bars_are_as_high_as_their_values(values: list[float], bottom: float) -> None:
    high, low = bars(values, bottom).split("\n")
    heights = [" ▁▂▃▄▅▆▇█".index(a) + " ▁▂▃▄▅▆▇█".index(b) for a, b in zip(high, low, strict=True)]
    assert len(heights) == len(values)
    assert all(a == " " or b == "█" for a, b in zip(high, low, strict=True))
    most = max([value - bottom for value in values], default=0)
    for value, height in zip(values, heights, strict=True):
        assert height >= 1
        if most > 1e-6 and value > bottom:
            assert abs(height - (value - bottom) / most * 16) <= 1


def test_every_source_is_distinguishable_without_color() -> None:
    plain = {style.split(" ", 1)[-1] for source, style in STYLES.items() if source != "target"}
    assert len(plain) >= 3  # the two kinds of repeated text look alike
    text = colored("ab" * 5000, [("target", 1), ("suffix", 1)] * 5000)
    assert len(text.plain) == 1200


@pytest.mark.parametrize("width", [20, 40, 56, 120])
def test_a_long_reason_is_cut_and_the_readings_stay(width: int) -> None:
    engine = FakeModel(reading=Reading(0, celsius=61.0, charge=43, plugged=True))
    engine.governor.decide(Reading(1.0, plugged=True, others=0.5, celsius=61.0))
    session = Session(lambda progress: engine)
    session._model_worker.model = engine
    text = machine(session, width)
    assert len(text) <= width
    assert text.startswith("balanced")
    assert "43%+" in text
    if width >= 40:
        assert "balanced: plug" in text
        assert "61 °C" in text
    assert text.endswith("61 °C") or width < 40
