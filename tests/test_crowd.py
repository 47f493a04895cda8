"""Finding a thread count among other programs: passes with known costs, no clock."""

from __future__ import annotations

import pytest

from edgespec.crowd import Crowd


def settle(crowd: Crowd, slowness: dict[int, float], expected: float = 0.03) -> list[int]:
    """Passes until all was tried; the counts in use, in order."""
    used = []
    while not crowd.settled:
        used.append(crowd.threads)
        crowd.observe(expected, expected * slowness[crowd.threads])
    return used


def test_the_quickest_count_is_kept():
    crowd = Crowd([8, 4, 2, 1])
    used = settle(crowd, {8: 5.0, 4: 2.0, 2: 2.5, 1: 4.0})
    assert list(dict.fromkeys(used)) == [8, 4, 2, 1]
    assert crowd.threads == 4


def test_a_trial_lasts_a_third_of_a_second_whatever_a_pass_takes():
    for expected in (0.005, 0.2):
        used = settle(Crowd([2, 1]), {2: 3.0, 1: 1.5}, expected)
        assert used.count(2) == pytest.approx(0.3 / (3.0 * expected), abs=1)


def test_passes_of_different_sizes_count_alike():
    crowd = Crowd([2, 1])
    while crowd.threads == 2:  # large batches, three times as long as in calm
        crowd.observe(0.100, 0.300)
    found = None
    while found is None:  # small ones, twice as long
        found = crowd.observe(0.020, 0.040)
    assert found == pytest.approx(2.0)
    assert crowd.threads == 1


def test_all_is_tried_anew_after_a_while():
    crowd = Crowd([2, 1])
    settle(crowd, {2: 3.0, 1: 1.5})
    assert crowd.threads == 1
    rounds = 0
    while crowd.settled:
        crowd.observe(0.03, 0.045)
        rounds += 1
    assert rounds == pytest.approx(15 / 0.045, abs=2)
    settle(crowd, {2: 1.1, 1: 1.5})
    assert crowd.threads == 2


def test_nothing_to_try():
    with pytest.raises(ValueError, match="no thread counts"):
        Crowd([])
