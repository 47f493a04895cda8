"""`edgespec bench`: subcommands, and the flags that were there before them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgespec.app.cli import main
from edgespec.app.cli.bench_flags import with_subcommand
from edgespec.core import EdgespecError

NAMES = ["speed", "energy", "busy", "agents", "json", "versus", "replay", "chat", "untouched", "self-test"]


def bench(*arguments: str) -> str:
    return CliRunner().invoke(main.app, ["bench", *arguments], catch_exceptions=False).output


def test_help_lists_the_subcommands_and_no_former_flag() -> None:
    said = bench("--help")
    assert [name for name in NAMES if f"│ {name} " not in said] == []
    for name in NAMES:
        page = bench(name, "--help")
        assert f"Usage: edgespec bench {name}" in page
        assert [flag for flag in ("--busy", "--schemas", "--replay", "--untouched") if flag in page] == []


@pytest.mark.parametrize(
    ("former", "now"),
    [
        ("", "speed"),
        ("-m x --json", "speed -m x --json"),
        ("energy -m x", "energy -m x"),
        ("--help", "--help"),
        ("--energy -m x", "energy -m x"),
        ("-m x --busy --repetitions 2", "busy -m x --repetitions 2"),
        ("--agents", "agents"),
        ("--schemas --suite s", "json --suite s"),
        ("--chat --json", "chat --json"),
        ("--untouched", "untouched"),
        ("--self-test -m x --engine ik", "self-test -m x --engine ik"),
        ("--replay heat --chart c.png", "replay heat --chart c.png"),
        ("--json --replay=t.jsonl", "replay t.jsonl --json"),
        ("-m x --against llama-server=/a --modes all", "versus llama-server=/a -m x --modes all"),
        ("--against=llama-server=/a -m x", "versus llama-server=/a -m x"),
        ("--schemas --against llama-server=/a -m x", "json --against=llama-server=/a -m x"),
    ],
)
def test_former_flags_are_subcommands(former: str, now: str) -> None:
    assert with_subcommand(former.split()) == now.split()


@pytest.mark.parametrize(
    "flags", ["--energy --busy", "--against a=b --energy", "--schemas --replay t --chat"]
)
def test_former_flags_exclude_each_other(flags: str) -> None:
    with pytest.raises(EdgespecError, match="choose one benchmark, not --"):
        with_subcommand(flags.split())


def test_a_former_flag_still_works(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"time": 0, "plugged": true}\n')
    assert json.loads(bench("--replay", str(trace), "--json")) == json.loads(
        bench("replay", str(trace), "--json")
    )


def test_a_chart_of_recorded_readings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EdgespecError, match="--chart"):
        bench("replay", str(tmp_path / "trace.jsonl"), "--chart", str(tmp_path / "c.png"))


def test_a_subcommand_that_does_not_exist_is_an_error() -> None:
    result = CliRunner().invoke(main.app, ["bench", "nonesuch"])
    assert result.exit_code == 2
    assert "No such command 'nonesuch'" in result.output
