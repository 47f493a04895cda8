"""Dialogs over the chat: a choice, a line of text, a text to read. Each returns the choice, or None."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Generic, TypeVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Input, Label, OptionList, Static
from textual.widgets.option_list import Option

from edgespec.app.chat.widgets.input import LineInput
from edgespec.app.terminal import clean, one_line

T = TypeVar("T")


class ChoiceDialog(ModalScreen[T], Generic[T]):
    """A choice of one of several options (value, name, description)."""

    AUTO_FOCUS = "*"  # instead of that of the chat
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Leave")]

    def __init__(self, question: str, options: Sequence[tuple[T, str, str]]) -> None:
        super().__init__()
        self._question, self._options = question, options

    def compose(self) -> ComposeResult:
        with Vertical(classes="box"):
            yield Static(clean(self._question), classes="title", markup=False)
            prompts = []
            for _, name, about in self._options:
                text = Text(one_line(name), style="bold")
                if about:
                    text.append(f"\n  {one_line(about)}", "not bold")
                prompts.append(Option(text))
            yield OptionList(*prompts, markup=False)
            yield Label("Enter chooses · Esc leaves", classes="keys", markup=False)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(self._options[event.option_index][0])


class TextDialog(ModalScreen[str]):
    """An input of one line, with a default."""

    AUTO_FOCUS = "*"  # instead of that of the chat
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Leave")]

    def __init__(self, question: str, value: str = "") -> None:
        super().__init__()
        self._question, self._value = question, value

    def compose(self) -> ComposeResult:
        with Vertical(classes="box"):
            yield Static(clean(self._question), classes="title", markup=False)
            yield LineInput(one_line(self._value))
            yield Label("Enter · Esc leaves", classes="keys", markup=False)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self.dismiss(event.value)


class HelpScreen(ModalScreen[None]):
    """A text to read."""

    AUTO_FOCUS = "*"  # instead of that of the chat
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,f1,enter", "dismiss(None)", "Leave"),
        Binding("up", "scroll(-1)", show=False),
        Binding("down", "scroll(1)", show=False),
    ]

    def __init__(self, title: str, text: str) -> None:
        super().__init__()
        self._title, self._text = title, text

    def compose(self) -> ComposeResult:
        with Vertical(classes="box tall"):
            yield Static(clean(self._title), classes="title", markup=False)
            with VerticalScroll():
                yield Static(clean(self._text), markup=False)
            yield Label("Esc leaves", classes="keys", markup=False)

    def action_scroll(self, direction: int) -> None:
        self.query_one(VerticalScroll).scroll_relative(y=direction, animate=False)
