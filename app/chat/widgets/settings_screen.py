"""The settings as a form, which saves changes to the settings file."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Input, Label, Static

from edgespec.app import settings as settings_file
from edgespec.app.chat.widgets.input import LineInput
from edgespec.app.terminal import clean, one_line
from edgespec.core import EdgespecError


class SettingsScreen(ModalScreen[settings_file.Settings | None]):
    """A form. Returns the saved settings, or None."""

    AUTO_FOCUS = "Input"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Leave"),
        Binding("ctrl+s", "save", "Save"),
    ]

    def __init__(self, settings: settings_file.Settings) -> None:
        super().__init__()
        self._settings = settings

    def compose(self) -> ComposeResult:
        with Vertical(classes="box tall"):
            yield Static(
                f"Settings in {one_line(str(settings_file.config_path()))}", classes="title", markup=False
            )
            with VerticalScroll(can_focus=False):
                for name, about in settings_file.ABOUT.items():
                    if name == "personas":
                        continue
                    words = f" {', '.join(settings_file.WORDS[name])}." if name in settings_file.WORDS else ""
                    with Horizontal(classes="setting"):
                        yield Label(name, markup=False)
                        yield LineInput(
                            one_line(settings_file.typed(self._settings, name)),
                            id=f"set-{name}",
                            compact=True,
                        )
                    yield Static(about + words, classes="about", markup=False)
            yield Static("", id="wrong", markup=False)
            yield Label("Enter or Ctrl+S saves · Tab moves on · Esc leaves", classes="keys", markup=False)

    def on_input_submitted(self) -> None:
        self.action_save()

    def action_save(self) -> None:
        settings, changes = self._settings, {}
        try:
            for name in settings_file.ABOUT:
                if name == "personas":
                    continue
                typed = self.query_one(f"#set-{name}", Input).value
                if typed != one_line(settings_file.typed(settings, name)):
                    settings = settings_file.changed(settings, name, typed)
                    changes[name] = getattr(settings, name)
            if settings.persona:
                settings.prompt_of(settings.persona)
            settings_file.save(changes)
        except EdgespecError as error:
            self.query_one("#wrong", Static).update(clean(str(error)))
            return
        self.dismiss(settings)
