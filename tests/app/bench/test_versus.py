"""The comparison: order of turns, memory, figures, what is left when it is stopped, and the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from peer_servers import SERVER, needs_server, peer

from edgespec.app.bench import chart
from edgespec.app.bench.figures import (
    Sample,
    Spread,
    figures,
    geometric_mean,
    ratios,
    speed,
    table,
)
from edgespec.app.bench.measure import Prompt, first_difference
from edgespec.app.bench.systems import SystemAnswer
from edgespec.app.bench.versus import (
    INTERRUPTED,
    ComparisonRun,
    Stage,
    compare,
    kept,
    notes,
    parse_peers,
    rotation,
)
from edgespec.core import Cancelled, EdgespecError


def answered(
    tokens_per_second: float, *, tokens: Sequence[int] = (1, 2, 3), first: float = 0.5, **counts: int
):
    """An answer of three tokens at that speed."""
    return SystemAnswer(
        (9,), tuple(tokens), 3, first, first + 2 / tokens_per_second, **{"rounds": 3, **counts}
    )


class Scripted:
    """A system that answers at a speed, and writes down what happens to it."""

    def __init__(self, name: str, rate: float = 1.0, *, memory: int = 0, remembers: bool = False) -> None:
        self.name, self.rate, self.memory, self.remembers = name, rate, memory, remembers
        self.plain = f"{name.partition(' ')[0]} plain"
        self.started = 0
        self.log: list[str] = []

    def start(self) -> None:
        self.started += 1
        self.log.append("start")

    def stop(self) -> None:
        self.log.append("stop")

    def ask(self, prompt: Sequence[int], max_tokens: int) -> SystemAnswer:
        self.log.append(f"ask {prompt[0]}")
        return answered(self.rate)


PROMPTS = [(Prompt("code", "a", "…"), [1]), (Prompt("code", "b", "…"), [2]), (Prompt("chat", "c", "…"), [3])]
WARM = [0]


def run(
    systems: Sequence[Scripted], repetitions: int = 1, memory: int = 10**9, prompts=PROMPTS
) -> ComparisonRun:
    return compare(systems, prompts, WARM, 8, repetitions, memory)


# --- turns ---


def test_every_system_answers_every_prompt_in_every_pass():
    systems = [Scripted("us plain"), Scripted("us"), Scripted("peer plain")]
    done = run(systems, repetitions=2)
    keys = [(one.repetition, one.index, one.system) for one in done.samples]
    assert sorted(keys) == sorted((r, i, s.name) for r in range(2) for i in range(3) for s in systems)
    assert done.stopped is None


def test_the_order_rotates_and_turns_around():
    systems = [Scripted(name) for name in "abcd"]
    orders = [["".join(s.name for s in rotation(systems, r, i)) for i in range(4)] for r in range(2)]
    assert orders[0] == ["abcd", "bcda", "cdab", "dabc"]
    assert all(sorted(order) == list("abcd") for order in orders[1])
    followed = {pair for orders_ in orders for order in orders_ for pair in pairwise(order)}
    assert {("a", "b"), ("b", "a")} <= followed
    for place in range(4):  # over the prompts of a pass, each system has each place once
        assert {order[place] for order in orders[0]} == set("abcd")
        assert {order[place] for order in orders[1]} == set("abcd")
    assert [one.system for one in run(systems, 1).samples][:8] == list("abcdbcda")


def test_a_system_is_warmed_up_once_and_stopped_at_the_end():
    systems = [Scripted("us plain"), Scripted("peer plain")]
    run(systems, repetitions=2)
    for system in systems:
        assert system.log[0] == "start"
        assert system.log[-1] == "stop"
        assert (system.log.count("start"), system.log.count("stop")) == (1, 1)
        asked = [line for line in system.log if line.startswith("ask")]
        assert set(asked[:2]) == {"ask 0"}  # the warm-up, and the check before the first pass
        assert asked[2:].count("ask 0") == 0


def test_what_remembers_is_started_afresh_for_each_pass():
    forgetful, learning = Scripted("peer plain"), Scripted("peer mod", remembers=True)
    run([forgetful, learning], repetitions=3)
    assert forgetful.started == 1
    text = " ".join(learning.log)
    for _ in range(2):  # from the last prompt to the first again
        text = text.partition("ask 3")[2]
        assert "stop" in text.partition("ask 1")[0]
    assert learning.log.count("start") == learning.log.count("stop")


# --- memory ---


def test_all_stay_started_if_they_fit():
    systems = [Scripted(name, memory=10) for name in "abc"]
    assert kept(systems, 30) == set("abc")


def test_room_is_left_for_the_largest_that_comes_and_goes():
    systems = [
        Scripted("a", memory=10),
        Scripted("b", memory=30),
        Scripted("c", memory=10),
        Scripted("d", memory=20),
    ]
    for memory in range(30, 80):
        staying = kept(systems, memory)
        passing = [one.memory for one in systems if one.name not in staying]
        assert sum(one.memory for one in systems if one.name in staying) + max(passing, default=0) <= memory
    assert kept(systems, 69) == {"a", "c", "d"} - ({"d"} if 10 + 10 + 20 + 30 > 69 else set())
    assert kept(systems, 70) == set("abcd")
    assert kept(systems, 30) == set()


def test_never_more_memory_than_there_is():
    systems = [Scripted(name, memory=10) for name in "abcd"]
    up: set[str] = set()
    most = 0
    for system in systems:
        original = system.start, system.stop

        def start(system=system, original=original):
            nonlocal most
            original[0]()
            up.add(system.name)
            most = max(most, len(up))

        def stop(system=system, original=original):
            original[1]()
            up.discard(system.name)

        system.start, system.stop = start, stop
    done = run(systems, memory=25)
    assert most == 2
    assert not up
    assert done.passing == ["b", "c", "d"]
    assert "b, c, d" in notes(systems, done)[0]
    assert len(done.samples) == 12


def test_one_that_never_fits():
    with pytest.raises(EdgespecError, match=r"peer big needs about 5\.0 GB and 1\.0 GB are free"):
        run([Scripted("peer plain"), Scripted("peer big", memory=5 * 10**9)])


# --- being stopped ---


class Failing(Scripted):
    """Fails when asked for the n-th time."""

    def __init__(self, name: str, at: int, error: BaseException) -> None:
        super().__init__(name)
        self._left, self._error = at, error

    def ask(self, prompt: Sequence[int], max_tokens: int) -> SystemAnswer:
        self._left -= 1
        if not self._left:
            raise self._error
        return super().ask(prompt, max_tokens)


@pytest.mark.parametrize(
    ("error", "stopped"), [(KeyboardInterrupt(), INTERRUPTED), (EdgespecError("it died"), "it died")]
)
def test_what_was_measured_is_kept_in_whole_turns(error, stopped):
    systems = [Scripted("peer plain"), Failing("peer odd", 5, error)]
    done = run(systems)
    assert done.stopped == stopped
    assert [(one.index, one.system) for one in done.samples] == [
        (0, "peer plain"), (0, "peer odd"), (1, "peer odd"), (1, "peer plain"),
    ]  # fmt: skip
    assert stopped in notes(systems, done)[0]
    assert all(system.log[-1] == "stop" for system in systems)


@pytest.mark.parametrize(
    ("error", "raised"), [(KeyboardInterrupt(), Cancelled), (EdgespecError("it died"), EdgespecError)]
)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_before_the_first_turn_there_is_nothing_to_keep(error, raised, at):
    systems = [Scripted("peer plain"), Failing("peer odd", at, error)]
    with pytest.raises(raised):
        run(systems)
    assert all(system.log[-1] == "stop" for system in systems)


def test_one_that_cannot_be_stopped_does_not_save_the_others():
    class Stubborn(Scripted):
        def stop(self) -> None:
            raise OSError("not permitted")

    systems = [Scripted("a"), Stubborn("b"), Scripted("c")]
    stage = Stage(systems, WARM, 0)
    for system in systems:
        stage.ask(system, [1], 1)
    with pytest.raises(OSError, match="not permitted"):
        stage.__exit__()
    assert systems[0].log[-1] == systems[2].log[-1] == "stop"


# --- figures ---


def samples(speeds: dict[str, list[float]], task: str = "code", start: int = 0) -> list[Sample]:
    """One turn for each place in the lists; 0 leaves the system out of it."""
    return [
        Sample(0, start + i, Prompt(task, f"{task}{i}", ""), name, answered(rate))
        for name, rates in speeds.items()
        for i, rate in enumerate(rates)
        if rate
    ]


SYSTEMS = [Scripted(name) for name in ("us plain", "us", "peer plain", "peer simple", "peer mod")]


def test_ratios_are_taken_within_a_turn():
    # The machine slows down tenfold; within each turn "us" is twice as fast.
    report = figures(SYSTEMS, samples({"us": [20, 8, 2], "peer plain": [10, 4, 1]}), "peer plain")
    assert report["tasks"]["code"]["us"]["to_reference"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert report["tasks"]["code"]["us"]["tokens_per_second"] == pytest.approx(8)


def test_turns_in_which_one_is_missing_have_no_ratio():
    turns = [{"a": answered(4), "b": answered(2)}, {"a": answered(5)}, {"b": answered(1)}]
    assert ratios(turns, "a", "b", speed) == [pytest.approx(2)]
    one_token = SystemAnswer((9,), (1,), 1, 0.5, 0.5)
    assert ratios([{"a": answered(4), "b": one_token}], "a", "b", speed) == []
    assert ratios([{"a": one_token, "b": answered(4)}], "a", "b", speed) == []


def test_quartiles_and_geometric_means():
    assert Spread.of([1, 2, 3, 4, 5]) == Spread(3, 2, 4)
    assert Spread.of([7]) == Spread(7, 7, 7)
    assert Spread.of([]) is None
    assert geometric_mean([0.5, 2, 8]) == pytest.approx(2)
    assert geometric_mean([]) is None


def test_overall_counts_tasks_alike_and_spreads_over_all_turns():
    rows = samples({"us": [4, 4, 4], "peer plain": [1, 1, 1]}) + samples(
        {"us": [1], "peer plain": [1]}, "chat", 3
    )
    overall = figures(SYSTEMS, rows, "peer plain")["overall"]["us"]
    assert overall["to_reference"] == {"median": 2.0, "low": 3.25, "high": 4.0}  # quartiles of 1 4 4 4
    assert overall["tokens_per_second"] == pytest.approx(2)


def test_the_best_mode_is_chosen_for_each_task():
    rows = samples({"us": [6, 6], "peer plain": [2, 2], "peer simple": [3, 3], "peer mod": [1, 1]})
    rows += samples({"us": [6], "peer plain": [2], "peer simple": [1], "peer mod": [1]}, "chat", 2)
    report = figures(SYSTEMS, rows, "peer plain")
    assert report["best_mode"] == {"code": "peer simple", "chat": "peer plain"}
    assert report["tasks"]["code"]["us"]["to_best_mode"]["median"] == 2.0
    assert report["tasks"]["chat"]["us"]["to_best_mode"]["median"] == 3.0
    assert report["overall"]["us"]["to_best_mode"]["median"] == pytest.approx(6**0.5, abs=1e-4)
    assert report["tasks"]["code"]["us plain"]["to_reference"] is None  # it has no answers
    assert "code" in table(whole(report))


def test_first_tokens_acceptance_and_rounds():
    prompt = Prompt("code", "a", "")
    rows = [
        Sample(0, 0, prompt, "us plain", answered(1, first=0.5)),
        Sample(0, 0, prompt, "us", answered(2, first=0.75, drafted=8, accepted=2, rounds=1)),
        Sample(0, 0, prompt, "peer plain", answered(1, first=1.0)),
    ]
    row = figures(SYSTEMS, rows, "peer plain")["tasks"]["code"]["us"]
    assert row["seconds_to_first_token"] == 0.75
    assert row["first_token_to_plain"]["median"] == 1.5
    assert row["first_token_to_reference"]["median"] == 0.75
    assert row["to_plain"]["median"] == 2.0
    assert (row["acceptance"], row["tokens_per_round"]) == (0.25, 3.0)


def test_the_oracle_is_asked_with_the_plain_answer_and_its_share_is_taken_within_a_turn():
    asked = []

    def oracle(system: str, answer: SystemAnswer) -> float | None:
        asked.append((system, answer.prompt, answer.tokens))
        return None if len(asked) == 1 else 4.0

    rows = samples({"us plain": [1, 1, 1], "us": [3, 2, 1], "peer plain": [1, 1, 1]})
    report = figures(SYSTEMS, rows, "peer plain", oracle)
    row = report["tasks"]["code"]["us"]
    assert asked[0] == ("us plain", (9,), (1, 2, 3))
    assert row["oracle"]["median"] == 4.0
    assert row["oracle_share"]["median"] == pytest.approx((0.5 + 0.25) / 2)
    assert "oracle" not in report["tasks"]["code"]["us plain"]
    assert "share" in table(whole(report))
    assert "share" not in table(whole(figures(SYSTEMS, rows, "peer plain")))


def test_differences_to_plain_are_listed_once():
    prompt = Prompt("code", "a", "")
    rows = [
        Sample(repetition, 0, prompt, name, answered(1, tokens=tokens))
        for repetition in range(2)
        for name, tokens in (
            ("us plain", [1, 2, 3]),
            ("us", [5] if repetition else [1, 5, 3]),
            ("peer plain", [1, 9, 3]),
            ("peer mod", [1, -1, 3]),
        )
    ]
    report = figures(SYSTEMS, rows, "peer plain")
    assert report["differences"] == [{"system": "us", "task": "code", "id": "a", "position": 1}]
    assert "us is not token-identical to plain (near-ties): a at 1." in table(whole(report))


@pytest.mark.parametrize(
    ("ours", "theirs", "position"),
    [
        ([1, 2], [1, 2], None),
        ([1, 2], [1, 3], 1),
        ([1, 2], [1], 1),
        ([1, -1, 3], [1, 2, 3], None),
        ([], [4], 0),
    ],
)
def test_first_difference(ours, theirs, position):
    assert first_difference(ours, theirs) == position


def test_what_the_reader_must_know():
    prompt = Prompt("code", "a", "")
    rows = [
        Sample(0, 0, prompt, "peer plain", answered(1, drafted=3)),
        Sample(0, 0, prompt, "peer mod", answered(1)),
        Sample(0, 0, prompt, "us", answered(1, drafted=3)),
        Sample(0, 0, prompt, "us plain", answered(1)),
    ]
    said = notes([*SYSTEMS[:3], SYSTEMS[4]], ComparisonRun(rows))
    assert said == [
        "peer plain drafted 3 tokens: it is not plain decoding.",
        "peer mod never drafted: its figures are those of plain decoding.",
    ]


# --- the chart ---


def whole(report: dict) -> dict:
    return {
        "model": "m.gguf", "draft": None, "threads": [2, 2], "repetitions": 1, "max_tokens": 8, "notes": [],
        "prompts": [0], **report,
    }  # fmt: skip


def test_a_chart_is_drawn_and_leaves_nothing_else(tmp_path):
    rows = samples({"us": [2, 3], "peer plain": [1, 1]}) + samples(
        {"peer plain": [1], "peer mod": [2]}, "chat", 2
    )
    chart.draw(whole(figures(SYSTEMS, rows, "peer plain")), tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["c.png"]


def test_a_chart_that_cannot_be_drawn(tmp_path, monkeypatch):
    with pytest.raises(EdgespecError, match=r"chart\.png"):
        chart.check(tmp_path / "chart.svg")
    with pytest.raises(EdgespecError, match=r"chart\.png"):
        chart.draw(
            whole(figures(SYSTEMS, samples({"peer plain": [1]}), "peer plain")), tmp_path / "chart.svg"
        )
    with pytest.raises(EdgespecError, match="no folder"):
        chart.check(tmp_path / "no" / "chart.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(EdgespecError, match=r"matplotlib.*edgespec\[dev\]"):
        chart.check(tmp_path / "chart.png")


def test_a_chart_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "c.png").mkdir()
    rows = samples({"us": [2], "peer plain": [1]})
    with pytest.raises(EdgespecError, match="Cannot write"):
        chart.draw(whole(figures(SYSTEMS, rows, "peer plain")), tmp_path / "c.png")
    assert [path.name for path in tmp_path.iterdir()] == ["c.png"]


# --- the command ---

# Counts what it is asked, in the peer's own time; drafts only when started with a mode.
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
    command = [sys.executable, "-m", "edgespec.app.cli.main", "bench", "-m", str(model), "--threads", "1"]
    return [
        *command,
        "--max-tokens",
        "4",
        "--per-task",
        "1",
        "--against",
        f"llama-server={program}",
        *arguments,
    ]


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
    assert [line for line in errors.splitlines() if "Other programs use" not in line] == []
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
    one_line_error(bench(starter_path, program, "--temperature", "0.5"), "--temperature")
    one_line_error(bench(starter_path, Path("/nowhere/llama-server")), "/nowhere/llama-server")
    with pytest.raises(EdgespecError, match="one program"):
        parse_peers([f"llama-server={program}"] * 2, 0.0)


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
