"""The user's folders: those that the environment names come first."""

from __future__ import annotations

from pathlib import Path

import platformdirs
import pytest

from edgespec.machine.paths import user_folder


def test_the_environment_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGESPEC_ANY", str(tmp_path / "chosen"))
    assert user_folder("data", "EDGESPEC_ANY", "below") == tmp_path / "chosen"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGESPEC_ANY", "relative")
    assert user_folder("cache", "EDGESPEC_ANY") == tmp_path / "relative"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("EDGESPEC_ANY", "~/mine")
    assert user_folder("config", "EDGESPEC_ANY") == tmp_path / "mine"
    monkeypatch.setenv("EDGESPEC_ANY", "~no-such-user/mine")
    assert user_folder("config", "EDGESPEC_ANY") == tmp_path / "~no-such-user" / "mine"


@pytest.mark.parametrize("value", [None, ""])
def test_else_they_are_the_platforms(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("EDGESPEC_ANY", raising=False)
    if value is not None:
        monkeypatch.setenv("EDGESPEC_ANY", value)
    data = platformdirs.user_data_path("edgespec", appauthor=False)
    assert user_folder("data", "EDGESPEC_ANY", "models") == data / "models"
    assert user_folder("config", "EDGESPEC_ANY") == platformdirs.user_config_path("edgespec", appauthor=False)
    assert user_folder("cache", "EDGESPEC_ANY") == platformdirs.user_cache_path("edgespec", appauthor=False)
