"""The chat screen, driven by keys, with a scripted model."""

import asyncio
import threading
from pathlib import Path
from time import monotonic, sleep

import pytest
from chats import SIZE, FakeModel, answered, app_of, send, shown, until
from textual.events import Paste
from textual.widgets import ProgressBar

from edgespec.app.chat.app import ChatApp
from edgespec.app.chat.events import Changed
from edgespec.app.chat.widgets.input import MessageInput
from edgespec.app.chat.widgets.view import ConversationView
from edgespec.core import EdgespecError, Progress


@pytest.fixture(autouse=True)
def _data_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESPEC_DATA", str(tmp_path))


async def test_screen_is_there_and_typing_works_before_the_model() -> None:
    engine, loaded = FakeModel(notes=["One note."]), threading.Event()

    def load(progress: Progress) -> FakeModel:
        assert progress(0.4)
        assert loaded.wait(10)
        return engine

    app = ChatApp(load, "fake-model")
    async with app.run_test(size=SIZE) as pilot:
        await until(pilot, lambda: "loading 40%" in shown(app))
        assert app.query_one(ProgressBar).display
        await pilot.press("h", "i")
        assert "hi" in app.query_one(MessageInput).text
        await pilot.press("enter")
        await until(pilot, lambda: "hi" in shown(app))
        assert engine.asked == []
        loaded.set()
        await until(pilot, lambda: "Hello there." in shown(app))
        assert shown(app).count("One note.") == 1
        assert not app.query_one(ProgressBar).display


async def test_answer_streams_and_figures_follow() -> None:
    engine = FakeModel()
    app = app_of(engine)
    async with app.run_test(size=SIZE) as pilot:
        await send(pilot, "Hi [red]x[/red]")
        await until(pilot, lambda: "ready" in shown(app) and "22/512" in shown(app))
        screen = shown(app)
        assert "Hello there." in screen
        assert "Hi [red]x[/red]" in screen
        assert "ready · 0.0 tokens/s · 1.0/round · 25% accepted · 22/512" in screen.splitlines()[-1]
        assert "fake-model" in screen.splitlines()[-1]
        await send(pilot, "More")
        await until(pilot, lambda: shown(app).count("Hello there.") == 2)
        assert [m["content"] for m in engine.asked[1]] == [
            "Be kind.",
            "Hi [red]x[/red]",
            "Hello there.",
            "More",
        ]


async def test_f3_goes_through_the_modes() -> None:
    engine = FakeModel()
    app = app_of(engine)
    async with app.run_test(size=SIZE) as pilot:
        await until(pilot, lambda: "0/512" in shown(app))
        for mode in (
            "performance: chosen by the user",
            "balanced: chosen by the user",
            "saver: chosen by the user",
        ):
            await pilot.press("f3")
            await until(pilot, lambda mode=mode: mode in shown(app).splitlines()[0])
        assert engine.governor.mode == "saver"
        await pilot.press("f3")
        assert engine.governor.mode == "auto"


async def test_escape_stops_within_a_piece_and_keeps_the_text() -> None:
    engine = FakeModel(["word "] * 500, pause=0.02)
    app = app_of(engine)
    async with app.run_test(size=SIZE) as pilot:
        await send(pilot, "Go")
        await send(pilot, "Behind it")
        await until(pilot, lambda: "word word word" in shown(app))
        before = engine.given
        await pilot.press("escape")
        await until(pilot, lambda: shown(app).count("stopped") == 3)
        stopped_at = engine.given
        assert stopped_at < before + 30
        await asyncio.sleep(0.1)
        assert engine.given == stopped_at
        assert "word word word" in shown(app)
        assert "stopped" in shown(app).splitlines()[-1]
        assert len(engine.asked) == 1
        await send(pilot, "Again")
        await until(pilot, lambda: len(engine.asked) == 2)
        assert engine.asked[1][2]["content"] == "word " * stopped_at
        await pilot.press("ctrl+q")


async def test_new_conversation_during_an_answer_forgets_everything() -> None:
    engine = FakeModel(["word "] * 500, pause=0.02)
    app = app_of(engine)
    async with app.run_test(size=SIZE) as pilot:
        await send(pilot, "Old")
        await until(pilot, lambda: "word" in shown(app))
        await pilot.press("ctrl+l")
        await until(pilot, lambda: "ready · 0/512" in shown(app))
        assert "word" not in shown(app)
        engine.pieces = ["Fresh."]
        await send(pilot, "New")
        await until(pilot, lambda: "Fresh." in shown(app))
        assert [m["content"] for m in engine.asked[1]] == ["Be kind.", "New"]


async def test_quit_during_an_answer_ends_app_and_model_thread() -> None:
    engine = FakeModel(["word "] * 5000, pause=0.02)
    app = app_of(engine)
    start = 0.0
    async with app.run_test(size=SIZE) as pilot:
        await send(pilot, "Go")
        await until(pilot, lambda: "word" in shown(app))
        start = monotonic()
        await pilot.press("ctrl+q")
    assert monotonic() - start < 2
    assert app.return_value == 0
    assert engine.closed
    thread = app.session._model_worker._thread
    assert thread is not None
    assert not thread._thread.is_alive()


async def test_quit_while_loading_cancels_the_load() -> None:
    asked_again = threading.Event()

    def load(progress: Progress) -> FakeModel:
        while progress(0.5):
            sleep(0.01)
        asked_again.set()
        raise EdgespecError("canceled")

    app = ChatApp(load, "fake-model")
    async with app.run_test(size=SIZE) as pilot:
        await until(pilot, lambda: "loading 50%" in shown(app))
        await pilot.press("ctrl+q")
    assert asked_again.is_set()
    assert app.return_value == 0


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (EdgespecError("no file\nx.gguf: run `edgespec pull x`"), "no file x.gguf: run `edgespec pull x`"),
        (ValueError("odd"), "please report it: ValueError: odd"),
    ],
)
async def test_load_error_is_a_line_and_the_app_lives(error: Exception, line: str) -> None:
    def load(progress: Progress) -> FakeModel:
        raise error

    app = ChatApp(load, "fake-model")
    async with app.run_test(size=SIZE) as pilot:
        await until(pilot, lambda: line in shown(app))
        assert "Ctrl+Q quits" in " ".join(shown(app).split())
        assert "failed" in shown(app).splitlines()[-1]
        await send(pilot, "Hi?")
        await until(pilot, lambda: "no model is loaded" in shown(app))


async def test_answer_error_is_a_line_and_the_turn_is_forgotten() -> None:
    engine = FakeModel([EdgespecError("prompt has 600 tokens:\nshorten it")])
    app = app_of(engine)
    async with app.run_test(size=SIZE) as pilot:
        await send(pilot, "Too long")
        await until(pilot, lambda: "prompt has 600 tokens: shorten it" in shown(app))
        assert "Traceback" not in shown(app)
        engine.pieces = ["Fine."]
        await send(pilot, "Short")
        await until(pilot, lambda: "Fine." in shown(app))
        assert [m["content"] for m in engine.asked[1]] == ["Be kind.", "Short"]


async def test_nothing_but_text_reaches_the_screen() -> None:
    pieces = [
        "\x1b",
        "]52;c;AAAA",
        "\x07 ",
        "\x9b31m ",
        "&#x202e;&#x9b; ",
        "<b>tag</b>\n\n```\n\x1b[2J",
        "code\n```\n",
    ]
    app = ChatApp(lambda progress: FakeModel(pieces, 0.06, ["no\x1b[31mte"]), "na\x1b[1mme\u202e")
    async with app.run_test(size=SIZE) as pilot:
        app.post_message(Paste("one\r\ntwo\x1b[3m\x9d"))
        await pilot.pause()
        assert app.query_one(MessageInput).text == "one\ntwo[3m"
        await pilot.press("enter")
        await until(pilot, lambda: "14" not in shown(app) and "code" in shown(app) and "ready" in shown(app))
        screen = shown(app)
        for text in ("]52;c;AAAA", "31m", "<b>tag</b>", "[2Jcode", "no[31mte", "na[1mme", "two[3m"):
            assert text in screen
        bad = [c for c in screen if c != "\n" and (ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or c == "\u202e")]
        assert bad == []


async def test_new_lines_and_paste_make_one_message() -> None:
    engine = FakeModel()
    app = app_of(engine)
    async with app.run_test(size=SIZE) as pilot:
        app.post_message(Paste("one\n\ntwo"))
        await pilot.press("ctrl+j", "x", "shift+enter", "y", "enter")
        await until(pilot, lambda: "Hello there." in shown(app))
        assert engine.asked[0][-1]["content"] == "one\n\ntwo\nx\ny"
        assert app.query_one(MessageInput).text == ""
        await pilot.press("enter")
        await pilot.pause()
        assert len(engine.asked) == 1


async def test_the_start_of_an_answer_is_drawn_once() -> None:
    engine = FakeModel(["Once ", "only."])
    app = app_of(engine)
    async with app.run_test(size=SIZE) as pilot:
        await until(pilot, lambda: "0/512" in shown(app))
        poll, app.session.poll = app.session.poll, lambda wait=0.0: []  # type: ignore[method-assign]
        await send(pilot, "Go")
        await until(
            pilot, lambda: any(isinstance(event, Changed) for event in poll())
        )  # the model is asked now
        await until(pilot, lambda: engine.given == 2)
        kept = app.session.items
        app.session.poll = lambda wait=0.0: [Changed(0), *poll()]  # type: ignore[method-assign]
        await answered(pilot)
        assert [item.text for item in kept] == ["Go", "Once only."]
        await until(pilot, lambda: "Once only." in shown(app))
        assert shown(app).count("Once") == 1


async def test_small_window_follows_the_end_unless_scrolled_up() -> None:
    read = threading.Event()
    engine = FakeModel([f"line {n}\n\n" for n in range(60)])
    engine.before_piece = lambda number: number != 40 or read.wait(20)
    app = app_of(engine)
    async with app.run_test(size=SIZE) as pilot:
        app.query_one(MessageInput).insert("\n" * 40)
        await pilot.pause()
        view = app.query_one(ConversationView)
        assert view.size.height >= 10
        assert "fake-model" in shown(app).splitlines()[-1]
        app.query_one(MessageInput).clear()
        await send(pilot, "Go")
        await until(pilot, lambda: "line 39" in shown(app))
        await pilot.press("pageup")
        await until(pilot, lambda: "line 39" not in shown(app))

        def looked_at() -> list[str]:
            return [line[:70] for line in shown(app).splitlines()[1:15]]

        before = looked_at()
        read.set()
        await answered(pilot)
        await until(pilot, lambda: view.max_scroll_y > 90)
        await until(pilot, lambda: looked_at() == before)
        await send(pilot, "Again")
        await until(pilot, lambda: engine.given == 120 and "line 59" in shown(app))


async def test_paging_where_there_is_nothing_to_scroll_does_not_lose_the_end() -> None:
    engine = FakeModel(["Short."])
    app = app_of(engine)
    async with app.run_test(size=SIZE) as pilot:
        view = app.query_one(ConversationView)
        await send(pilot, "Go")
        await until(pilot, lambda: "Short." in shown(app))
        assert "Go" in shown(app).splitlines()[1]
        assert view.scroll_y == 0
        await pilot.press("pageup", "pagedown")
        engine.pieces = [f"line {n}\n\n" for n in range(30)]
        await send(pilot, "More")
        await until(pilot, lambda: "line 29" in shown(app))
        engine.before_piece = lambda number: None if number else app.call_from_thread(view.page, 1)
        await send(pilot, "And more")  # page down at the end while it grows
        await until(pilot, lambda: engine.given == 61 and "line 29" in shown(app))
