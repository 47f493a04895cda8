"""`edgespec bench versus` as a process, with a peer of a few lines and with the real llama-server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from peer_servers import SERVER, needs_server, peer

from edgespec.app.bench.figures import (
    table,
)

# Counts up, at its own pace; drafts only if started with a mode.
COUNTING = """\
self.begin()
n = asked["n_predict"]
for i in range(n):
    time.sleep(0.001)
    self.event(tokens=[100 + i], tokens_predicted=i + 1, stop=False)
drafts = {"draft_n": 4, "draft_n_accepted": 2} if "--spec-type" in sys.argv else {}
self.final(n, tokens_evaluated=len(asked["prompt"]), timings=drafts)
"""


def bench(model: Path, program: Path, *arguments: str) -> list[str]:
    command = [sys.executable, "-m", "edgespec.app.cli.main", "bench", "versus", f"llama-server={program}"]
    command += ["-m", str(model), "--threads", "1", "--max-tokens", "4", "--per-task", "1"]
    return [*command, *arguments]


def one_line_error(command: Sequence[str], *words: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr


@pytest.fixture
def suite(tmp_path) -> Path:
    path = tmp_path / "suite.jsonl"
    rows = [{"task": task, "id": f"{task}-1", "prompt": "Say hello."} for task in ("code", "chat")]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_the_command_compares_with_a_peer(tmp_path, starter_path, suite):
    program = peer(tmp_path, COUNTING)
    command = bench(starter_path, program, "--suite", str(suite), "--repetitions", "2", "--json")
    done = subprocess.run(
        [*command, "--chart", str(tmp_path / "c.png")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    names = {
        "edgespec plain",
        "edgespec",
        "llama-server plain",
        "llama-server ngram-simple",
        "llama-server ngram-mod",
    }
    assert names <= report["overall"].keys()
    assert report["tasks"].keys() == {"code", "chat"}
    row = report["overall"]["llama-server ngram-mod"]
    assert row["acceptance"] == 0.5
    assert row["to_plain"]["median"] > 0
    assert len(report["answers"]) == 2 * 2 * len(report["overall"])
    first = report["answers"][0]
    assert first["written"] <= 4
    assert report["prompts"][first["prompt"]]["tokens"]
    assert report["stopped"] is None
    assert report["reference"] == "llama-server plain"
    assert (tmp_path / "c.png").stat().st_size > 1000
    assert "of reference" in table(report)


def test_ctrl_c_prints_what_was_measured_and_leaves_no_server(tmp_path, starter_path, suite):
    asked = tmp_path / "asked"
    counting = f"open({str(asked)!r}, 'a').write('.')\n" + COUNTING
    command = bench(starter_path, peer(tmp_path, counting), "--suite", str(suite), "--repetitions", "1000")
    process = subprocess.Popen(
        [*command, "--modes", "plain"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while (not asked.exists() or len(asked.read_text()) < 8) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    # On a busy machine there is a note that nothing was measured.
    assert [line for line in errors.splitlines() if "other programs use" not in line] == []
    assert "Stopped early" in out
    assert "llama-server plain" in out
    assert not list(tmp_path.glob("edgespec-bench-*"))


def test_being_ended_leaves_no_server(tmp_path, starter_path, suite):
    pids = tmp_path / "pids"
    main = f"import os; open({str(pids)!r}, 'a').write(str(os.getpid()) + chr(10)); serve()"
    command = bench(starter_path, peer(tmp_path, "time.sleep(60)", main), "--suite", str(suite))
    process = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(tmp_path)})
    deadline = time.monotonic() + 60
    while (not pids.exists() or not pids.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    for pid in map(int, pids.read_text().split()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not list(tmp_path.glob("edgespec-bench-*"))


def test_mistakes_are_found_before_anything_runs(tmp_path, starter_path):
    program = peer(tmp_path, COUNTING)
    one_line_error(bench(starter_path, program, "--chart", "chart.svg"), "PNG")
    one_line_error(bench(starter_path, program, "--modes", "eagle"), "eagle", "ngram-mod")
    one_line_error(bench(starter_path, program, "--modes", "draft-simple"), "--draft")
    one_line_error(bench(starter_path, program, "--exact"), "--exact")
    one_line_error(bench(starter_path, Path("/nowhere/llama-server")), "/nowhere/llama-server")


def test_a_peer_that_dies_at_the_start_is_one_line(tmp_path, starter_path, suite):
    program = peer(tmp_path, main="print('error: unknown flag'); sys.exit(1)")
    command = bench(starter_path, program, "--suite", str(suite))
    one_line_error(command, "llama-server plain", "code 1", "unknown flag")


def test_a_peer_that_dies_halfway_still_gives_a_table(tmp_path, starter_path, suite):
    asked = tmp_path / "asked"
    dying = f"""\
open({str(asked)!r}, 'a').write('.')
if len(open({str(asked)!r}).read()) > 3:
    import os
    os._exit(7)
"""
    command = bench(starter_path, peer(tmp_path, dying + COUNTING), "--suite", str(suite), "--modes", "plain")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "of reference" in done.stdout
    assert "ended with code 7" in done.stdout
    assert "ended with code 7" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@needs_server
def test_the_command_compares_with_the_real_server(starter_path, suite):
    command = bench(starter_path, Path(SERVER), "--suite", str(suite), "--draft", str(starter_path), "--json")
    done = subprocess.run(
        [*command, "--modes", "draft-simple-p0"], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["overall"]["llama-server draft-simple-p0"]["acceptance"] > 0
    assert report["overall"]["llama-server plain"]["acceptance"] is None
    by_system = {one["system"]: one["tokens"] for one in report["answers"] if one["prompt"] == 0}
    assert by_system["edgespec plain"] == by_system["llama-server plain"]
