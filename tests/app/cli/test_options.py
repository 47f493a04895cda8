"""One table makes flags and settings; groups of options become one object."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
from imports import FILES
from typer.testing import CliRunner

from edgespec.app.cli.main import app as edgespec
from edgespec.app.cli.options import GROUPS, grouped, option
from edgespec.app.engine.loading import EngineSpec
from edgespec.app.option_table import OPTIONS, VARIABLES
from edgespec.app.settings import Settings
from edgespec.sampling import Sampling


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """The arguments of the latest call of a command."""
    monkeypatch.setenv("EDGESPEC_CONFIG", str(tmp_path))
    for name in ("EDGESPEC_MODEL", "EDGESPEC_SERVER"):
        monkeypatch.delenv(name, raising=False)
    return {}


def invoke(function: Any, *arguments: str) -> str:
    app = typer.Typer(rich_markup_mode=None)
    app.command()(grouped(function))
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    return result.output


def test_a_group_is_one_object(heard: dict[str, Any]) -> None:
    def command(*, spec: EngineSpec, word: str = "", sampling: Sampling) -> None:
        heard.update(spec=spec, word=word, sampling=sampling)

    assert invoke(command) == ""
    assert heard == {"spec": EngineSpec(), "word": "", "sampling": Sampling()}
    arguments = ["-m", "x", "--max-draft", "3", "--exact", "--mode", "saver", "--word", "w", "--top-k", "5"]
    assert invoke(command, *arguments, "--temperature", "0.5", "--seed", "1") == ""
    assert heard == {
        "spec": EngineSpec("x", max_draft=3, exact=True, mode="saver"),
        "word": "w",
        "sampling": Sampling(0.5, 5, seed=1),
    }
    assert "less than or equal to 31" in invoke(command, "--max-draft", "32")
    assert "--mode" in invoke(command, "--mode", "eco")


def test_options_come_before_settings_and_settings_before_defaults(
    heard: dict[str, Any], tmp_path: Path
) -> None:
    def command(*, spec: EngineSpec, sampling: Sampling, settings: Settings) -> None:
        heard.update(spec=spec, sampling=sampling, settings=settings)

    (tmp_path / "config.toml").write_text(
        'model = "mine"\ntop_k = 7\ncontext = 512\nmode = "saver"\nmax_tokens = 9\nlora = ["a"]'
    )
    invoke(command, "--top-k", "0", "--max-tokens", "8")
    assert heard["settings"] == Settings("saver", "mine", top_k=0, context=512, max_tokens=8, lora=["a"])
    assert heard["spec"] == EngineSpec(
        context=512, mode="saver", lora=["a"]
    )  # the setting is not for a server's models
    assert heard["sampling"] == Sampling(0.7, 0, 0.95)
    (tmp_path / "config.toml").write_text("")
    invoke(command)
    assert heard["spec"].context is None  # the engine chooses
    invoke(command, "--context", "4096")
    assert heard["spec"].context == 4096
    (tmp_path / "config.toml").write_text('model = "mine"')
    invoke(command, "-m", "other")
    assert heard["spec"].model == "other"
    assert heard["settings"].model == "mine"


def test_a_default_of_a_group_is_shown(heard: dict[str, Any]) -> None:
    start = EngineSpec(mode="performance", context=64)

    def command(*, spec: EngineSpec = start) -> None:
        heard.update(spec=spec)

    invoke(command)
    assert heard["spec"] == start
    said = " ".join(invoke(command, "--help").split())
    assert "[default: performance]" in said
    assert "[default: 64" in said


def test_every_row_of_the_table_is_used() -> None:
    settings = {one.name for one in fields(Settings)}
    assert {name for name, one in OPTIONS.items() if one.setting} == settings
    for kind, names in GROUPS.items():
        assert set(names) <= OPTIONS.keys() & {one.name for one in fields(kind)}
    grouped_names = {name for names in GROUPS.values() for name in names}
    assert OPTIONS.keys() - settings - grouped_names == {"parallel", "queue", "server"}
    assert option("model").param_decls == ("--model",)
    assert option("model").default == "-m"


@pytest.mark.parametrize("command", ["run", "chat", "serve", "mcp", "bench speed", "bench busy"])
def test_the_options_of_the_engine_are_the_same_everywhere(command: str) -> None:
    found: Any = typer.main.get_command(edgespec)
    for word in command.split():
        found = found.commands[word]
    helps = {one.name: one.help for one in found.params}
    assert {name: helps[name] for name in GROUPS[EngineSpec]} == {
        name: OPTIONS[name].help for name in GROUPS[EngineSpec]
    }


def test_every_environment_variable_is_in_the_table() -> None:
    named = {
        name
        for path in FILES
        if path.name != "option_table.py"
        for name in re.findall(r"\bEDGESPEC_[A-Z_]+\b", path.read_text("utf-8"))
    }
    assert named <= VARIABLES.keys()
    assert {one.variable for one in OPTIONS.values()} - {""} <= VARIABLES.keys()
