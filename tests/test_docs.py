"""Pages that are generated from the code are up to date."""

from __future__ import annotations

import re
import runpy

import pytest
from imports import ROOT


@pytest.mark.parametrize("name", ["cli.md", "settings.md"])
def test_a_generated_page_is_up_to_date(name: str) -> None:
    pages = runpy.run_path(str(ROOT / "packaging" / "docs.py"))["pages"]()
    assert (ROOT / "docs" / name).read_text("utf-8") == pages[name], "run `make docs`"


def test_a_page_names_all_commands_and_no_hidden_one() -> None:
    page = (ROOT / "docs" / "cli.md").read_text("utf-8")
    for command in ("run", "chat", "serve", "mcp", "bench speed", "quant draft", "models verify", "config"):
        assert f"# edgespec {command}\n" in page
    assert "--untouched" not in page


def test_the_options_that_the_makefile_uses_exist() -> None:
    """A renamed option would break the bundle, which `make test` does not build."""
    known = (ROOT / "docs" / "cli.md").read_text("utf-8")
    lines = [line for line in (ROOT / "Makefile").read_text("utf-8").splitlines() if "dist/edgespec " in line]
    used = {option for line in lines for option in re.findall(r"(?<=\s)--[a-z-]+", line)}
    assert used
    assert not {option for option in used if not re.search(rf"{option}\b", known)}
