"""The components of Edgespec and their licenses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from commands import edgespec

from edgespec.app.cli import licences
from edgespec.core import EdgespecError


def test_installed_packages_and_what_they_need() -> None:
    found = {one["name"]: one for one in json.loads(edgespec("licences", "--json").stdout)}
    assert {"edgespec", "numpy", "textual", "pydantic_core"} <= found.keys()
    assert "pytest" not in found
    assert found["textual"]["licence"] == "MIT"
    assert "Redistribution and use" in edgespec("licences", "NumPy").stdout
    assert "unknown component" in edgespec("licences", "nonesuch").stderr


def test_a_program_without_its_list_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "edgespec"))
    for text in (None, "", "[]", '{"components": [{"name": "x"}]}'):
        if text is not None:
            (tmp_path / "sbom.cdx.json").write_text(text)
        with pytest.raises(EdgespecError, match="unpack the program again"):
            licences.components()
