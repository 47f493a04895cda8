"""The chat's themes, by the names of the setting `theme`."""

from __future__ import annotations

from textual.theme import Theme

THEMES = {"dark": "textual-dark", "light": "textual-light", "contrast": "contrast"}
CONTRAST = Theme(
    "contrast", primary="#ffff00", secondary="#00ffff", foreground="#ffffff", background="#000000",
    surface="#000000", panel="#000000", boost="#202020", success="#00ff00", warning="#ffff00",
    error="#ff8080", accent="#00ffff", dark=True, variables={"text-muted": "#ffffff"},
)  # fmt: skip


def theme_name(setting: str, no_color: bool) -> str:
    """Textual's name of a theme. Without color too little would be left of the dark theme's contrast."""
    return "contrast" if no_color and setting == "dark" else THEMES[setting]
