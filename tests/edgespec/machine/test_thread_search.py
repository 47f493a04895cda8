"""Finding a thread count among other programs: passes with known costs, no clock."""

from __future__ import annotations

import pytest

from edgespec.machine.thread_search import ThreadSearch


def settle(thread_search: ThreadSearch, slowness: dict[int, float], expected: float = 0.03) -> list[int]:
    """Passes until all was tried; the counts in use, in order."""
    used = []
    while not thread_search.settled:
        used.append(thread_search.threads)
        thread_search.observe(expected, expected * slowness[thread_search.threads])
    return used


def test_the_quickest_count_is_kept():
    thread_search = ThreadSearch([8, 4, 2, 1])
    used = settle(thread_search, {8: 5.0, 4: 2.0, 2: 2.5, 1: 4.0})
    assert list(dict.fromkeys(used)) == [8, 4, 2, 1]
    assert thread_search.threads == 4


def test_a_trial_lasts_a_third_of_a_second_whatever_a_pass_takes():
    for expected in (0.005, 0.2):
        used = settle(ThreadSearch([2, 1]), {2: 3.0, 1: 1.5}, expected)
        assert used.count(2) == pytest.approx(0.3 / (3.0 * expected), abs=1)


def test_passes_of_different_sizes_count_alike():
    thread_search = ThreadSearch([2, 1])
    while thread_search.threads == 2:  # large batches, three times as long as in calm
        thread_search.observe(0.100, 0.300)
    found = None
    while found is None:  # small ones, twice as long
        found = thread_search.observe(0.020, 0.040)
    assert found == pytest.approx(2.0)
    assert thread_search.threads == 1


def test_all_is_tried_anew_after_a_while():
    thread_search = ThreadSearch([2, 1])
    settle(thread_search, {2: 3.0, 1: 1.5})
    assert thread_search.threads == 1
    rounds = 0
    while thread_search.settled:
        thread_search.observe(0.03, 0.045)
        rounds += 1
    assert rounds == pytest.approx(15 / 0.045, abs=2)
    settle(thread_search, {2: 1.1, 1: 1.5})
    assert thread_search.threads == 2


def test_nothing_to_try():
    with pytest.raises(ValueError, match="no thread counts"):
        ThreadSearch([])
