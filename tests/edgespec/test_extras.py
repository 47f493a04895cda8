"""Advice that can be followed, with and without Python."""

from __future__ import annotations

import sys
from importlib.metadata import requires

import pytest

from edgespec.extras import how_to_get


@pytest.mark.parametrize("extra", ["ik", "export", "dev"])
def test_an_installation_takes_what_the_project_offers(extra: str) -> None:
    assert how_to_get(extra, " now") == f"pip install 'edgespec[{extra}]' now"
    assert any(f'extra == "{extra}"' in one for one in requires("edgespec") or ())


def test_a_frozen_program_is_not_reported_to_run_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert "pip install" not in how_to_get("ik", " now")
    assert "README" in how_to_get("ik")
