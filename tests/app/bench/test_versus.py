"""The comparison: order of turns, memory, and its results when it is stopped."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from scripted import Scripted

from edgespec.app.bench.measure import Prompt
from edgespec.app.bench.systems import SystemAnswer
from edgespec.app.bench.versus import (
    INTERRUPTED,
    ComparisonRun,
    Stage,
    compare,
    kept,
    notes,
    rotation,
)
from edgespec.core import Cancelled, EdgespecError

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
    """A system that fails at its n-th answer."""

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
