"""What a draft model has brought decides whether it is asked."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from edgespec.draft_account import DraftAccount, DraftTrial


def test_a_model_that_loses_is_soon_not_affordable_and_later_again() -> None:
    account = DraftAccount()
    assert account.affords(True, 5.0)
    for _ in range(3):
        account.record(True, -4.0)
    assert not account.affords(True, 1.0)
    assert account.affords(False, 5.0)  # of the other kind nothing was seen
    for _ in range(900):
        account.earn(1.0)
    assert account.affords(True, 4.0)


def test_gains_do_not_pay_for_long_losses() -> None:
    account = DraftAccount()
    for _ in range(100):
        account.record(False, 10.0)
    for _ in range(3):
        account.record(False, -5.0)
    assert not account.affords(False, 0.1)


def test_reading_is_learned_within_bounds() -> None:
    account = DraftAccount()
    for _ in range(20):
        account.read(1.0, 0.5)
    assert account.reading == pytest.approx(0.5, rel=0.01)
    account.read(1.0, 1e9)
    assert account.reading < 2.0


def test_a_trial_rests_longer_each_time() -> None:
    trial, rests = DraftTrial(), []
    for _ in range(3):
        while not trial.is_resting:
            trial.observe(1, -0.5)
        rested = 0
        while trial.is_resting:
            trial.observe(1, None)
            rested += 1
        rests.append(rested)
    assert rests == [32, 64, 128]
    trial.observe(1, 5.0)
    trial.observe(1, -2.9)
    assert not trial.is_resting


def test_a_drafter_that_gained_elsewhere_may_lose_more() -> None:
    def lost(trial: DraftTrial) -> float:
        rounds = 0
        while not trial.is_resting:
            trial.observe(1, -0.25)
            rounds += 1
        return rounds * 0.25

    good, bad = DraftAccount(), DraftAccount()
    for account, gain in ((good, 20.0), (bad, -20.0)):
        account.record(True, gain)
        account.record(False, gain)
    assert lost(DraftTrial(bad.patience)) == 1.75
    assert lost(DraftTrial(good.patience)) == 3.25


def test_an_account_comes_back_from_json() -> None:
    account = DraftAccount()
    account.record(True, -3.25)
    account.read(1.0, 2.0)
    data = json.loads(json.dumps(account.as_json()))
    assert DraftAccount.from_json(data).as_json() == data


@pytest.mark.parametrize(
    "change",
    [
        {"whole": math.nan},
        {"whole": 99.0},
        {"end": None},
        {"end": "x"},
        {"reading": 0.0},
        {"reading": math.inf},
    ],
    ids=str,
)
def test_damaged_accounts_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        DraftAccount.from_json({**DraftAccount().as_json(), **change})
