"""Figures of a comparison, their table and their chart."""

from __future__ import annotations

import sys

import pytest
from scripted import Scripted, answered

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
    ComparisonRun,
    notes,
)
from edgespec.core import EdgespecError


def samples(speeds: dict[str, list[float]], task: str = "code", start: int = 0) -> list[Sample]:
    """One turn for each position in the lists; 0 leaves the system out of it."""
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
    with pytest.raises(EdgespecError, match="cannot write"):
        chart.draw(whole(figures(SYSTEMS, rows, "peer plain")), tmp_path / "c.png")
    assert [path.name for path in tmp_path.iterdir()] == ["c.png"]
